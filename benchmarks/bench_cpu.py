"""Training and generation on the CPU beside transformers + PEFT: same model, rows, adapter shape and steps.

    python benchmarks/bench_cpu.py [--rounds 3] [--rows FILE.jsonl] [--only train,generate]

Every system runs in a process of its own, one after another, and the round is repeated, so that a busy moment of the
host falls on all of them. Prints tokens per second (median and range over rounds), the ratio to the best of
transformers + PEFT taken round by round, and peak memory; writes benchmarks/results/cpu_<date>.json.

Training counts real tokens of steps of two rows (forward, backward, AdamW), the first step left out. Generation counts
new tokens, prompt and preparation included: one stream of 128 new tokens, 16 streams of 48.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS = 4
SYSTEMS = {
    "train": ("deepdoctor", "hf_bf16", "hf_bf16_autocast", "hf_fp32"),
    "generate": ("deepdoctor", "hf_bf16", "hf_fp32"),
}


def rows(path: str | None) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of the benchmark's rows, by our own prompt object, for every system alike."""
    from deepdoctor.data.prompt import Prompt
    from deepdoctor.data.sources import load_rows
    from deepdoctor.model.embedded import embedded_model
    from deepdoctor.model.load import load_tokenizer
    from deepdoctor.recipe import DataSection

    prompt = Prompt(load_tokenizer(embedded_model()))
    found = load_rows(DataSection(source=path or "embedded:rows"))[: 2 * (STEPS + 1)]
    return [(encoded.input_ids, encoded.labels) for encoded in map(prompt.encode_row, found)]


def train_deepdoctor(data: list) -> tuple[float, int]:
    """Time our loop's step."""
    import torch

    from deepdoctor.data.prompt import EncodedRow
    from deepdoctor.model.adapter import Adapter, LoraSettings
    from deepdoctor.model.embedded import embedded_model
    from deepdoctor.model.load import load_decoder
    from deepdoctor.recipe import TrainSection
    from deepdoctor.train.loop import train

    decoder = load_decoder(embedded_model(), "auto")
    adapter = Adapter(decoder.config, LoraSettings(alpha=32), 0)
    encoded = [EncodedRow(ids, labels, (0, 0), (0, 0)) for ids, labels in data]
    section = TrainSection(global_batch_size=2, max_steps=STEPS + 1, save_steps=0, shuffle=False, learning_rate=1e-3)
    folder = Path(os.environ["BENCH_SCRATCH"])
    result = train(decoder, adapter, encoded, section, seed=0, folder=folder, token_budget=1024)
    timed = result.metrics[1:]
    print("loss", [round(m["loss"], 3) for m in result.metrics], torch.get_num_threads(), file=sys.stderr)
    return sum(m["step_ms"] for m in timed) / 1000, sum(m["tokens"] for m in timed)


def train_hf(data: list, kind: str) -> tuple[float, int]:
    """Time a plain loop over transformers + PEFT, right-padded, without attention mask, as fast as it gets there."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from deepdoctor.model.embedded import embedded_model

    dtype = torch.float32 if kind == "hf_fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=dtype)
    model = get_peft_model(
        model,
        LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        autocast_adapter_dtype=kind != "hf_bf16",
    )
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    seconds, tokens = 0.0, 0
    losses = []
    for step in range(STEPS + 1):
        pair = data[2 * step : 2 * step + 2]
        longest = max(len(ids) for ids, _ in pair)
        input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in pair])
        labels = torch.tensor([wanted + [-100] * (longest - len(wanted)) for _, wanted in pair])
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "hf_bf16_autocast"):
            loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(float(loss), 3))
        if step:
            seconds += time.perf_counter() - started
            tokens += sum(len(ids) for ids, _ in pair)
    print("loss", losses, file=sys.stderr)
    return seconds, tokens


def generate_deepdoctor(data: list) -> dict[str, float]:
    """Time our generator, greedy."""
    from deepdoctor.model.embedded import embedded_model
    from deepdoctor.model.generate import Generator, Request
    from deepdoctor.model.load import load_decoder
    from deepdoctor.model.sampling import Sampling

    decoder = load_decoder(embedded_model(), "auto")
    speeds = {}
    for streams, new in ((1, 128), (16, 48)):
        for count in (4, new):
            generator = Generator(decoder, None, (), streams, reduced=True)
            prompt = data[0][0][:64]
            requests = [Request(prompt, Sampling(max_new_tokens=count)) for _ in range(streams)]
            started = time.perf_counter()
            written = sum(len(completion.ids) for completion in generator.run(requests))
            seconds = time.perf_counter() - started
        speeds[str(streams)] = written / seconds
    return speeds


def generate_hf(data: list, kind: str) -> dict[str, float]:
    """Time transformers.generate, greedy."""
    import torch
    from transformers import AutoModelForCausalLM

    from deepdoctor.model.embedded import embedded_model

    dtype = torch.float32 if kind == "hf_fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=dtype).eval()
    speeds = {}
    for streams, new in ((1, 128), (16, 48)):
        input_ids = torch.tensor([data[0][0][:64]] * streams)
        for count in (4, new):
            started = time.perf_counter()
            model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
            seconds = time.perf_counter() - started
        speeds[str(streams)] = streams * new / seconds
    return speeds


def one(case: str, system: str, path: str | None) -> None:
    """Run one system in this process and print its figures as JSON."""
    import resource

    data = rows(path)
    result: dict = {}
    if case == "train":
        seconds, tokens = train_deepdoctor(data) if system == "deepdoctor" else train_hf(data, system)
        result["tokens_per_s"] = tokens / seconds
    else:
        result["streams"] = generate_deepdoctor(data) if system == "deepdoctor" else generate_hf(data, system)
    result["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(result))


def launch(case: str, system: str, path: str | None, scratch: str) -> dict:
    """Run one system in a process of its own, with the thread settings the command line would choose."""
    command = [sys.executable, __file__, "--one", f"{case}:{system}", *(["--rows", path] if path else [])]
    env = {**os.environ, "BENCH_SCRATCH": scratch, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(f"{case} {system} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Parse, run the rounds, print the table, write the file."""
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows")
    parser.add_argument("--only", default="train,generate")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return one(*arguments.one.split(":"), arguments.rows)

    from deepdoctor.cpu import prepare_cpu

    prepare_cpu(print)
    found: dict[str, dict[str, list[dict]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(arguments.rounds):
            for case in arguments.only.split(","):
                for system in SYSTEMS[case]:
                    result = launch(case, system, arguments.rows, scratch)
                    found.setdefault(case, {}).setdefault(system, []).append(result)
                    print(f"round {number + 1} {case} {system}: {json.dumps(result)}", file=sys.stderr, flush=True)
    cases = [entry for case, systems in found.items() for entry in table(case, systems)]
    for entry in cases:
        low, high = min(entry["samples"]), max(entry["samples"])
        ratio = f"  x{entry['ratio_to_best_hf']:.2f} of the best below" if "ratio_to_best_hf" in entry else ""
        print(
            f"{entry['case']:>12} {entry['system']:<18} {entry['tokens_per_s']:8.1f} tok/s ({low:.1f} to {high:.1f})  "
            f"{entry['peak_gib']:.2f} GiB{ratio}"
        )
    write(cases)


def table(case: str, systems: dict[str, list[dict]]) -> list[dict]:
    """One entry per measurement and system; the ratio is the median over rounds of ours to that round's best other."""
    entries = []
    kinds = ("train",) if case == "train" else ("1", "16")
    for kind in kinds:
        samples = {
            name: [r["tokens_per_s"] if case == "train" else r["streams"][kind] for r in results]
            for name, results in systems.items()
        }
        for name, values in samples.items():
            entry = {
                "case": "train" if case == "train" else f"cpu_streams{kind}",
                "system": name,
                "tokens_per_s": statistics.median(values),
                "samples": values,
                "peak_gib": max(r["peak_gib"] for r in systems[name]),
            }
            others = [v for other, v in samples.items() if other != "deepdoctor"]
            if name == "deepdoctor" and others:
                best = [max(column) for column in zip(*others, strict=True)]
                entry["ratio_to_best_hf"] = statistics.median(a / b for a, b in zip(values, best, strict=True))
            entries.append(entry)
    return entries


def write(cases: list[dict]) -> None:
    """Write the results with date, commit, versions and machine."""
    from deepdoctor.run_folder import machine, versions

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        text = info.read()
    flags = sorted({f for f in text.split() if f.startswith(("amx", "avx512_bf16", "avx512f", "avx2"))})
    result = {
        "what": "cpu",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "machine": {**machine(), "flags": flags},
        "versions": versions(),
        "spins": os.environ.get("GOMP_SPINCOUNT"),
        "cases": cases,
    }
    path = ROOT / "benchmarks" / "results" / f"cpu_{time.strftime('%Y-%m-%d')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
