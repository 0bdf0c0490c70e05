"""doctor: the checks describe this machine, and what would stop a run is bad and has a remedy."""

import shutil
import sys
from collections import namedtuple

import pytest

from deepdoctor.doctor import check_machine


def by_name() -> dict[str, dict]:
    """The checks by name; each has the four keys and, where something is wrong, a remedy."""
    checks = check_machine()
    assert len({check["name"] for check in checks}) == len(checks)
    for check in checks:
        assert check.keys() == {"name", "state", "found", "remedy"}
        assert check["state"] in ("ok", "note", "bad")
        assert check["found"]
        assert check["remedy"] or check["state"] != "bad"
    return {check["name"]: check for check in checks}


def test_checks_describe_this_machine() -> None:
    """Python and torch are named with the versions that run this test."""
    import torch

    checks = by_name()
    assert checks["python"]["found"] == ".".join(map(str, sys.version_info[:3]))
    assert checks["torch"]["found"].startswith(torch.__version__)
    assert "GiB" in checks["memory"]["found"]
    assert (checks["gpu"]["state"] == "ok") == torch.cuda.is_available()


def test_full_disk_and_old_torch_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little disk and a torch that is too old stop a run, and are said to."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 100, 2**28))
    monkeypatch.setattr("torch.__version__", "2.7.1+cpu")
    checks = by_name()
    assert checks["disk"]["state"] == "bad"
    assert checks["torch"]["state"] == "bad"
    assert "2.8" in checks["torch"]["remedy"]


def test_missing_extras_are_notes_with_their_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optional package that is missing never stops a run; its remedy is the line to type."""
    from importlib.metadata import PackageNotFoundError

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("deepdoctor.doctor.version", missing)
    checks = by_name()
    assert checks["gguf"]["state"] == "note"
    assert checks["gguf"]["remedy"] == 'pip install "deepdoctor[gguf]"'
