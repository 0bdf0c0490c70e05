"""Pushing a run: what goes where, who may see it, and what is refused; with the real client over HTTP."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_publish import BASE, QUICK, complete, made_run, online

from deepdoctor.errors import HubError, RunError, UsageError
from deepdoctor.publish.check import check_push
from deepdoctor.publish.faults import Fault, Patience, fault_of
from deepdoctor.publish.stage import push_after_run, push_run
from deepdoctor.run_folder import RunFolder
from deepdoctor.ui import Reporter
from helpers_hub import FINE, READ, WRITE, File, Mishap, Repo, local_hub
from helpers_run import PROJECT


@pytest.fixture(params=[False, True], ids=["LFS", "xet"])
def any_hub(request, tmp_path, monkeypatch):
    """A Hub, over each transport."""
    with local_hub(tmp_path / "hub", request.param) as found:
        online(monkeypatch, found)
        yield found


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub over LFS, where the transport does not matter."""
    with local_hub(tmp_path / "hub") as found:
        online(monkeypatch, found)
        yield found


def push(run, hub, to="tester/demo", what="all", **options):
    """push_run with the test's token, Hub and little patience."""
    options = {"token": WRITE, "endpoint": hub.url, "patience": QUICK, **options}
    return push_run(run, to, what, **options)


def test_each_kind_has_its_own_private_repository(any_hub, tmp_path):
    """Adapter and merged model never share one; all bytes are there; the card is the last commit."""
    run = made_run(tmp_path / "runs")
    pushed = push(run, any_hub)
    assert {kind: one.repo for kind, one in pushed.items()} == {"adapter": "tester/demo-lora", "merged": "tester/demo"}
    assert complete(any_hub, run, "tester/demo") == []
    for one in pushed.values():
        repo = any_hub.repo(one.repo)
        assert repo.private and one.private
        assert repo.titles[-1] == "Write the model card"
        assert b"the card of the export stage" not in any_hub.read(one.repo, "README.md")
    assert "adapter_config.json" not in any_hub.repo("tester/demo").files
    assert not any(name.startswith("model") for name in any_hub.repo("tester/demo-lora").files)


def test_4_bit_weights_have_a_repository_of_their_own(any_hub, tmp_path):
    """``merged_4bit`` could not be pushed; beside the merged model a loader could take one for the other."""
    run = made_run(tmp_path / "runs")
    place = run.path / "export" / "merged_4bit"
    place.mkdir()
    (place / "model.safetensors").write_bytes(os.urandom(30_000))
    (place / "config.json").write_text('{"quantization_config": {}}', encoding="utf-8")
    pushed = push(run, any_hub)
    assert pushed["merged_4bit"].repo == "tester/demo-bnb-4bit"
    assert any_hub.read("tester/demo-bnb-4bit", "model.safetensors") == (place / "model.safetensors").read_bytes()
    assert "model.safetensors" not in any_hub.repo("tester/demo").files
    card = any_hub.read("tester/demo-bnb-4bit", "README.md").decode()
    assert "base_model: tester/demo\n" in card and "base_model_relation: quantized" in card
    assert [one.sent_bytes for one in push(run, any_hub, to=None).values()] == [0, 0, 0]
    alone = push(run, any_hub, to="tester/four", what="merged_4bit")
    assert list(alone) == ["merged_4bit"]
    assert f"base_model: {BASE}\n" in any_hub.read("tester/four-bnb-4bit", "README.md").decode()


def test_pushing_again_sends_nothing(any_hub, tmp_path):
    """No commit, no upload; a changed file is sent alone."""
    run = made_run(tmp_path / "runs")
    push(run, any_hub)
    before = len(any_hub.requests)
    again = push(run, any_hub, to=None)
    assert [one.sent_bytes for one in again.values()] == [0, 0]
    assert not [path for method, path, _ in any_hub.requests[before:] if method in ("POST", "PUT")]
    (run.path / "export/merged/model-00002-of-00002.safetensors").write_bytes(os.urandom(30_000))
    again = push(run, any_hub)
    assert again["merged"].sent_bytes == 30_000
    assert complete(any_hub, run, "tester/demo") == []


def test_manifest_says_where_it_went(hub, tmp_path):
    """Where, what, when and done; no token."""
    run = made_run(tmp_path / "runs")
    push(run, hub, to="demo", what="adapter")
    found = RunFolder.open(run.path).manifest["push"]
    assert (found["to"], found["what"], found["status"]) == ("tester/demo", "adapter", "done")
    assert found["repos"]["adapter"]["url"] == f"{hub.url}/tester/demo-lora"
    assert WRITE not in (run.path / "manifest.json").read_text()


def test_public_is_asked_for(hub, tmp_path):
    """``public`` makes public repositories; a private push into a public one is refused before anything is sent."""
    run = made_run(tmp_path / "runs")
    push(run, hub, public=True, what="merged")
    assert not hub.repo("tester/demo").private
    titles = list(hub.repo("tester/demo").titles)
    with pytest.raises(HubError, match="exists and is public, and this push is private"):
        push(run, hub, what="merged")
    assert hub.repo("tester/demo").titles == titles


def test_private_repository_stays_private(hub, tmp_path, capsys):
    """A public push into a private repository does not open it; that is said."""
    run = made_run(tmp_path / "runs")
    push(run, hub, what="merged")
    assert push(run, hub, what="merged", public=True, reporter=Reporter())["merged"].private
    assert hub.repo("tester/demo").private
    assert "it stays so" in capsys.readouterr().err


@pytest.mark.parametrize("stranger", ["adapter_config.json", "model.safetensors", "old.gguf"])
def test_foreign_weights_are_refused(hub, tmp_path, stranger):
    """A repository with files that a loader could take for ours is left as it is."""
    hub.repos["model", "tester/demo"] = repo = Repo("tester/demo", "model", True)
    repo.commit({stranger: File("0" * 40, 3)}, "theirs")
    with pytest.raises(HubError, match=f"holds {stranger}, which is not part of this merged"):
        push(made_run(tmp_path / "runs"), hub, what="merged")
    assert repo.titles == ["initial commit", "theirs"]


def test_kinds_that_are_not_there(hub, tmp_path):
    """One that is named is missed; ``all`` takes what there is; words that are no kind are refused."""
    run = made_run(tmp_path / "runs")
    with pytest.raises(RunError, match="has no export/gguf"):
        push(run, hub, what="gguf")
    with pytest.raises(UsageError, match="expected adapter, merged, merged_4bit, gguf or all"):
        push(run, hub, what="onnx")
    with pytest.raises(UsageError, match="so where to"):
        push(run, hub, to=None)
    (run.path / "export/gguf").mkdir()
    (run.path / "export/gguf/demo-q8_0.gguf").write_bytes(os.urandom(5000))
    assert push(run, hub, what=["gguf"])["gguf"].repo == "tester/demo-gguf"
    assert b"ollama run hf.co/tester/demo-gguf" in hub.read("tester/demo-gguf", "README.md")
    import shutil

    shutil.rmtree(run.path / "export")
    with pytest.raises(RunError, match="nothing to push"):
        push(run, hub)


def test_adapter_needs_a_base_others_have(hub, tmp_path, capsys):
    """One over a local folder is left out, or refused where it was asked for; ``base`` names it; no path goes out."""
    (tmp_path / "my base").mkdir()
    run = made_run(tmp_path / "runs", model=str(tmp_path / "my base"))
    assert list(push(run, hub, reporter=Reporter())) == ["merged"]
    assert "only the other kinds are pushed" in capsys.readouterr().err
    with pytest.raises(RunError, match="which nobody else has"):
        push(run, hub, what="adapter")
    push(run, hub, base=BASE)
    config = json.loads(hub.read("tester/demo-lora", "adapter_config.json"))
    assert config["base_model_name_or_path"] == BASE
    for repo in ("tester/demo", "tester/demo-lora"):
        assert not any(str(tmp_path).encode() in hub.read(repo, path) for path in hub.repo(repo).files)


def test_embedded_base_is_named_by_its_hub_id(hub, tmp_path):
    """``embedded:...`` means nothing elsewhere."""
    run = made_run(tmp_path / "runs", model="embedded:smollm2-135m-instruct")
    push(run, hub, what="adapter")
    config = json.loads(hub.read("tester/demo-lora", "adapter_config.json"))
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config["revision"] is None


def test_check_before_training(hub):
    """Read tokens, foreign accounts and bad names fail in one call that writes nothing."""
    options = {"endpoint": hub.url, "patience": QUICK}
    assert check_push("demo", WRITE, **options).repo("adapter") == "tester/demo-lora"
    assert check_push("acme/demo", FINE, **options).account == "tester"
    assert check_push("acme/demo", WRITE, **options).to == "acme/demo"
    with pytest.raises(HubError, match="can only read, so nothing could be pushed"):
        check_push("tester/demo", READ, **options)
    with pytest.raises(HubError, match="no write access to tester"):
        check_push("tester/demo", FINE, **options)
    with pytest.raises(HubError, match="neither the account nor one of its organisations"):
        check_push("google/demo", WRITE, **options)
    with pytest.raises(HubError, match="can only read in the organisation library"):
        check_push("library/demo", WRITE, **options)
    asked = len(hub.requests)
    for name in ("a/b/c", "tester/", "tester/de mo", "tester/a--b", "tester/" + "x" * 90, "-a/b", "tester/a.git"):
        with pytest.raises(UsageError, match="is no name for the Hub"):
            check_push(name, WRITE, what="merged", **options)
    assert len(hub.requests) == asked
    assert hub.repos == {}


def test_a_fine_grained_token_for_the_repositories_alone(hub):
    """Write access to every repository of the push is enough; to one of two it is not."""
    scoped = [{"entity": {"name": name}, "permissions": ["repo.write"]} for name in ("tester/x", "tester/x-lora")]
    hub.accounts[FINE]["fineGrained"] = {"scoped": scoped}
    check_push("tester/x", FINE, what=["merged", "adapter"], endpoint=hub.url, patience=QUICK)
    with pytest.raises(HubError, match="no write access"):
        check_push("tester/x", FINE, what="all", endpoint=hub.url, patience=QUICK)


def test_name_of_a_published_llama(hub):
    """A public push of a Llama descendant without Llama in front gets a note; private ones and Qwen do not."""
    options = {"endpoint": hub.url, "patience": QUICK}
    assert "begins with" in check_push("tester/demo", WRITE, public=True, model_id=BASE, **options).notes[0]
    assert check_push("tester/Llama-demo", WRITE, public=True, model_id=BASE, **options).notes == ()
    assert check_push("tester/demo", WRITE, model_id=BASE, **options).notes == ()
    qwen = BASE.replace("Llama-8B", "Qwen-7B")
    assert check_push("tester/demo", WRITE, public=True, model_id=qwen, **options).notes == ()


def test_no_token_is_said(hub, tmp_path, monkeypatch):
    """Where it was looked for, and how to get one."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(HubError, match="no Hugging Face token was found") as caught:
        push(made_run(tmp_path / "runs"), hub, token=None)
    assert "deepdoctor login" in caught.value.hint


def test_a_failed_push_does_not_fail_the_run(hub, tmp_path, capsys):
    """The story says why and how to go on; the manifest knows; pushing later needs no more words."""
    run = made_run(tmp_path / "runs")
    hub.mishaps = [Mishap("/commit/", status=503, times=1000)]
    options = {"token": WRITE, "endpoint": hub.url, "patience": QUICK}
    assert push_after_run(run, "tester/demo", what="merged", reporter=Reporter(), **options) == {}
    story = capsys.readouterr().err
    assert "keeps answering 503" in story
    assert f"push later: `deepdoctor push {run.path}`" in story
    assert run.manifest["status"] == "done" and run.manifest["push"]["status"] == "failed"
    hub.mishaps = []
    pushed = push_run(run.path, **options)
    assert list(pushed) == ["merged"] and pushed["merged"].private


def test_no_network_and_offline(hub, tmp_path, monkeypatch):
    """A Hub that is not there and HF_HUB_OFFLINE are told apart; nothing hangs."""
    from huggingface_hub import constants

    run = made_run(tmp_path / "runs")
    with pytest.raises(HubError, match=r"http://127\.0\.0\.1:9 cannot be reached") as caught:
        push(run, hub, endpoint="http://127.0.0.1:9")
    assert caught.value.hint.startswith("nothing is lost")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push(run, hub)


def test_waits_are_what_the_hub_asks_for(hub, tmp_path):
    """Retry-After in seconds and as the RateLimit header; else 1, 2, 4 s; the story says so."""
    waits: list[float] = []
    patience = Patience(sleep=waits.append)
    hub.mishaps = [
        Mishap("whoami", status=429, headers={"Retry-After": "7"}),
        Mishap("whoami", status=429, headers={"RateLimit": '"api";r=0;t=55'}),
        Mishap("repos/create", status=503, times=3),
    ]
    push(made_run(tmp_path / "runs"), hub, what="adapter", patience=patience)
    assert waits == [7, 55, 1, 2, 4]


def test_licence_of_an_unknown_base_is_asked_of_the_hub(hub, tmp_path):
    """Its card says; where the Hub does not answer, ours says that it is not known."""
    card = b"---\nlicense: cc-by-4.0\n---\ntheirs\n"
    hub.repos["model", "acme/base"] = repo = Repo("acme/base", "model", False)
    (hub.folder / "git" / "card").write_bytes(card)
    repo.commit({"README.md": File("card", len(card))}, "theirs")
    run = made_run(tmp_path / "runs", model="acme/base")
    push(run, hub, what="merged")
    assert b"license: cc-by-4.0" in hub.read("tester/demo", "README.md")
    (hub.folder / "git" / "card").write_bytes(b"---\nlicense: other\nlicense_name: theirs\n---\n")
    push(run, hub, to="tester/third", what="merged")
    text = hub.read("tester/third", "README.md").decode()
    assert "license_name: that-of-the-base-model" in text
    assert "[see its card](https://huggingface.co/acme/base)" in text
    hub.mishaps = [Mishap("/acme/base", cut=True, times=99)]
    push(run, hub, to="tester/other", what="merged")
    assert b"licence not known here" in hub.read("tester/other", "README.md")


def test_faults_of_our_own_are_not_the_hubs():
    """A missing local file or a mistake in the code is raised as it is; a date in Retry-After is read."""
    import email.utils
    import time

    assert fault_of(FileNotFoundError(2, "No such file", "/x/404")) is None
    assert fault_of(KeyError("x")) is None
    assert fault_of(ConnectionResetError(104, "reset")).network
    assert Fault(403, "You have exceeded your storage limit").quota
    assert not Fault(403, "Forbidden").quota

    class Refused(Exception):
        response = type("Answer", (), {"status_code": 429})()

    Refused.response.headers = {"Retry-After": email.utils.formatdate(time.time() + 100)}
    assert 90 <= fault_of(Refused()).wait_s <= 100


def test_the_hubs_own_command_fetches_what_was_pushed(any_hub, tmp_path):
    """``hf download``, the client people type, gets every byte of a private repository."""
    run = made_run(tmp_path / "runs")
    push(run, any_hub)
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": any_hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": READ}
    environment |= {"HF_HUB_DISABLE_XET": "0" if any_hub.xet else "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [Path(sys.executable).with_name("hf"), "download", "tester/demo-lora", "--local-dir", tmp_path / "got"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    pushed = any_hub.repo("tester/demo-lora").files
    assert len(pushed) > 2
    for name in pushed:
        assert (tmp_path / "got" / name).read_bytes() == any_hub.read("tester/demo-lora", name)


CHILD = """
from deepdoctor.publish.stage import push_run
import sys
push_run(sys.argv[1], "tester/demo")
"""


def test_killed_in_mid_push_and_again(any_hub, tmp_path):
    """After kill -9 the same call goes on: what had arrived is not sent again, and nothing is lost."""
    hub, size = any_hub, 12_000_000
    run = made_run(tmp_path / "runs", size)
    where = "/demo/commit/" if hub.xet else "^/lfs/"
    hub.mishaps = [Mishap(where, hold=True, cut=True, skip=0 if hub.xet else 2)]
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(PROJECT / "src")}
    environment |= {"HF_TOKEN": WRITE, "HF_HUB_DISABLE_XET": "0" if hub.xet else "1"}
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(run.path)], env=environment)
    try:
        assert hub.held.wait(100)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        hub.release()
    assert RunFolder.open(run.path).manifest["push"]["status"] == "started"
    assert "model-00001-of-00002.safetensors" not in hub.repo("tester/demo").files

    def kept() -> int:
        return sum(path.stat().st_size for path in (hub.folder / "cas").rglob("*") if path.is_file())

    before, stored = len(hub.requests), kept()
    pushed = push(run.path, hub, to=None)
    assert pushed["adapter"].sent_bytes == 0
    assert complete(hub, run, "tester/demo") == []
    if hub.xet:
        assert stored > 3 * size * 0.9
        assert kept() < stored * 1.02
    else:
        assert [status for _, path, status in hub.requests[before:] if path.startswith("/lfs/") and status] == [200]


def test_no_file_holds_a_token(hub, tmp_path, monkeypatch, capsys):
    """After a push that failed and one that did not, with the token in the environment: every file, and the story."""
    monkeypatch.setenv("HF_TOKEN", WRITE)
    run = made_run(tmp_path / "runs")
    hub.mishaps = [Mishap("/preupload/", status=403, times=1, message=f"token {WRITE} is not allowed")]
    with pytest.raises(HubError) as caught:
        push(run, hub, token=None, reporter=Reporter())
    push(run, hub, token=None, reporter=Reporter())
    assert WRITE not in str(caught.value) + repr(caught.value) + capsys.readouterr().err
    for path in [*Path(run.path).rglob("*"), *(hub.folder / "git").iterdir(), *(hub.folder / "lfs").iterdir()]:
        assert path.is_dir() or WRITE.encode() not in path.read_bytes(), path


def test_client_is_imported_late():
    """Importing the package does not import huggingface_hub: the command line starts without it."""
    code = (
        "import sys, deepdoctor.publish.stage, deepdoctor.publish.login\n"
        "print(sorted({'huggingface_hub', 'torch', 'hf_xet'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "src")}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
