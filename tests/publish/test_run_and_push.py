"""Runs that end with a push: refused at minute 0, done at the end, never failed by it; and the commands around them."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers_publish import QUICK, made_run, online

from deepdoctor.errors import HubError, UsageError
from deepdoctor.pipeline import run
from deepdoctor.publish.check import needs_hub, prepare_hub
from deepdoctor.recipe_file import load_recipe
from deepdoctor.run_folder import RunFolder
from deepdoctor.ui import Reporter, SilentReporter
from helpers_hub import READ, WRITE, LocalHub, Mishap, local_hub
from helpers_run import call, tiny_recipe, write_recipe

BASE = "acme/tiny-r1"
LLAMA = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where rows and runs of this file live."""
    return tmp_path_factory.mktemp("pushes")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Hub, and a token that may write in the environment."""
    with local_hub(tmp_path / "hub") as found:
        online(monkeypatch, found)
        monkeypatch.setenv("HF_TOKEN", WRITE)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        monkeypatch.chdir(tmp_path)
        yield found


def values(tiny_r1: Path, folder: Path, name: str, **push: Any) -> dict[str, Any]:
    """A run of seconds that is pushed to tester/NAME."""
    few = {"held_out_questions": 0, "held_out_loss": False}
    return {
        **tiny_recipe(tiny_r1, folder, train={"max_steps": 1}, ask={"questions": []}, compare=few),
        "name": name,
        "push": {"to": f"tester/{name}", **push},
    }


def recipe(**push: Any) -> Any:
    """A recipe that is only looked at."""
    model = push.pop("model", LLAMA)
    return load_recipe({"model": {"id": model}, "data": {"source": "rows.jsonl"}, "push": push}, environ={})


def traces(token: str, folder: Path, *texts: str) -> list[str]:
    """Files below a folder, and texts, that hold a token."""
    found = [str(path) for path in folder.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    return found + [text for text in texts if token in text]


def test_run_ends_with_the_push(hub: LocalHub, tiny_r1: Path, folder: Path, capsys: Any) -> None:
    """Adapter and merged model are on the Hub, privately, and the token is in no file and no line."""
    path = write_recipe(folder / "pushed.yaml", values(tiny_r1, folder, "pushed", base=BASE))
    outcome = call(capsys, "run", path, "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["pushed"] == {
        kind: f"{hub.url}/tester/pushed{end}" for kind, end in (("adapter", "-lora"), ("merged", ""))
    }
    assert all(repo.private for repo in hub.repos.values())
    assert json.loads(hub.read("tester/pushed-lora", "adapter_config.json"))["base_model_name_or_path"] == BASE
    manifest = RunFolder.open(folder / "runs" / "pushed").manifest
    assert (manifest["status"], manifest["push"]["status"]) == ("done", "done")
    assert "this run will be pushed to tester/pushed (private)" in outcome.err
    assert traces(WRITE, folder, outcome.out, outcome.err) == []
    again = call(capsys, "run", path, "--resume")
    assert again.code == 0, again.err
    assert again.err.count("0.0 MB sent") == 2
    assert f"merged: {hub.url}/tester/pushed\n" in again.out


def test_token_that_only_reads_fails_at_minute_0(
    hub: LocalHub, tiny_r1: Path, folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is trained, no folder is made, and the message names the token's place and the remedy."""
    monkeypatch.setenv("HF_TOKEN", READ)
    path = write_recipe(folder / "refused.yaml", values(tiny_r1, folder, "refused", base=BASE))
    outcome = call(capsys, "run", path)
    assert (outcome.code, outcome.out) == (1, "")
    assert "the token from HF_TOKEN can only read" in outcome.err
    assert "write access" in outcome.err
    assert not (folder / "runs" / "refused").exists()
    assert hub.repos == {}
    assert traces(READ, folder, outcome.err) == []
    assert call(capsys, "data", path).code == 0, "a stage alone pushes nothing"


def test_push_that_fails_leaves_the_run_complete(hub: LocalHub, tiny_r1: Path, folder: Path, capsys: Any) -> None:
    """The run ends with 0 and says how to push later; that command then needs nothing but the folder."""
    hub.mishaps = [Mishap("repos/create", status=403, times=9)]
    path = write_recipe(folder / "later.yaml", values(tiny_r1, folder, "later", what="merged"))
    outcome = call(capsys, "run", path)
    place = folder / "runs" / "later"
    assert outcome.code == 0, outcome.err
    assert outcome.err.rstrip().endswith(f"the run is complete; push later: `deepdoctor push {place}`")
    assert RunFolder.open(place).manifest["push"]["status"] == "failed"
    hub.mishaps = []
    outcome = call(capsys, "push", place, "--json")
    assert outcome.code == 0, outcome.err
    pushed = json.loads(outcome.out)
    assert pushed.keys() == {"merged"}
    assert pushed["merged"]["private"] is True
    assert "model.safetensors" in hub.repo("tester/later").files
    assert call(capsys, "push", place).out == f"merged: {hub.url}/tester/later\n"


def test_push_command(hub: LocalHub, tmp_path: Path, capsys: Any) -> None:
    """Kinds, a public push and a wrong word; a folder that is no run."""
    place = made_run(tmp_path / "runs").path
    assert call(capsys, "push", place, "--to", "tester/some", "--what", "adapter", "--public").code == 0
    assert {name for _, name in hub.repos} == {"tester/some-lora"}
    assert not hub.repo("tester/some-lora").private
    assert call(capsys, "push", place, "--to", "tester/two", "--what", "adapter", "merged").code == 0
    assert {name for _, name in hub.repos} >= {"tester/two", "tester/two-lora"}
    outcome = call(capsys, "push", place, "--to", "tester/some", "--what", "weights")
    assert (outcome.code, "expected adapter, merged, merged_4bit, gguf or all" in outcome.err) == (2, True)
    assert "is no run folder" in call(capsys, "push", tmp_path / "none").err


def test_ctrl_c_in_a_push(hub: LocalHub, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends with 130 and the command that sends the rest; the hint used to speak of `--resume`."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    place = made_run(tmp_path / "runs").path
    monkeypatch.setattr("deepdoctor.publish.stage.open_hub", stop)
    outcome = call(capsys, "push", place, "--to", "tester/demo")
    assert outcome.code == 130
    assert f"`deepdoctor push {place}` sends the rest" in outcome.err
    monkeypatch.setattr("deepdoctor.publish.login.read_secret", stop)
    outcome = call(capsys, "login")
    assert (outcome.code, "nothing was stored" in outcome.err) == (130, True)


def test_login_command(hub: LocalHub, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token comes from stdin alone; one given as a word is refused and not shown again."""
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "home" / "stored"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(WRITE + "\n"))
    outcome = call(capsys, "login")
    assert (outcome.code, outcome.out) == (0, "")
    assert "tester, a token that reads and writes" in outcome.err
    assert (tmp_path / "home" / "token").read_text() == WRITE
    monkeypatch.setattr(sys, "stdin", io.StringIO("0123456789abcdef\n"))
    assert call(capsys, "login", "--wandb").code == 0
    assert "0123456789abcdef" in (tmp_path / "netrc").read_text()
    for words in ((WRITE,), ("--token", WRITE)):
        outcome = call(capsys, "login", *words)
        assert outcome.code == 2
        assert WRITE not in outcome.err


def test_doctor_asks_whether_a_recipe_may_push(
    hub: LocalHub, tiny_r1: Path, folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`deepdoctor doctor RECIPE` ends with 1 where the push would be refused, and says where it would go otherwise."""
    monkeypatch.setattr("deepdoctor.doctor.hub.WAIT_S", 20)
    path = write_recipe(folder / "doctor.yaml", values(tiny_r1, folder, "doctor", base=BASE))
    checks = {check["name"]: check for check in json.loads(call(capsys, "doctor", path, "--json").out)}
    assert checks["push"]["found"] == "tester/doctor may be written by tester"
    outcome = call(capsys, "doctor", path, "--push.to", "library/doctor")
    assert outcome.code == 1
    assert "  bad  push: tester can only read in the organisation library" in outcome.out
    outcome = call(capsys, "doctor", "--push.to", "library/doctor")
    assert (outcome.code, "go with a RECIPE" in outcome.err) == (2, True)
    assert hub.repos == {}


# --- before a run


def test_what_needs_the_hub(tmp_path: Path) -> None:
    """Embedded and local parts need no token; Hub ids and a push do."""
    local = {"model": {"id": "embedded:smollm2-135m-instruct"}, "data": {"source": "embedded:rows"}}
    assert not needs_hub(load_recipe(local, environ={}))
    assert needs_hub(load_recipe({**local, "push": {"to": "me/it"}}, environ={}))
    assert needs_hub(load_recipe({**local, "data": {"source": "owner/rows"}}, environ={}))
    assert needs_hub(load_recipe({**local, "model": {"id": LLAMA}}, environ={}))


def test_prepare_says_what_a_licence_asks(hub: LocalHub, capsys: Any) -> None:
    """A public push of a Llama's child under another name gets its note before the run."""
    place = prepare_hub(recipe(to="demo", public=True, what="adapter"), Reporter(), patience=QUICK)
    assert place is not None and place.to == "tester/demo"
    story = capsys.readouterr().err
    assert "pushed to tester/demo (public)" in story
    assert 'begins with "Llama"' in story
    assert prepare_hub(recipe(to="demo"), Reporter(), push=False) is None
    assert hub.calls("whoami") == [200]


def test_adapter_on_a_local_base_is_refused_early(hub: LocalHub, tmp_path: Path) -> None:
    """It used to be noticed only when the push began, after the training."""
    for push in ({"what": "adapter"}, {"what": ["adapter", "merged"]}):
        with pytest.raises(UsageError, match="local folder"):
            prepare_hub(recipe(to="demo", model=str(tmp_path), **push), SilentReporter(), patience=QUICK)
    assert prepare_hub(recipe(to="demo", model=str(tmp_path)), SilentReporter(), patience=QUICK)
    assert prepare_hub(recipe(to="demo", model=str(tmp_path), what="adapter", base=BASE), SilentReporter())


def test_no_network_before_a_run(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hint names the way without the push."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="cannot be reached") as caught:
        prepare_hub(recipe(to="demo"), SilentReporter(), patience=QUICK)
    assert "without `--push.to`" in str(caught.value)


def test_python_api_pushes(hub: LocalHub, tiny_r1: Path, folder: Path) -> None:
    """`run` returns the addresses."""
    result = run(values(tiny_r1, folder, "api", what=["merged"]))
    assert result.pushed == {"merged": f"{hub.url}/tester/api"}
