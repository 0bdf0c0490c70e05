"""Real rows through the command line: the settings of demo.yaml on medical-o1 rows, and the two its makers removed."""

import json
from pathlib import Path

import pytest

from helpers_run import PROJECT, call

DEMO = PROJECT / "recipes" / "demo.yaml"


def test_real_rows_pass_the_data_stage(
    capsys: pytest.CaptureFixture[str], shared_data: Path, smollm2: Path, tmp_path: Path
) -> None:
    """198 real rows are checked, split and encoded; what is dropped is named, what is kept is whole."""
    source = shared_data / "medical-o1-sft-sample.jsonl"
    count = len([line for line in source.read_text(encoding="utf-8").split("\n") if line])
    flags = ("--data.source", source, "--runs_dir", tmp_path, "--rows", "1", "--json")
    outcome = call(capsys, "data", DEMO, *flags)
    assert outcome.code == 0, outcome.err
    check = json.loads(outcome.out)
    assert check["source"] == str(source)
    assert check["rows_read"] == count
    assert check["rows_kept"] >= 0.8 * count
    assert check["rows_kept"] + check["rows_dropped"] == count
    dropped = [finding for finding in check["findings"] if finding["action"] == "dropped"]
    assert len(dropped) == check["rows_dropped"]
    assert all(finding["place"].startswith(f"{source}:") and finding["detail"] for finding in dropped)
    assert check["tokens"]["row"]["max"] <= check["max_seq_len"] == 1024
    summary = json.loads((tmp_path / "demo" / "data" / "summary.json").read_text())
    assert (summary["train"] + summary["held_out"], summary["held_out"]) == (check["rows_kept"], 16)
    assert "trained" in outcome.err


def test_rows_their_makers_removed_are_both_flagged(
    capsys: pytest.CaptureFixture[str], shared_data: Path, smollm2: Path
) -> None:
    """Two rows were taken out of the data set for a picture nobody has: both are shown with place and reason."""
    source = shared_data / "medical-o1-sft-upstream-removed.jsonl"
    outcome = call(capsys, "data", source)
    assert (outcome.code, outcome.out) == (1, "")
    assert "none of the 2 rows" in outcome.err
    for line in (1, 2):
        flagged = [text for text in outcome.err.split("\n") if text.strip().startswith(f"{source}:{line}: ")]
        assert len(flagged) == 1, outcome.err
        assert "missing_image: question: '" in flagged[0]
    assert "--data.missing_image keep" in outcome.err
    kept = call(capsys, "data", source, "--data.missing_image", "keep", "--data.max_seq_len", "4096", "--json")
    assert kept.code == 0, kept.err
    found = json.loads(kept.out)
    assert found["rows_kept"] == 2
    assert {(f["place"], f["code"], f["action"]) for f in found["findings"]} >= {
        (f"{source}:{line}", "missing_image", "kept") for line in (1, 2)
    }
