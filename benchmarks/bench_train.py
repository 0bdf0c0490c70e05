"""Training on one GPU beside Unsloth and TRL: same weights, rows in the same order, LoRA shape, optimizer and steps.

    python benchmarks/bench_train.py --rows rows.jsonl --tokenizer DIR [--base DIR] [--peers SITE_DIR]
        [--cases fastest,tutorial_capped,...] [--systems deepdoctor,unsloth,trl] [--steps 15] [--skip 5] [--out FILE]

--rows: JSONL with Question, Complex_CoT, Response. --tokenizer: folder with a Llama 3.1 tokenizer.json and
tokenizer_config.json. --base: model folder; written there (random weights in the shape of DeepSeek-R1-Distill-Llama-8B,
16 GB) where it does not exist, and thrown away afterwards where it is not given. --peers: site folder for the peers,
see peers/README.md. --layers N and --tiny (a CPU suffices) are for trials.

Every (case, system) runs in a process of its own, one after another; one that fails leaves its error in the table.
Prints one table and adds to benchmarks/results/train_<gpu>_<date>.json: a later command of the same day replaces what
it measured again, so the cases may be spread over several commands.

Cases
fastest          any plan, NF4 values; peers: the fastest settings found, the better counts
tutorial_capped  the tutorial's step of 8 rows within 6.4 GiB, what Unsloth takes; peers: the tutorial's own 2 x 4
cap15            within 15 GiB
fp8              base products in fp8
least_memory     8 rows of 2,048 tokens a step within 5.0 GiB
longest_row      one row of --longest tokens a step
load             load and quantise the base from local bf16 shards
first_step       from the command to the end of the first step, caches warm: ours is `deepdoctor run`, the second time

Tokens are real tokens, padding not counted. Tokens per second: those of the steps after --skip over their seconds, and
the 20th, 50th and 80th percentile of the single steps. Peaks: PyTorch's allocator, over the steps that count and over
the whole run. Share of matmul: tokens/s x FLOP per token without recompute over the rate of an 8192^3 bf16 product.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_common import ROOT, device_name, matmul_rate, merge_results, result_path, spread, write_results
from bench_inputs import flop_per_token, write_base, write_long_rows, write_rows

OURS: dict[str, dict[str, Any]] = {
    "fastest": {"precision": "nf4", "attention": "fa4"},
    "tutorial_capped": {"precision": "nf4", "memory_mib": 6.4 * 1024},
    "cap15": {"precision": "nf4", "attention": "fa4", "memory_mib": 15 * 1024},
    "fp8": {"precision": "fp8", "attention": "fa4"},
    "least_memory": {"precision": "nf4", "memory_mib": 5.0 * 1024, "row_tokens": 2048},
    "longest_row": {
        "precision": "nf4",
        "attention": "fa4",
        "global_batch_size": 1,
        "row_tokens": "longest",
        "steps": 1,
        "skip": 0,
    },
    "load": {"precision": "nf4"},
    "first_step": {"precision": "nf4"},
}
"""Settings of ours by case, see bench_train_ours.py."""
_UNSLOTH = {"bits": 4, "checkpointing": "unsloth", "batch": 2, "accumulate": 4}
_FREE = {**_UNSLOTH, "checkpointing": "none", "batch": 8, "accumulate": 1}
PEERS: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("fastest", "unsloth"): [{**_FREE, "bits": 16}],
    ("tutorial_capped", "unsloth"): [_UNSLOTH],
    ("tutorial_capped", "trl"): [{**_UNSLOTH, "checkpointing": "hf"}],
    ("first_step", "unsloth"): [{**_UNSLOTH, "steps": 1, "skip": 0}],
    ("first_step", "trl"): [{**_UNSLOTH, "checkpointing": "hf", "steps": 1, "skip": 0}],
}
SYSTEMS = ("deepdoctor", "unsloth", "trl")
AS_FAST_AS = {"fp8": "fastest"}
"""The case whose peers a case without peers of its own is compared with."""


def end_with_children() -> None:
    """Have SIGTERM end this process as Ctrl-C does, so that no child goes on."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)


def run_process(
    command: list[str], env: dict[str, str], cwd: Path, timeout_s: float, heard: Callable[[dict[str, Any]], None]
) -> str:
    """Run a process group and return the end of what it said beside its results, and how it ended.

    heard: called with what each RESULT line holds, as soon as it comes.
    """
    child = subprocess.Popen(
        command,
        env={**env, "BENCH_STARTED": repr(time.time())},
        cwd=cwd,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert child.stdout is not None
    late = threading.Event()

    def stop() -> None:
        late.set()
        os.killpg(child.pid, signal.SIGKILL)

    timer = threading.Timer(timeout_s, stop)
    timer.daemon = True
    timer.start()
    said = []
    try:
        for line in child.stdout:
            # A line without its end was cut off with the process.
            if line.startswith("RESULT ") and line.endswith("\n"):
                heard(json.loads(line.removeprefix("RESULT ")))
            else:
                said.append(line)
        child.wait()
    except BaseException:
        # A child that goes on would slow down whatever is measured next.
        os.killpg(child.pid, signal.SIGKILL)
        raise
    finally:
        timer.cancel()
    ending = f"stopped after {timeout_s:.0f} s" if late.is_set() else f"exit code {child.returncode}"
    return f"{''.join(said)[-3000:]}\n{ending}".strip()


def run_child(command: list[str], env: dict[str, str], cwd: Path, timeout_s: float) -> dict[str, Any]:
    """Run a process group and return what its last RESULT line holds, or {"error": ...}."""
    started = time.perf_counter()
    results: list[dict[str, Any]] = []
    ending = run_process(command, env, cwd, timeout_s, results.append)
    if results:
        return {**results[-1], "wall_s": time.perf_counter() - started}
    return {"error": ending}


def environment(peers: str | None) -> dict[str, str]:
    """Environment of a child. peers: site folder that goes in front of the path, and nothing of ours with it."""
    inherited = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    # tests/ has folders named data, kernels and train, which other libraries would take for packages.
    outside = [entry for entry in inherited if not Path(entry).resolve().is_relative_to(ROOT)]
    first = [peers] if peers else []
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join([*first, *outside])}


def our_environment() -> dict[str, str]:
    """Environment of a child of ours: this checkout, whatever is installed."""
    env = environment(None)
    return {
        **env,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *filter(None, [env["PYTHONPATH"]])]),
    }


def run_ours(case: str, arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One case of ours, in a process of its own."""
    settings = {"skip": arguments.skip, **OURS[case], **json.loads(arguments.ours)}
    steps = min(settings.pop("steps", arguments.steps), arguments.steps)
    rows = work / "rows.jsonl"
    tokens = settings.pop("row_tokens", None)
    tokens = arguments.longest if tokens == "longest" else tokens
    if tokens:
        count = settings.get("global_batch_size", 8)
        rows = work / f"rows_{tokens}_{count}.jsonl"
        if not rows.exists():
            write_long_rows(Path(arguments.rows), rows, Path(arguments.tokenizer), tokens, count)
        settings["max_seq_len"] = tokens
    job = {"case": case, "base": str(arguments.base), "rows": str(rows), "tokenizer": arguments.tokenizer}
    job = {**job, "settings": settings, "steps": steps}
    rounds = 2 if case == "first_step" else 1
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(job)]
    for _ in range(rounds):
        result = run_child(command, our_environment(), work, arguments.timeout)
    return {"setting": json.dumps(settings), **finish(result, settings["skip"])}


def run_peer(case: str, system: str, arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One case of a peer: each of its settings in a process of its own; the fastest counts, the others stay listed."""
    folder = work / system  # where Unsloth keeps what it compiles, for all its runs
    folder.mkdir(exist_ok=True)
    script = ROOT / "benchmarks" / "peers" / f"train_{system}.py"
    results = []
    for chosen in PEERS[case, system]:
        settings = {"steps": arguments.steps, "skip": arguments.skip, **chosen}
        settings["steps"] = min(settings["steps"], arguments.steps)
        settings |= {"base": str(arguments.base), "rows": str(work / "rows.jsonl")}
        command = [sys.executable, str(script), json.dumps(settings)]
        result = run_child(command, environment(arguments.peers), folder, arguments.timeout)
        precision = "NF4" if chosen["bits"] == 4 else "bf16"
        name = f"{precision}, {chosen['batch']} x {chosen['accumulate']}, checkpointing {chosen['checkpointing']}"
        results.append({"setting": name, **finish(result, settings["skip"])})
    best = max(results, key=lambda result: result.get("tokens_per_s") or 0.0)
    others = [result for result in results if result is not best]
    return {**best, "others": others} if others else best


def finish(result: dict[str, Any], skip: int) -> dict[str, Any]:
    """Add the rates of the steps that count."""
    if "step_s" not in result:
        return result
    seconds, tokens = result["step_s"][skip:], result["tokens"][skip : len(result["step_s"])]
    if not seconds:
        return {**result, "seconds": sum(result["step_s"])}
    rates = [count / second for count, second in zip(tokens, seconds, strict=True)]
    return {
        **result,
        "seconds": sum(seconds),
        "tokens_per_s": sum(tokens) / sum(seconds),
        "tokens_per_s_p20_p50_p80": spread(rates),
        "tokens_per_s_steps": rates,
    }


def first_step(job: dict[str, Any]) -> dict[str, Any]:
    """Start `deepdoctor run` on a recipe and wait for the first line of its metrics; then stop it."""
    from bench_train_ours import recipe_values
    from deepdoctor.recipe import Recipe

    with tempfile.TemporaryDirectory() as scratch:
        values = recipe_values(
            Path(job["base"]), Path(job["rows"]), job["settings"], max(job["steps"], 5), Path(scratch) / "runs"
        )
        recipe = Path(scratch) / "bench.yaml"
        recipe.write_text(Recipe.model_validate(values).to_yaml(), encoding="utf-8")
        metrics = Path(scratch) / "runs" / "bench" / "train" / "metrics.jsonl"
        command = [sys.executable, "-m", "deepdoctor.cli", "run", str(recipe)]
        started = time.perf_counter()
        with open(Path(scratch) / "log", "w+b") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                while child.poll() is None and not (metrics.exists() and metrics.stat().st_size):
                    time.sleep(0.01)
                seconds = time.perf_counter() - started
                reached = metrics.exists() and metrics.stat().st_size > 0
            finally:
                child.kill()
                child.wait()
            log.seek(0)
            said = log.read().decode(errors="replace")
        if not reached:
            raise SystemExit(said[-2500:])
    return {"to_first_step_s": seconds, "log": said[-1500:]}


def child(job: dict[str, Any]) -> None:
    """What a process of ours does."""
    case = job["case"]
    if case == "base":
        write_base(Path(job["base"]), Path(job["tokenizer"]), job["layers"], job["tiny"])
        result: dict[str, Any] = {"written": True}
    elif case == "machine":
        side = 8192 if job["gpu"] else 512
        result = {"gpu": device_name(), "matmul_tflops": matmul_rate(side) / 1e12}
    elif case == "first_step":
        result = first_step(job)
    else:
        from bench_train_ours import load_case, train_case

        base, settings = Path(job["base"]), job["settings"]
        if case == "load":
            result = load_case(base, settings)
        else:
            result = train_case(base, Path(job["rows"]), Path(job["tokenizer"]), settings, job["steps"])
    print("RESULT", json.dumps(result), flush=True)


def helper(job: dict[str, Any], work: Path, timeout_s: float = 600) -> dict[str, Any]:
    """Run one of our own processes that must not fail. The GPU is free again when it ends."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(job)]
    result = run_child(command, our_environment(), work, timeout_s)
    if "error" in result:
        raise SystemExit(f"{job['case']}: {result['error']}")
    return result


def table(cases: list[dict[str, Any]]) -> list[str]:
    """The results as lines of text, each with its ratio to the best peer of its case."""
    best: dict[str, float] = {}
    for entry in cases:
        if entry["system"] != "deepdoctor":
            best[entry["case"]] = max(best.get(entry["case"], 0.0), entry.get("tokens_per_s") or 0.0)
    head = ("case", "system", "tok/s", "p20 to p80", "x peer", "peak GiB", "run", "reserved", "predicted")
    head = (*head, "matmul", "import s", "load s", "1st step s")
    rows = [head]
    notes = []
    for entry in cases:
        if "error" in entry:
            rows.append((entry["case"], entry["system"], "failed", *[""] * (len(head) - 3)))
            notes.append(f"{entry['case']} {entry['system']}: {' '.join(entry['error'].split())[-400:]}")
            continue
        speed = entry.get("tokens_per_s")
        low, _, high = entry.get("tokens_per_s_p20_p50_p80") or (None, None, None)
        peer = best.get(AS_FAST_AS.get(entry["case"], entry["case"]))
        ours = entry["system"] == "deepdoctor"
        rows.append(
            (
                entry["case"],
                entry["system"],
                _number(speed, ",.0f"),
                f"{low:,.0f} to {high:,.0f}" if low and high else "",
                _number(speed / peer if ours and speed and peer else None, ".2f"),
                *(_number(entry.get(f"{name}_gib"), ".2f") for name in ("peak", "peak_run", "reserved")),
                _number(entry.get("predicted_peak_gib"), ".2f"),
                _number(entry.get("share_of_matmul"), ".0%"),
                *(_number(entry.get(name), ".1f") for name in ("import_s", "load_s", "to_first_step_s")),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [*lines, *notes]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="JSONL of training rows")
    parser.add_argument("--tokenizer", help="folder with tokenizer.json and tokenizer_config.json")
    parser.add_argument("--base", type=Path, help="model folder; written where it does not exist")
    parser.add_argument("--peers", help="site folder with the peers' packages")
    parser.add_argument("--cases", default=",".join(OURS))
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--skip", type=int, default=5, help="steps that do not count")
    parser.add_argument("--timeout", type=float, default=300, help="seconds a child may take")
    parser.add_argument("--longest", type=int, default=352_000, help="tokens of the row of longest_row")
    parser.add_argument("--layers", type=int, help="write a base with fewer layers")
    parser.add_argument("--tiny", action="store_true", help="write a base that a CPU trains in seconds")
    parser.add_argument("--ours", default="{}", help="JSON of settings of ours that override those of every case")
    parser.add_argument("--out", help="result file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.child and not (arguments.rows and arguments.tokenizer):
        parser.error("--rows and --tokenizer are needed")
    unknown = set(arguments.cases.split(",")) - set(OURS) | set(arguments.systems.split(",")) - set(SYSTEMS)
    if unknown:
        parser.error(
            f"unknown: {', '.join(sorted(unknown))}; cases are {', '.join(OURS)}, systems {', '.join(SYSTEMS)}"
        )
    for name in ("rows", "tokenizer", "base", "peers"):
        if getattr(arguments, name):
            setattr(arguments, name, type(getattr(arguments, name))(Path(getattr(arguments, name)).resolve()))
    return arguments


def main() -> None:
    """Parse, write what is missing, run the children, print the table, write the file after each of them."""
    arguments = parse()
    if arguments.child:
        return child(json.loads(arguments.child))
    end_with_children()
    work = Path(tempfile.mkdtemp(prefix="bench_train_"))
    try:
        measure(arguments, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def measure(arguments: argparse.Namespace, work: Path) -> None:
    """Run every (case, system) that there is."""
    arguments.base = arguments.base or work / "base"
    if not (arguments.base / "config.json").exists():
        shape = {"layers": arguments.layers, "tiny": arguments.tiny, "tokenizer": arguments.tokenizer}
        written = helper({"case": "base", "base": str(arguments.base), **shape}, work)
        print(f"base: {arguments.base} written in {written['wall_s']:.0f} s", file=sys.stderr, flush=True)
    machine = helper({"case": "machine", "gpu": not arguments.tiny}, work)
    gpu, rate = machine["gpu"], machine["matmul_tflops"]
    print(f"{gpu}: {rate:,.1f} TFLOP/s in a bf16 product", file=sys.stderr, flush=True)
    rows = write_rows(Path(arguments.rows), work / "rows.jsonl", 8)
    flop = flop_per_token(arguments.base)
    cases: list[dict[str, Any]] = []
    merged: list[dict[str, Any]] = []
    for case in arguments.cases.split(","):
        for system in arguments.systems.split(","):
            if system != "deepdoctor" and (case, system) not in PEERS:
                continue
            found = (
                run_ours(case, arguments, work) if system == "deepdoctor" else run_peer(case, system, arguments, work)
            )
            if found.get("tokens_per_s"):
                found["share_of_matmul"] = found["tokens_per_s"] * flop / (rate * 1e12)
            found["matmul_tflops"] = rate
            cases.append({"case": case, "system": system, **found})
            print(table(cases[-1:])[-1], file=sys.stderr, flush=True)
            path = Path(arguments.out) if arguments.out else result_path("train", gpu)
            merged = merge_results(path, gpu, cases, ("case", "system"))
            shape = {"layers": arguments.layers, "tiny": arguments.tiny}
            values = {"matmul_tflops": rate, "flop_per_token": flop, "rows": rows, **shape, "cases": merged}
            write_results("train", gpu, str(path), values)
    print("\n".join(table(merged)))
    if cases:
        print(path)


if __name__ == "__main__":
    main()
