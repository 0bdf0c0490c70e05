"""doctor: the checks describe this machine, and what would stop a run is bad and has a remedy."""

import os
import shutil
import sys
import time
from collections import namedtuple
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deepdoctor.doctor import hub as hub_module
from deepdoctor.doctor import machine, versions
from deepdoctor.doctor.command import check_machine, print_checks
from deepdoctor.doctor.hub import ask_hub
from deepdoctor.doctor.need import check_recipe
from deepdoctor.recipe import Recipe
from deepdoctor.recipe_file import load_recipe
from helpers_hub import READ, WRITE, Mishap, local_hub
from helpers_run import PROJECT, tiny_recipe

TUTORIAL = PROJECT / "recipes" / "tutorial.yaml"
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY")
GIB = 2**30


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No token, no netrc, and a cache of the Hub that is empty."""
    from huggingface_hub import constants

    for name in TOKENS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


def named(checks: list[Any]) -> dict[str, Any]:
    """The checks by name; each has the four keys and, where something is wrong, a remedy."""
    assert len({check["name"] for check in checks}) == len(checks)
    for check in checks:
        assert check.keys() == {"name", "state", "found", "remedy"}
        assert check["state"] in ("ok", "note", "bad")
        assert check["found"]
        assert check["remedy"] or check["state"] != "bad"
        assert "\n" not in check["found"] + (check["remedy"] or "")
    return {check["name"]: check for check in checks}


def by_name(recipe: Recipe | None = None) -> dict[str, Any]:
    """Everything the doctor says."""
    return named(check_machine(recipe))


# --- this machine


def test_checks_describe_this_machine() -> None:
    """Python and torch are named with the versions that run this test; offline nobody is asked, and that is a note."""
    import torch

    checks = by_name()
    assert checks["python"]["found"] == ".".join(map(str, sys.version_info[:3]))
    assert checks["torch"]["found"].startswith(torch.__version__)
    assert "GiB" in checks["memory"]["found"]
    assert (checks["gpu"]["state"] == "ok") == torch.cuda.is_available()
    assert (checks["hub"]["state"], checks["hub"]["found"]) == ("note", "not asked: HF_HUB_OFFLINE is set")
    assert checks["Hugging Face token"]["remedy"] == "`deepdoctor login`, where you need it"


def test_full_disk_small_memory_and_old_torch_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little disk or memory, and a torch that is too old, stop a run, and are said to."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 100, 2**28))
    monkeypatch.setattr("deepdoctor.doctor.need.host_memory", lambda: (2 * GIB, GIB))
    monkeypatch.setattr("torch.__version__", "2.7.1+cpu")
    checks = by_name()
    assert [checks[name]["state"] for name in ("disk", "memory", "torch")] == ["bad"] * 3
    assert "2.8" in checks["torch"]["remedy"]


def test_memory_of_a_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of a cgroup is what there is; its page cache counts as free."""
    limits = {"/sys/fs/cgroup/memory.max": 3 * GIB, "/sys/fs/cgroup/memory.current": 2 * GIB}
    monkeypatch.setattr(machine, "_number", limits.get)
    monkeypatch.setattr(machine, "_text", lambda path: f"anon 5\ninactive_file {GIB}\n")
    total, available = machine.host_memory()
    assert total == 3 * GIB
    assert available == 2 * GIB


def test_lines_are_short_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    """State, name, what was found, and the remedy behind an arrow."""
    print_checks([machine.make_check("disk", "bad", "full", "free some space")], json=False)
    assert capsys.readouterr().out == "  bad  disk: full  -> free some space\n"


# --- driver and torch


@pytest.mark.parametrize(
    ("driver", "cuda", "works", "state", "words"),
    [
        ("580.95.05", "13.0", True, "ok", "enough for CUDA 13.0"),
        ("550.54.15", "12.8", True, "ok", "enough for CUDA 12.8"),
        ("550.54.15", "13.0", False, "bad", "asks for 580"),
        ("550.54.15", "13.0", True, "note", "asks for 580"),
        ("470.82.01", "12.8", False, "bad", "asks for 525"),
        ("550.54.15", None, False, "bad", "was not built for CUDA"),
        ("390.77", None, False, "note", "was not built for CUDA"),
    ],
)
def test_torch_build_against_driver(driver: str, cuda: str | None, works: bool, state: str, words: str) -> None:
    """A build that the driver is too old for, or one without CUDA, is named with the build that fits."""
    check = machine._check_driver(driver, cuda, "2.11.0", works)
    assert check["state"] == state
    assert words in check["found"]
    if state == "bad":
        assert f"CUDA {11 if driver < '5' else 12}" in check["remedy"]


def test_driver_is_read_where_the_kernel_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """From /proc of both kinds of kernel module, else from nvidia-smi; None where there is neither."""
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder@U22)\nGCC"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: text)
    assert machine.driver_version() == "580.95.05"

    def missing(self: Path, **_: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert machine.driver_version() is None
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="550.54.15\n550.54.15\n"))
    assert machine.driver_version() == "550.54.15"


def test_torch_that_cannot_be_imported_ends_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that is missing on this machine is one line, not a traceback."""
    monkeypatch.setitem(sys.modules, "torch", None)
    checks = by_name()
    assert checks["torch"]["state"] == "bad"
    assert "gpu" not in checks and "hub" in checks


# --- GPU


def fake_gpu(
    patch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    free_gib: float = 15,
    architectures: tuple[str, ...] = ("sm_75", "sm_80", "sm_90", "compute_90"),
) -> dict[str, Any]:
    """The lines for a card of 16 GiB with this compute capability."""
    import torch

    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: 2)
    patch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="Fake card"))
    patch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    patch.setattr(torch.cuda, "mem_get_info", lambda _: (free_gib * GIB, 16 * GIB))
    patch.setattr(torch.cuda, "get_arch_list", lambda: list(architectures))
    patch.setattr(machine, "_check_compiler", lambda: [])
    return named(machine.check_gpus())


@pytest.mark.parametrize(
    ("capability", "state", "words"),
    [
        ((6, 0), "bad", "capability 6.0"),
        ((7, 5), "ok", "no bf16 (fp16 with loss scaling), no flash attention, no fp8"),
        ((8, 0), "ok", "bf16, flash attention, no fp8"),
        ((8, 9), "ok", "bf16, flash attention, fp8"),
        ((9, 0), "ok", "bf16, flash attention, fp8"),
        ((12, 0), "ok", "bf16, flash attention, fp8"),
    ],
)
def test_capability_is_told_in_words(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], state: str, words: str
) -> None:
    """What bf16, fp8 and flash attention ask for; cards before the T4 are bad, with another card to take."""
    gpu = fake_gpu(monkeypatch, capability)["gpu"]
    assert (gpu["state"], words in gpu["found"]) == (state, True), gpu
    assert "1 more is visible" in gpu["found"]


def test_card_that_torch_has_no_code_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new card under an old build fails at the first kernel; PTX and later minor versions run."""
    gpu = fake_gpu(monkeypatch, (12, 0), architectures=("sm_80", "sm_90a"))["gpu"]
    assert gpu["state"] == "bad"
    assert "newer build of torch" in gpu["remedy"]
    assert machine.built_for((8, 9), ["sm_80"])
    assert not machine.built_for((8, 0), ["sm_86"])
    assert machine.built_for((9, 0), ["sm_90a"])
    assert not machine.built_for((10, 0), ["sm_90", "compute_120"])


def test_memory_that_others_hold_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that somebody else uses says how much is left."""
    assert fake_gpu(monkeypatch, (9, 0))["gpu memory"]["state"] == "ok"
    memory = fake_gpu(monkeypatch, (9, 0), free_gib=3.5)["gpu memory"]
    assert (memory["state"], memory["found"]) == ("note", "3.5 of 16.0 GiB free")


def test_broken_and_hidden_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that fails is bad, in one line; a card hidden by the user is a note."""
    import torch

    def fails(_: int) -> None:
        raise RuntimeError("CUDA error: unknown error\nCUDA kernel errors might be reported later")

    fake_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", fails)
    gpu = named(machine.check_gpus())["gpu"]
    assert (gpu["state"], gpu["found"]) == ("bad", "cannot be used: CUDA error: unknown error")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert named(machine.check_gpus())["gpu"]["found"] == "hidden: CUDA_VISIBLE_DEVICES is ''"


def test_triton_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first kernel of a run used to be where one learnt that gcc or Python's headers are missing."""
    import importlib.util
    import sysconfig

    monkeypatch.delenv("CC", raising=False)
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert machine._check_compiler()[0]["found"] == "not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(sysconfig, "get_paths", lambda _: {"include": str(tmp_path)})
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "no C compiler" in machine._check_compiler()[0]["found"]
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/gcc")
    assert machine._check_compiler() == []
    (tmp_path / "Python.h").unlink()
    assert "Python.h" in machine._check_compiler()[0]["found"]


def test_a_recipe_for_the_cpu_needs_no_gpu(monkeypatch: pytest.MonkeyPatch, tiny_r1: Path, tmp_path: Path) -> None:
    """A driver that torch does not fit stops no run that computes on the CPU."""
    monkeypatch.setattr(machine, "driver_version", lambda: "550.54.15")
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    checks = by_name()
    assert (checks["driver"]["state"], checks["gpu"]["state"]) == ("bad", "bad")
    checks = by_name(load_recipe(tiny_recipe(tiny_r1, tmp_path), environ={}))
    assert (checks["driver"]["state"], checks["gpu"]["state"]) == ("note", "note")


# --- packages


def fake_packages(patch: pytest.MonkeyPatch, installed: dict[str, str], demands: dict[str, list[str]]) -> None:
    """A Python environment of these packages, with what each asks for."""

    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    def requires(name: str) -> list[str]:
        version(name)
        return demands.get(name, [])

    patch.setattr(versions, "version", version)
    patch.setattr(versions, "requires", requires)


def test_missing_extras_are_notes_with_their_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optional package that is missing never stops a run; its remedy is the line to type."""
    fake_packages(monkeypatch, {}, {})
    checks = named(versions.check_extras())
    assert checks["gguf"]["state"] == "note"
    assert checks["gguf"]["remedy"] == 'pip install "deepdoctor[gguf]"'


def test_requirements_faults_and_conflicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What we need and lack is bad; broken versions and neighbours that want others are notes."""
    installed = {"deepdoctor": "1", "torch": "2.8.0", "datasets": "4.0.0", "hf-xet": "1.4.2", "vllm": "0.33.0"}
    installed |= {"transformers": "5.23.0", "trl": "1.16.0"}
    demands = {
        "deepdoctor": ["torch>=2.8", "datasets>=4.7", "rich>=14", 'gguf>=0.17; extra == "gguf"'],
        "vllm": ["transformers<5.21", 'colorama>1; sys_platform == "win32"'],
        "trl": ["transformers>=5.2"],
    }
    fake_packages(monkeypatch, installed, demands)
    checks = named(versions.check_versions())
    assert checks.keys() == {"datasets", "rich", "hf-xet", "vllm"}
    assert checks["datasets"]["found"] == "4.0.0 is installed, >=4.7 is needed"
    assert checks["rich"]["remedy"] == 'pip install "rich>=14"'
    assert "issues/4223" in checks["hf-xet"]["found"]
    assert checks["vllm"]["found"] == "0.33.0 asks for transformers<5.21, found 5.23.0"
    assert [checks[name]["state"] for name in ("datasets", "rich", "hf-xet", "vllm")] == ["bad", "bad", "note", "note"]
    installed |= {"datasets": "5.2.0", "rich": "15.0", "hf-xet": "1.8.0", "transformers": "5.20.0"}
    assert [check["name"] for check in versions.check_versions()] == ["packages"]


def test_every_known_fault_names_its_source() -> None:
    """A version is called broken only on somebody's word."""
    from packaging.specifiers import SpecifierSet

    for fault in versions.KNOWN_FAULTS:
        assert fault.source and fault.effect and fault.remedy.startswith("pip install")
        assert len(SpecifierSet(fault.versions)) > 0


def test_trackers_that_a_recipe_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """None installed is a note, one the recipe names and nobody installed is bad."""
    fake_packages(monkeypatch, {"wandb": "0.31.0"}, {})
    assert versions.check_trackers()["found"] == "wandb 0.31.0"
    assert versions.check_trackers(["wandb"])["state"] == "ok"
    missing = versions.check_trackers(["wandb", "trackio"])
    assert missing["state"] == "bad"
    assert "trackio" in missing["found"] and "deepdoctor[track]" in missing["remedy"]
    fake_packages(monkeypatch, {}, {})
    assert versions.check_trackers()["state"] == "note"


# --- a recipe's need


def test_a_recipe_that_fits(tiny_r1: Path, tmp_path: Path) -> None:
    """Plan, memory and disk say what is needed of what is there, and nothing is written."""
    recipe = load_recipe(tiny_recipe(tiny_r1, tmp_path), environ={})
    before = sorted(tmp_path.rglob("*"))
    checks = named(check_recipe(recipe))
    assert {name: check["state"] for name, check in checks.items()} == dict.fromkeys(("plan", "memory", "disk"), "ok")
    assert "4 steps, peak " in checks["plan"]["found"]
    assert "the recipe needs" in checks["memory"]["found"]
    assert sorted(tmp_path.rglob("*")) == before


def test_the_tutorial_on_a_small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """19.5 GB of disk do not hold download, checkpoints and merged model of 8B, which the doctor says beforehand."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 100, int(19.5e9)))
    monkeypatch.setattr("deepdoctor.doctor.need.host_memory", lambda: (13 * GIB, 12 * GIB))
    checks = named(check_recipe(load_recipe(TUTORIAL, {"model": {"vram": "15GiB"}}, {})))
    assert checks["plan"]["state"] == checks["memory"]["state"] == "ok"
    assert "lengths assumed" in checks["plan"]["found"]
    assert checks["disk"]["state"] == "bad"
    assert "merged 15.0, download 15.0" in checks["disk"]["found"]
    slim = load_recipe(TUTORIAL, {"model": {"vram": "15GiB"}, "export": {"merged": False}}, {})
    assert named(check_recipe(slim))["disk"]["state"] == "ok"
    checks = named(check_recipe(load_recipe(TUTORIAL, {"model": {"vram": "1GiB"}}, {})))
    assert checks["plan"]["state"] == "bad"
    assert "MiB on the GPU" in checks["plan"]["found"]


def test_gguf_and_4_bit_exports_need_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """They used not to be counted, so that a run was called possible and then filled the disk."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 100, int(40e9)))
    monkeypatch.setattr("deepdoctor.doctor.need.host_memory", lambda: (13 * GIB, 12 * GIB))
    more = {"model": {"vram": "15GiB"}, "export": {"gguf": ["f16", "q8_0"], "merged_4bit": True}}
    disk = named(check_recipe(load_recipe(TUTORIAL, more, {})))["disk"]
    assert disk["state"] == "bad"
    assert "merged_4bit 5.3, gguf 22.9" in disk["found"]
    assert named(check_recipe(load_recipe(TUTORIAL, {"model": {"vram": "15GiB"}}, {})))["disk"]["state"] == "ok"


def test_recipe_on_a_cpu_without_room(monkeypatch: pytest.MonkeyPatch, tiny_r1: Path, tmp_path: Path) -> None:
    """More than the machine has is bad, more than is free now is a note."""
    recipe = load_recipe(tiny_recipe(tiny_r1, tmp_path), environ={})
    monkeypatch.setattr("deepdoctor.doctor.need.host_memory", lambda: (GIB, GIB // 8))
    assert named(check_recipe(recipe))["memory"]["state"] == "note"
    monkeypatch.setattr("deepdoctor.doctor.need.host_memory", lambda: (GIB // 8, GIB // 8))
    assert named(check_recipe(recipe))["memory"]["state"] == "bad"


def test_unknown_shape_is_not_downloaded() -> None:
    """A model of the Hub that is neither known nor cached is a note; the doctor used to have no recipe at all."""
    recipe = load_recipe({"model": {"id": "somebody/else"}, "data": {"source": "embedded:rows"}}, environ={})
    checks = named(check_recipe(recipe))
    assert checks["plan"]["state"] == "note"
    assert "somebody/else" in checks["plan"]["found"]
    assert "deepdoctor plan" in checks["plan"]["remedy"]


def test_model_that_is_not_there_is_bad(tmp_path: Path) -> None:
    """A path that does not exist stops a run; it used to be a note."""
    recipe = load_recipe(tiny_recipe(tmp_path / "none", tmp_path), environ={})
    plan = named(check_recipe(recipe))["plan"]
    assert (plan["state"], "is no existing folder" in plan["found"]) == ("bad", True)


def test_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tiny_r1: Path, tmp_path: Path) -> None:
    """A read-only place for runs is bad before the run is made."""
    recipe = load_recipe(tiny_recipe(tiny_r1, tmp_path), environ={})
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "cannot be written" in named(check_recipe(recipe))["disk"]["found"]


# --- the Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Hub that can be asked."""
    from huggingface_hub import constants

    with local_hub(tmp_path / "hub") as found:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        yield found


def pushing(to: str) -> Recipe:
    """A recipe without need of the Hub but for its push."""
    values = {"model": {"id": "embedded:smollm2-135m-instruct"}, "data": {"source": "embedded:rows"}}
    return load_recipe({**values, "push": {"to": to}}, environ={})


def test_hub_tokens_and_push(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write token may push; one that reads is good for gated models and bad for a recipe that pushes."""
    monkeypatch.setenv("HF_TOKEN", WRITE)
    checks = named(ask_hub(pushing("tester/demo"), wait_s=20)())
    assert [checks[name]["state"] for name in ("hub", "Hugging Face token", "push")] == ["ok"] * 3
    assert "answers in" in checks["hub"]["found"]
    assert "tester, a token that reads and writes" in checks["Hugging Face token"]["found"]
    assert checks["push"]["found"] == "tester/demo may be written by tester"
    monkeypatch.setenv("HF_TOKEN", READ)
    checks = named(ask_hub(pushing("tester/demo"), wait_s=20)())
    assert checks["Hugging Face token"]["state"] == "ok"
    assert (checks["push"]["state"], "can only read" in checks["push"]["found"]) == ("bad", True)
    assert READ not in str(checks)
    assert hub.repos == {}


def test_hub_that_does_not_answer(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor waits no longer than it says; a token found here is still named."""
    monkeypatch.setenv("HF_TOKEN", WRITE)
    hub.mishaps = [Mishap(".*", hold=True, times=9)]
    started = time.monotonic()
    checks = named(ask_hub(pushing("tester/demo"), wait_s=0.6)())
    assert time.monotonic() - started < 5
    assert checks["hub"]["state"] == "note"
    assert checks["Hugging Face token"]["found"] == "token from HF_TOKEN"
    assert checks["push"]["state"] == "bad"
    hub.release()


def test_hub_out_of_reach_is_bad_where_it_is_needed(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without network a local recipe is fine, and one that downloads is not."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    checks = named(ask_hub(None, wait_s=5)())
    assert (checks["hub"]["state"], "cannot be reached" in checks["hub"]["found"]) == ("note", True)
    checks = named(ask_hub(load_recipe(TUTORIAL, environ={}), wait_s=5)())
    assert checks["hub"]["state"] == "bad"
    assert "medical-o1-reasoning-SFT" in checks["hub"]["found"]


def test_cached_model_is_no_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whole in the cache: nothing to come; a shard that lacks: a download."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    index = '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(index)
    (folder / "model-1.safetensors").write_text("x")
    found = str(folder / "config.json")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: found)
    assert hub_module.cached_model("a/b", None) is None
    (folder / "model-2.safetensors").write_text("x")
    assert hub_module.cached_model("a/b", None) == folder
