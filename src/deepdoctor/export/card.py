"""The card beside exported weights: what it was made from, what was measured, how to load it, who may use it.

Everything is read from the run: ``manifest.json`` and, where there is a comparison, ``compare/stats.json``. Paths of
this machine do not get into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from deepdoctor.export.licences import Licence, base_licences, data_licence, hub_id, is_hub_id, llama_notice

__all__ = ["card_metadata", "card_text", "write_card"]

HERE = "PATH_OF_THIS_FOLDER"
_TASK = {"type": "text-generation", "name": "Text Generation"}
_LIBRARY = {"adapter": "peft", "merged": "transformers", "merged_4bit": "transformers", "gguf": "gguf"}
_QUANTISED = ("merged_4bit", "gguf")
_TAGS = {"merged_4bit": ("bitsandbytes", "4-bit")}
_ABOUT = {
    "adapter": "A LoRA adapter: it needs its base model.",
    "merged": "Base and adapter merged into one model.",
    "merged_4bit": "Base and adapter merged into one model, its projections as bitsandbytes' NF4 (4 bits a weight).",
    "gguf": "Base and adapter merged, as GGUF files for llama.cpp and Ollama.",
}


def write_card(folder: Path, kind: str, manifest: Mapping[str, Any], parity: Mapping[str, Any] | None) -> None:
    """Write ``README.md``. kind: "adapter", "merged", "merged_4bit" or "gguf". manifest: the run's. parity: or None."""
    (folder / "README.md").write_text(card_text(kind, manifest, parity=parity), encoding="utf-8")


def card_text(
    kind: str,
    manifest: Mapping[str, Any],
    *,
    stats: Mapping[str, Any] | None = None,
    parity: Mapping[str, Any] | None = None,
    repos: Mapping[str, str] | None = None,
    base: str | None = None,
    licences: Sequence[Licence] = (),
) -> str:
    """Return the text of a card with its metadata.

    stats: as in ``stats.json``, None where nothing was compared. repos: where each kind is on the Hub; without it the
    lines that load the model name a folder. base: Hub id of the base, where the recipe names a local folder. licences:
    found elsewhere, for what ``export/licences.py`` does not list.
    """
    recipe = manifest["recipe"]
    repos = repos or {}
    base = base or hub_id(recipe["model"]["id"])
    known = {licence.of: licence for licence in licences}
    of_base = [known.get(one.of, one) if not one.id else one for one in base_licences(base)]
    if of_base[0].is_llama:
        of_base = of_base[:1]
    of_data = data_licence(_shown(recipe["data"]["source"]))
    of_data = known.get(of_data.of, of_data) if not of_data.id else of_data
    metadata = card_metadata(kind, manifest, base, of_base, stats, repos)
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000)
    parts = [
        f"---\n{head}---\n\n# {_name(recipe, repos, kind)}",
        _ABOUT[kind],
        "**Research only, not clinical guidance.** Not for diagnosis, treatment or advice to patients. Made by "
        f"DeepDoctor {manifest['versions']['deepdoctor']}.",
    ]
    if any(licence.is_llama for licence in of_base):
        parts.append("**Built with Llama.**")
    result = stats or manifest.get("compare") or {}
    parts += [
        "## What it was made from\n\n" + "\n".join(_made_from(manifest, base, of_data, result)),
        "## What was measured\n\n" + "\n".join(_measured(result, parity)),
        "## How to load it\n\n" + _loading(kind, base, repos, manifest),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(result)),
        "## Licences\n\n" + "\n".join(_licence_lines(of_base, of_data, base, _name(recipe, repos, kind))),
    ]
    return "\n\n".join(parts) + "\n"


def card_metadata(
    kind: str,
    manifest: Mapping[str, Any],
    base: str | None,
    licences: Sequence[Licence],
    stats: Mapping[str, Any] | None,
    repos: Mapping[str, str],
) -> dict[str, Any]:
    """Return the card's metadata, ``model-index`` with the measured results included."""
    recipe = manifest["recipe"]
    data = recipe["data"]
    values: dict[str, Any] = {"library_name": _LIBRARY[kind], "pipeline_tag": "text-generation"}
    language = str(data["config"] or "").split("_")[0]
    if language in ("en", "zh"):
        values["language"] = [language]
    ids = [licence.id for licence in licences]
    if not all(ids):
        values |= {"license": "other", "license_name": "that-of-the-base-model"}
    elif any(licence.is_llama for licence in licences[1:]):
        values |= {"license": "other", "license_name": "-and-".join(dict.fromkeys(ids))}
    else:
        values["license"] = ids[0]
    if values["license"] == "other" and base:
        values["license_link"] = f"https://huggingface.co/{base}"
    merged = repos.get("merged") if kind in _QUANTISED else None
    if merged or base:
        relation = "adapter" if kind == "adapter" else "quantized" if merged else "finetune"
        values |= {"base_model": merged or base, "base_model_relation": relation}
    if is_hub_id(data["source"]):
        values["datasets"] = [data["source"]]
    values["tags"] = ["deepdoctor", "medical", "reasoning", "lora", *_TAGS.get(kind, ())]
    if results := _results(recipe, stats or manifest.get("compare") or {}):
        values["model-index"] = [{"name": _name(recipe, repos, kind), "results": results}]
    return values


def _name(recipe: Mapping[str, Any], repos: Mapping[str, str], kind: str) -> str:
    return repos[kind].split("/")[-1] if kind in repos else f"{recipe['name']}: {kind}"


def _shown(source: str) -> str:
    """A source without this machine's folders."""
    return source if source.startswith("embedded:") or is_hub_id(source) else Path(source).name


def _results(recipe: Mapping[str, Any], stats: Mapping[str, Any]) -> list[dict[str, Any]]:
    results = []
    for one in stats.get("tasks", []):
        found = one.get("accuracy")
        if found:
            facts = {"base": found["base_mean"], "difference": found["difference"]}
            facts |= {key: found[key] for key in ("ci_low", "ci_high", "p_value", "p_holm") if key in found}
            metric = {
                "type": "accuracy",
                "value": round(found["tuned_mean"], 4),
                "name": "accuracy of the tuned model",
                "args": {"n": one["n"], **_rounded(facts), "verdict": found["verdict"]},
            }
            dataset = {"name": one["task"], "type": _shown(one["task"]).replace(":", "-")}
            results.append({"task": dict(_TASK), "dataset": dataset, "metrics": [metric]})
    loss = (stats.get("loss") or {}).get("all")
    if loss:
        facts = {key: loss[key] for key in ("base", "difference", "ci_low", "ci_high")}
        metric = {
            "type": "loss",
            "value": round(loss["tuned"], 4),
            "name": "held-out loss of the tuned model, nats per token",
            "args": {"n": loss["n_rows"], **_rounded(facts), "verdict": loss["verdict"]},
        }
        source = _shown(recipe["data"]["source"])
        dataset = {"name": f"held-out rows of {source}", "type": source.replace(":", "-")}
        if recipe["data"]["revision"]:
            dataset["revision"] = recipe["data"]["revision"]
        results.append({"task": dict(_TASK), "dataset": dataset, "metrics": [metric]})
    return results


def _rounded(facts: Mapping[str, Any]) -> dict[str, float]:
    return {key: round(value, 6) for key, value in facts.items() if value is not None}


def _made_from(manifest: Mapping[str, Any], base: str | None, of_data: Licence, stats: Mapping[str, Any]) -> list[str]:
    recipe, train, data = manifest["recipe"], manifest.get("train", {}), manifest.get("data", {})
    model, source, settings = recipe["model"], recipe["data"], recipe["train"]
    held = (stats.get("model") or {}).get("precision") or model["precision"]
    embedded = ", its values as in the 4-bit file that DeepDoctor embeds" if model["id"].startswith("embedded:") else ""
    return [
        f"- base model: `{base or 'a local folder'}`{_at(model['revision'])}{embedded}; its licence applies to these "
        "weights",
        f"- rows: `{of_data.of}`{' ' + source['config'] if source['config'] else ''}{_at(source['revision'])}, licence "
        f"{of_data.id or 'not stated'}; {data.get('train')} trained on, {data.get('held_out')} held out, "
        f"{data.get('dropped')} dropped by the check",
        f"- training: {train.get('steps')} steps, {train.get('tokens', 0):,} tokens, LoRA rank "
        f"{settings['lora_rank']}, alpha {settings['lora_alpha']:g}, learning rate {settings['learning_rate']:g}, "
        f"{settings['global_batch_size']} rows a step, base held as {held}, seed {recipe['seed']}",
        f"- loss on: {source['train_on'].replace('_', ' ')}",
        f"- prompt: template `{data.get('template')}`, stored as the tokenizer's chat template",
        f"- content hash of the rows: `{data.get('content_hash')}`",
    ]


def _at(revision: str | None) -> str:
    return f" at `{revision}`" if revision else ""


def _measured(stats: Mapping[str, Any], parity: Mapping[str, Any] | None) -> list[str]:
    rows = []
    for one in stats.get("tasks", []):
        found = one.get("accuracy")
        if found:
            p = found.get("p_holm", found["p_value"])
            rows.append(
                f"| {_shown(one['task'])} | {one['n']} | {found['base_mean']:.1%} | {found['tuned_mean']:.1%} | "
                f"{found['difference']:+.1%} | {found['ci_low']:+.1%} to {found['ci_high']:+.1%} | {p:.2g} | "
                f"**{found['verdict']}** |"
            )
    lines = []
    if rows:
        lines += [
            "Base and tuned model answered the same questions with the same prompt and sampling; the difference is "
            "tuned minus base, with its 95 % interval.",
            "",
            "| task | questions | base | tuned | difference | 95 % interval | p | verdict |",
            "|---|---:|---:|---:|---:|---|---:|---|",
            *rows,
            "",
        ]
    for part, loss in (stats.get("loss") or {}).items():
        if part == "all" and loss.get("ci_low") is not None:
            lines.append(
                f"- held-out loss {loss['base']:.3f} -> {loss['tuned']:.3f} (difference {loss['difference']:+.3f}, "
                f"95 % interval {loss['ci_low']:+.3f} to {loss['ci_high']:+.3f}): {loss['verdict']}"
            )
    overlap = stats.get("overlap")
    if overlap:
        lines.append(
            f"- overlap: {overlap['suspects']} of {overlap['questions']} questions look like one of the "
            f"{overlap['rows']} training rows"
        )
    if not rows:
        lines.insert(0, "- **whether its answers are right was not measured**: no question with a key was asked")
    if parity:
        lines.append(
            f"- merged against base + adapter: logits differ by {parity['logit_difference']:.4f} (root mean square; "
            f"the adapter itself moves them by {parity['adapter_effect']:.2f}), greedy agreement "
            f"{parity['greedy_agreement']:.1%} of {parity['positions']} positions"
        )
    if parity and parity.get("dtype") == "nf4":
        lines.append(f"- in 4 bits {parity['effect_kept']:.1%} of what the adapter changes is kept")
    if parity and "files" in parity:
        lines += _files(parity["files"])
    return lines


def _files(files: Mapping[str, Any]) -> list[str]:
    """A table of GGUF files, each beside base + adapter."""
    lines = [
        "",
        "Each file beside base + adapter as trained, on held-out tokens:",
        "",
        "| file | MB | of the adapter's change kept | KL, nats a token | greedy agreement | the same in llama.cpp |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for one in files.values():
        there = one.get("llama_cpp")
        ran = f"{there['greedy_agreement']:.1%} of {there['tokens']} tokens" if there else "not tried"
        lines.append(
            f"| `{one['file']}` | {one['bytes'] / 1e6:,.0f} | {one['effect_kept']:.1%} | {one['kl']:.4f} | "
            f"{one['greedy_agreement']:.1%} | {ran} |"
        )
    return lines


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def _loading(kind: str, base: str | None, repos: Mapping[str, str], manifest: Mapping[str, Any]) -> str:
    here = repos.get(kind, HERE)
    rank = manifest["recipe"]["train"]["lora_rank"]
    held = next((limit for limit in (16, 32, 64, 128, 256, 512) if limit >= rank), rank)
    ask = (
        f'tokenizer = AutoTokenizer.from_pretrained("{here}")\n'
        'messages = [{"role": "user", "content": "What is the first-line treatment of ...?"}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
        ")\n"
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=1024)[0]))"
    )
    if kind == "adapter":
        peft = (
            "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
            f'model = AutoPeftModelForCausalLM.from_pretrained("{here}")\n{ask}'
        )
        stock = (
            "from transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{base or "PATH_OF_THE_BASE"}")\n'
            f'model.load_adapter("{here}")'
        )
        vllm = (
            f"vllm serve {base or 'PATH_OF_THE_BASE'} --enable-lora --max-lora-rank {held} --lora-modules tuned={here}"
        )
        parts = ["PEFT:", _code("python", peft), "transformers:", _code("python", stock), "vLLM:", _code("sh", vllm)]
    elif kind in ("merged", "merged_4bit"):
        needs = "# pip install bitsandbytes accelerate\n" if kind == "merged_4bit" else ""
        text = needs + (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{here}")\n{ask}'
        )
        parts = ["transformers:", _code("python", text), "vLLM:", _code("sh", f"vllm serve {here}")]
    else:
        parts = []
    ollama = repos.get("gguf", HERE if kind == "gguf" else None)
    if ollama == HERE:
        parts += ["Ollama, in this folder:", _code("sh", "ollama create tuned -f Modelfile && ollama run tuned")]
    elif ollama:
        parts += ["Ollama:", _code("sh", f"ollama run hf.co/{ollama}")]
    else:
        parts.append("Ollama needs a GGUF file, and this run has none on the Hub.")
    return "\n\n".join(parts)


def _limits(stats: Mapping[str, Any]) -> list[str]:
    lines = list(stats.get("limits") or ["Research only, not clinical guidance."])
    lines.append("Reasoning reads well whether or not it is right; a fluent chain of thought is no evidence.")
    return lines


def _licence_lines(of_base: Sequence[Licence], of_data: Licence, base: str | None, name: str) -> list[str]:
    lines = []
    link = f"[see its card](https://huggingface.co/{base})" if base else "see its card"
    for number, licence in enumerate(of_base):
        role = "base model" if number == 0 else "the model it was made from"
        of = f"`{licence.of}`" if licence.id or number == 0 else licence.of
        lines.append(f"- {role}: {of}, {licence.id or f'licence not known here: {link}'}")
    if notice := llama_notice(of_base):
        lines.append(
            '- the Llama licence asks whoever passes on such a model to show "Built with Llama", to begin the '
            'model\'s name with "Llama", and to pass on its text, its use policy and its notice'
            + ("" if name.lower().startswith("llama") else "; this name does not begin so: mend it before it is public")
        )
        lines.append(f"- {notice}")
    lines.append(f"- rows: `{of_data.of}`, {of_data.id or 'licence not stated: add it before this is public'}")
    lines.append("- made with DeepDoctor, Apache-2.0; that says nothing about these weights")
    return lines
