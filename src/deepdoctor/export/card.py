"""The card beside exported weights: what it was made from, what was measured, how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["write_card"]

_LOAD = {
    "adapter": """from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")""",
    "merged": """from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")""",
}


def write_card(folder: Path, kind: str, manifest: dict[str, Any], parity: dict[str, Any] | None) -> None:
    """Write ``README.md``. kind: "adapter" or "merged". manifest: the run's. parity: of the merged model, or None."""
    recipe, train, data = manifest["recipe"], manifest.get("train", {}), manifest.get("data", {})
    lines = [
        f"# {recipe['name']}: {kind}",
        "",
        "**Research only, not clinical guidance.** Made by DeepDoctor "
        f"{manifest['versions']['deepdoctor']}; how it was measured stands in the run's report.",
        "",
        f"- base model: `{recipe['model']['id']}`"
        + (f" at `{recipe['model']['revision']}`" if recipe["model"]["revision"] else "")
        + "; its licence applies to these weights",
        f"- rows: `{recipe['data']['source']}`, {data.get('train')} trained on, {data.get('held_out')} held out",
        f"- training: {train.get('steps')} steps, {train.get('tokens', 0):,} tokens, LoRA rank "
        f"{recipe['train']['lora_rank']}, alpha {recipe['train']['lora_alpha']:g}",
        f"- prompt: template `{data.get('template')}`, stored as the tokenizer's chat template",
    ]
    for part, loss in (manifest.get("compare") or {}).get("loss", {}).items():
        if part == "all" and loss.get("ci_low") is not None:
            lines.append(
                f"- held-out loss {loss['base']:.3f} -> {loss['tuned']:.3f} (difference {loss['difference']:+.3f}, "
                f"95 % interval {loss['ci_low']:+.3f} to {loss['ci_high']:+.3f})"
            )
    if parity:
        lines.append(
            f"- merged against base + adapter: logits differ by {parity['logit_difference']:.4f} (root mean square; "
            f"the adapter itself moves them by {parity['adapter_effect']:.2f}), greedy agreement "
            f"{parity['greedy_agreement']:.1%} of {parity['positions']} positions"
        )
    lines += ["", "```python", _LOAD[kind], "```", ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
