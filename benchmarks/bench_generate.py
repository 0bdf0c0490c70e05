"""Answering beside transformers and Unsloth: same weights, adapter, prompts and number of tokens, greedy, no stop.

    python benchmarks/bench_generate.py [--rows rows.jsonl --tokenizer DIR] [--base DIR] [--peers SITE_DIR]
        [--cases one_stream,...] [--systems deepdoctor,...] [--new-tokens N] [--peer-tokens N] [--rounds N] [--out FILE]

Without --cases: those of the GPU where there is one, else those of the CPU, which need no other argument.
--rows: JSONL with Question, Complex_CoT, Response. --tokenizer: folder with a Llama 3.1 tokenizer.json and
tokenizer_config.json, needed where --base does not exist yet: it is written (random weights in the shape of
DeepSeek-R1-Distill-Llama-8B, 16 GB), and thrown away afterwards where it is not given. --peers: site folder for the
peers, see peers/README.md. --tiny (a CPU suffices) is for trials and keeps no results unless --out is given.

On a GPU one process of a system answers all cases of a number format and setting in the order below, and loads once.
On the CPU every (case, system) has a process of its own, the systems take turns, three rounds, and the median counts.
Processes run one after another, each for --timeout at most; a case that fails leaves its error in the table, and those
before it stay. Prompts are the tutorial's, of the rows nearest to 150 tokens; a repeated row gets a number, so that
none are equal. Peers get the same token ids, padded on the left; --peer-tokens has them write another number of tokens
than ours, where time is short. Prints one table and adds to benchmarks/results/generate_<gpu|cpu>_<date>.json, case by
case as they end: a later command of the same day replaces what it measured again.

Cases
one_stream       8B, NF4, with an adapter of rank 16 on all seven projections and random B; 1,000 tokens
streams64        64 at once; ours answers half of them without the adapter, peers all with it
streams256       256 at once, likewise
bf16_one_stream  8B in bf16 without adapter, as after a merge
cpu_one_stream   the embedded SmolLM2-135M, no adapter, 128 tokens
cpu_streams16    16 at once, 48 tokens

tok/s: new tokens after the last stream's first, over the time from there to the end. With prefill: all new tokens over
the whole call. First token: from the call to the first token of the first stream, model loaded and warm; cold: from
the command, in the first case of a process. Bandwidth: bytes that a step must read (weights as this system holds them,
keys and values of the mean length) times steps per second, over the bytes read and written per second by a large copy.
Same: leading tokens of the first stream that equal ours, of 32. Peaks: PyTorch's allocator on a GPU, resident memory
on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from bench_common import ROOT, copy_rate, device_name, merge_results, result_path, spread, write_results
from bench_generate_ours import answer_all, write_adapter, write_prompts
from bench_inputs import write_base
from bench_train import end_with_children, environment, our_environment, run_child, run_process
from deepdoctor.cpu import lost_share, prepare_cpu

CASES: dict[str, dict[str, Any]] = {
    "one_stream": {"streams": 1, "precision": "nf4", "tuned": True, "new_tokens": 1000},
    "streams64": {"streams": 64, "precision": "nf4", "tuned": True, "new_tokens": 1000},
    "streams256": {"streams": 256, "precision": "nf4", "tuned": True, "new_tokens": 1000},
    "bf16_one_stream": {"streams": 1, "precision": "bf16", "tuned": False, "new_tokens": 1000},
    "cpu_one_stream": {"streams": 1, "precision": "auto", "tuned": False, "new_tokens": 128},
    "cpu_streams16": {"streams": 16, "precision": "auto", "tuned": False, "new_tokens": 48},
}
"""tuned: whether there is an adapter."""
_CPU: list[dict[str, Any]] = [{"precision": "fp32"}, {"precision": "bf16"}]
_GRAPHS: dict[str, Any] = {"environment": {"UNSLOTH_DECODE_CUDA_GRAPHS": "1"}}
"""Unsloth's own switch, off by default: decode steps as CUDA graphs."""
PEERS: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("one_stream", "unsloth"): [{}, _GRAPHS],
    ("one_stream", "transformers"): [{}],
    ("streams64", "unsloth"): [{}, _GRAPHS],
    ("streams64", "transformers"): [{}],
    ("streams256", "unsloth"): [{}],
    ("streams256", "transformers"): [{}],
    ("bf16_one_stream", "unsloth"): [{}, _GRAPHS],
    ("bf16_one_stream", "transformers"): [{}, {"cache": "static"}],
    ("cpu_one_stream", "transformers"): _CPU,
    ("cpu_streams16", "transformers"): _CPU,
}
"""What a peer changes of its case, environment: variables of its process; of several the fastest counts."""
SYSTEMS = ("deepdoctor", "unsloth", "transformers")


@dataclass
class Run:
    """A case of a system in one of its settings, and what each round found.

    changed: what a peer changes of the case. job: settings that the process gets.
    """

    case: str
    system: str
    changed: dict[str, Any]
    job: dict[str, Any]
    results: list[dict[str, Any]] = field(default_factory=list)


def on_cpu(case: str) -> bool:
    """Whether the case is one of the CPU's."""
    return case.startswith("cpu_")


def child(job: dict[str, Any]) -> None:
    """What a process of ours does."""
    task = job["task"]
    result: dict[str, Any] = {"done": True}
    if task == "base":
        write_base(Path(job["base"]), Path(job["tokenizer"]), job["layers"], job["tiny"])
    elif task == "embedded":
        from deepdoctor.model.embedded import embedded_model

        result = {"base": str(embedded_model())}
    elif task == "machine":
        from deepdoctor.run_folder import machine

        result = {"gpu": device_name(), "copy_gb_per_s": copy_rate() / 1e9, "machine": machine()}
    elif task == "prompts":
        result = write_prompts(Path(job["base"]), job["rows"], job["count"], Path(job["prompts"]))
    elif task == "adapter":
        write_adapter(Path(job["base"]), Path(job["adapter"]))
    else:
        return answer_all(job["jobs"])
    print("RESULT", json.dumps(result), flush=True)


def command_of(job: dict[str, Any]) -> list[str]:
    """The command of a process of ours."""
    return [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(job)]


def helper(job: dict[str, Any], work: Path, hidden: dict[str, str]) -> dict[str, Any]:
    """Run one of our own processes that must not fail."""
    result = run_child(command_of(job), our_environment() | hidden, work, 600)
    if "error" in result:
        raise SystemExit(f"{job['task']}: {result['error']}")
    return result


def finish(result: dict[str, Any], job: dict[str, Any], copy_gb_per_s: float) -> dict[str, Any]:
    """Add rates and the share of the bandwidth to what a process returned."""
    if "error" in result:
        return result
    stamps = result.pop("stamps_s")
    streams, tokens, early = job["streams"], result["tokens"], result["early_tokens"]
    # Where a stream waited for another to end, there is no time when all decode.
    together = early <= 2 * streams
    count, seconds = (tokens - early, result["total_s"] - result["prefill_s"]) if together else (tokens, 0.0)
    speed = count / (seconds or result["total_s"])
    found = {
        **result,
        "tokens_per_s": speed,
        "tokens_per_s_with_prefill": tokens / result["total_s"],
        "step_ms_p20_p50_p80": spread([(b - a) * 1000 for a, b in pairwise(stamps[1:])] or [0.0]),
        "copy_gb_per_s": copy_gb_per_s,
    }
    if together:
        cached = result["prompt_tokens"] + streams * job["new_tokens"] / 2
        read = result["weight_bytes"] + result["kv_bytes_per_token"] * cached
        found["share_of_bandwidth"] = read * speed / streams / (copy_gb_per_s * 1e9)
    return found


def of_rounds(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The round of median speed, with the speeds of all; an error where every round failed."""
    passed = [result for result in results if "error" not in result]
    if not passed:
        return results[0]
    speeds = [result["tokens_per_s"] for result in passed]
    middle = next(result for result in passed if result["tokens_per_s"] == statistics.median_low(speeds))
    failed = len(results) - len(passed)
    return {**middle, "tokens_per_s_rounds": speeds} | ({"failed_rounds": failed} if failed else {})


def setting_of(system: str, job: dict[str, Any], changed: dict[str, Any]) -> str:
    """The setting in words."""
    precision = {"nf4": "NF4", "auto": "the CPU's faster format, packed copies"}.get(job["precision"], job["precision"])
    words = [precision, f"{job['streams']} x {job['new_tokens']} tokens"]
    if job["adapter"]:
        mixed = system == "deepdoctor" and job["streams"] > 1
        words.append("half base, half tuned" if mixed else "all tuned")
    words += ["static cache, compiled"] if changed.get("cache") == "static" else []
    return ", ".join([*words, *(f"{name}={value}" for name, value in changed.get("environment", {}).items())])


def runs_of(case: str, place: dict[str, Any], arguments: argparse.Namespace) -> list[Run]:
    """What there is to run of a case. place: base, adapter, prompts, longest."""
    chosen = CASES[case]
    job = {key: place[key] for key in ("base", "prompts")}
    job |= {"streams": chosen["streams"], "new_tokens": arguments.new_tokens or chosen["new_tokens"]}
    job |= {"precision": chosen["precision"], "adapter": place["adapter"] if chosen["tuned"] else None}
    runs = []
    for system in arguments.systems.split(","):
        ours = system == "deepdoctor"
        for changed in [{}] if ours else PEERS.get((case, system), []):
            run = Run(case, system, changed, job | changed)
            if not ours and arguments.peer_tokens:
                run.job["new_tokens"] = arguments.peer_tokens
            run.job["positions"] = place["longest"] + run.job["new_tokens"]
            runs.append(run)
    return runs


def processes(runs: list[Run]) -> list[list[Run]]:
    """The runs that a process does: one on the CPU, on a GPU all of a system, number format, adapter, environment."""
    found: dict[Any, list[Run]] = {}
    for number, run in enumerate(runs):
        environment = tuple(run.changed.get("environment", {}).items())
        key = number if on_cpu(run.case) else (run.system, run.job["precision"], run.job["adapter"], environment)
        found.setdefault(key, []).append(run)
    return [*found.values()]


def run_round(
    runs: list[Run],
    arguments: argparse.Namespace,
    work: Path,
    hidden: dict[str, str],
    copy_gb_per_s: float,
    ended: Callable[[], None],
) -> None:
    """Start a process and have it do its runs. ended: called after each of them, whose results have grown by one."""
    system, jobs = runs[0].system, [run.job for run in runs]
    folder = work / system  # where a peer keeps what it compiles, for all its runs
    folder.mkdir(exist_ok=True)
    busy = {"load_average": os.getloadavg()[0], "lost_share": lost_share(2) if on_cpu(runs[0].case) else None}
    waiting = dict(enumerate(runs))

    def heard(found: dict[str, Any]) -> None:
        run = waiting.pop(found.pop("number"))
        run.results.append({**finish(found, run.job, copy_gb_per_s), **busy})
        said = f"{run.results[-1]['tokens_per_s']:,.1f} tok/s" if "error" not in found else found["error"][-300:]
        print(f"{run.case} {system} {run.job['precision']}: {said}", file=sys.stderr, flush=True)
        ended()

    if system == "deepdoctor":
        command, env = command_of({"task": "answer", "jobs": jobs}), our_environment()
    else:
        script = ROOT / "benchmarks" / "peers" / f"generate_{system}.py"
        command, env = [sys.executable, str(script), json.dumps(jobs)], environment(arguments.peers)
    env = {**env, **hidden, **runs[0].changed.get("environment", {})}
    ending = run_process(command, env, folder, arguments.timeout, heard)
    for number in [*waiting]:
        heard({"number": number, "error": ending})


def entries(runs: list[Run]) -> list[dict[str, Any]]:
    """What the result file says of the runs that have results: an entry for each case and system."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in (run for run in runs if run.results):
        setting = setting_of(run.system, run.job, run.changed)
        entry = {"case": run.case, "system": run.system, "setting": setting, **of_rounds(run.results)}
        found.setdefault((run.case, run.system), []).append(entry)
    listed = []
    for variants in found.values():
        best = max(variants, key=lambda entry: entry.get("tokens_per_s") or 0.0)
        others = [entry for entry in variants if entry is not best]
        listed.append(best | ({"others": others} if others else {}))
    return listed


def ratio(ours: dict[str, Any], peers: list[dict[str, Any]]) -> float | None:
    """Ours over the best peer: the median over rounds where all have as many, else of the medians."""
    peers = [peer for peer in peers if "error" not in peer]
    if not peers:
        return None
    columns = [peer["tokens_per_s_rounds"] for peer in peers]
    rounds = ours["tokens_per_s_rounds"]
    if any(len(column) != len(rounds) for column in columns):
        return ours["tokens_per_s"] / max(peer["tokens_per_s"] for peer in peers)
    return statistics.median(own / max(others) for own, *others in zip(rounds, *columns, strict=True))


def table(cases: list[dict[str, Any]]) -> list[str]:
    """The results as lines of text, ours with its ratio to the best peer of the case."""
    head = ("case", "system", "tok/s", "rounds", "with prefill", "x peer", "bandwidth", "first token s", "cold s")
    head = (*head, "peak GiB", "import s", "load s", "same", "setting")
    rows = [head]
    notes = []
    for entry in (shown for case in cases for shown in (case, *case.get("others", ()))):
        if "error" in entry:
            rows.append((entry["case"], entry["system"], "failed", *[""] * (len(head) - 4), entry["setting"]))
            notes.append(f"{entry['case']} {entry['system']}: {' '.join(entry['error'].split())[-400:]}")
            continue
        ours = next((e for e in cases if e["case"] == entry["case"] and e["system"] == "deepdoctor"), {})
        same_case = [e for e in cases if e["case"] == entry["case"] and e["system"] != "deepdoctor"]
        peers = [peer for e in same_case for peer in (e, *e.get("others", ()))]
        times = ratio(entry, peers) if entry is ours else None
        rounds = entry["tokens_per_s_rounds"]
        wanted = ours.get("ids", [])
        pairs = [*zip(entry["ids"], wanted, strict=False)]
        same = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
        share = entry.get("share_of_bandwidth")
        rows.append(
            (
                entry["case"],
                entry["system"],
                f"{entry['tokens_per_s']:,.1f}",
                f"{min(rounds):,.1f} to {max(rounds):,.1f}" if len(rounds) > 1 else "",
                f"{entry['tokens_per_s_with_prefill']:,.1f}",
                "" if times is None else f"{times:.2f}",
                "" if share is None else f"{share:.0%}",
                f"{entry['first_token_s']:.3f}",
                "" if entry["to_first_token_s"] is None else f"{entry['to_first_token_s']:.1f}",
                f"{entry['peak_gib'] or entry['host_peak_gib']:.2f}",
                f"{entry['import_s']:.1f}",
                f"{entry['load_s']:.1f}",
                "" if entry is ours or not wanted else str(same),
                entry["setting"],
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [*lines, *notes]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="JSONL of rows whose questions are asked; the CPU's default is embedded:rows")
    parser.add_argument("--tokenizer", help="folder with tokenizer.json and tokenizer_config.json")
    parser.add_argument("--base", type=Path, help="model folder of the GPU cases; written where it does not exist")
    parser.add_argument("--peers", help="site folder with the peers' packages")
    parser.add_argument("--cases", help="default: those of the GPU where there is one, else those of the CPU")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--new-tokens", type=int, help="default: 1000; on the CPU 128 for one stream, 48 for 16")
    parser.add_argument("--peer-tokens", type=int, help="tokens that peers write; default: as many as ours")
    parser.add_argument("--rounds", type=int, help="default: 1; on the CPU 3")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a child may take")
    parser.add_argument("--layers", type=int, help="write a base with fewer layers")
    parser.add_argument("--tiny", action="store_true", help="write a base that a CPU answers from in seconds")
    parser.add_argument("--out", help="result file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set((arguments.cases or "one_stream").split(",")) - set(CASES)
    unknown |= set(arguments.systems.split(",")) - set(SYSTEMS)
    if unknown:
        parser.error(
            f"unknown: {', '.join(sorted(unknown))}; cases are {', '.join(CASES)}, systems {', '.join(SYSTEMS)}"
        )
    for name in ("tokenizer", "base", "peers", "rows"):
        value = getattr(arguments, name)
        if value and not str(value).startswith("embedded:"):
            setattr(arguments, name, type(value)(Path(value).resolve()))
    return arguments


def main() -> None:
    """Parse, write what is missing, run the children, print the table, write the file whenever a case ends."""
    arguments = parse()
    if arguments.child:
        return child(json.loads(arguments.child))
    end_with_children()
    prepare_cpu(lambda line: print(line, file=sys.stderr))
    work = Path(tempfile.mkdtemp(prefix="bench_generate_"))
    try:
        if arguments.cases:
            chosen = [case for case in CASES if case in arguments.cases.split(",")]
        else:
            gpu = helper({"task": "machine"}, work, {})["gpu"] != "cpu"
            chosen = [case for case in CASES if on_cpu(case) != gpu]
        for cpu in (False, True):
            if cases := [case for case in chosen if on_cpu(case) == cpu]:
                measure(cases, cpu, arguments, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def measure(cases: list[str], cpu: bool, arguments: argparse.Namespace, work: Path) -> None:
    """Run the cases of one device."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if cpu else {}
    machine = helper({"task": "machine"}, work, hidden)
    gpu, rate = machine["gpu"], machine["copy_gb_per_s"]
    print(f"{gpu}: {rate:,.1f} GB/s read and written in a copy", file=sys.stderr, flush=True)
    if gpu == "cpu" and not cpu and not arguments.tiny:
        raise SystemExit(f"{', '.join(cases)}: there is no GPU; --tiny tries them on a CPU")
    base = place_base(cpu, arguments, work)
    place: dict[str, Any] = {"base": str(base), "adapter": str(work / "adapter")}
    place["prompts"] = str(work / f"prompts_{'cpu' if cpu else 'gpu'}.json")
    rows = arguments.rows or "embedded:rows"
    count = max(CASES[case]["streams"] for case in cases)
    job = {"task": "prompts", "base": str(base), "rows": rows, "count": count, "prompts": place["prompts"]}
    lengths = helper(job, work, hidden)
    place["longest"] = lengths["longest"]
    if any(CASES[case]["tuned"] for case in cases):
        helper({"task": "adapter", "base": str(base), "adapter": place["adapter"]}, work, hidden)
    out = arguments.out or (str(work / "tiny.json") if arguments.tiny else None)
    path = Path(out) if out else result_path("generate", gpu)
    shape = {"layers": arguments.layers, "tiny": arguments.tiny} if not cpu else {}
    head = {"copy_gb_per_s": rate, "machine": machine["machine"], "spins": os.environ.get("GOMP_SPINCOUNT"), **shape}
    head |= {"rows": Path(rows).name, "prompt_tokens": [lengths["shortest"], lengths["longest"]]}
    runs = {case: runs_of(case, place, arguments) for case in cases}
    merged: list[dict[str, Any]] = []

    def ended() -> None:
        merged[:] = merge_results(path, gpu, entries([*chain(*runs.values())]), ("case", "system"))
        write_results("generate", gpu, str(path), {**head, "cases": merged})

    # On the CPU the rounds of a case follow one another.
    for batch in [*runs.values()] if cpu else [[*chain(*runs.values())]]:
        for _ in range(arguments.rounds or (3 if cpu else 1)):
            for process in processes(batch):
                run_round(process, arguments, work, hidden, rate, ended)
    print("\n".join(table(merged)))
    print(path)


def place_base(cpu: bool, arguments: argparse.Namespace, work: Path) -> Path:
    """The model folder; written where it is missing."""
    if cpu:
        return Path(helper({"task": "embedded"}, work, {"CUDA_VISIBLE_DEVICES": ""})["base"])
    base = arguments.base or work / "base"
    if not (base / "config.json").exists():
        if not arguments.tokenizer:
            raise SystemExit(f"{base} is no model folder; --tokenizer is needed to write one there")
        shape = {"layers": arguments.layers, "tiny": arguments.tiny, "tokenizer": arguments.tokenizer}
        written = helper({"task": "base", "base": str(base), **shape}, work, {})
        print(f"base: {base} written in {written['wall_s']:.0f} s", file=sys.stderr, flush=True)
    return base


if __name__ == "__main__":
    main()
