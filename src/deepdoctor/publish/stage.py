"""Push a run: adapter, merged models and GGUF, each into its own repository, private unless asked otherwise.

Order in each repository: create, upload, commit, card, check. The card comes last, so a repository with a card is
complete. Pushing again sends only what is missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepdoctor.errors import DeepDoctorError, HubError, RunError, UsageError
from deepdoctor.export.card import card_text
from deepdoctor.export.licences import Licence, base_licences, data_licence, hub_id, is_hub_id
from deepdoctor.publish.check import Destination, check_push, check_what, open_hub
from deepdoctor.publish.faults import Patience
from deepdoctor.publish.hub import Hub, LocalFile, weight
from deepdoctor.publish.secrets import Token, redact
from deepdoctor.run_folder import RunFolder
from deepdoctor.ui import Reporter, SilentReporter

__all__ = ["PushedRepo", "push_after_run", "push_run"]

CARD = "README.md"
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".safetensors.index.json", "adapter_config.json")


@dataclass(frozen=True)
class PushedRepo:
    """One repository after a push. files: how many were checked there. sent_bytes: what was not there before."""

    repo: str
    url: str
    private: bool
    files: int
    sent_bytes: int


def push_run(
    run: RunFolder | Path | str,
    to: str | None = None,
    what: str | Sequence[str] = "all",
    *,
    public: bool = False,
    token: Token | str | None = None,
    base: str | None = None,
    endpoint: str | None = None,
    reporter: Reporter | None = None,
    patience: Patience | None = None,
) -> dict[str, PushedRepo]:
    """Publish what a run exported, or finish a push that was interrupted; return the repositories by kind.

    run: run folder. to: ``user/name``; None goes where the last push went, or the recipe's ``push.to``. what:
    one or several of KINDS, or "all" that the run has. base: Hub id of the base where the run used
    a local folder.
    Writes ``push`` into the manifest. Raises UsageError, RunError for a kind that was not exported, and HubError; then
    what arrived stays on the Hub and the same call goes on from there.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder.open(Path(run))
    reporter = reporter or SilentReporter()
    before = folder.manifest.get("push") or {}
    planned = before if before.get("to") else folder.manifest["recipe"].get("push") or {}
    if to is None:
        to, public = planned.get("to"), public or bool(planned.get("public"))
        what = what if what != "all" else planned.get("what") or "all"
    if not to:
        raise UsageError(f"{folder.path} was not pushed before, so where to?", "`deepdoctor push RUN --to user/name`")
    base = base or planned.get("base")
    sources = _sources(folder, check_what(what), what, base, reporter)
    later = f"`deepdoctor push {folder.path}`"
    record = {"to": to, "what": what if isinstance(what, str) else list(what), "public": public, "base": base}
    folder.update(push={**record, "status": "started"})
    try:
        hub = open_hub(token, endpoint, patience, reporter, later)
        place = check_push(to, what=list(sources), public=public, model_id=_base(folder, base), hub=hub)
        for note in place.notes:
            reporter.say(f"push: {note}", style="yellow")
        repos = {kind: place.repo(kind) for kind in sources}
        licences = _licences(hub, folder, base)
        pushed = {}
        for kind, source in sources.items():
            card = _card(folder, kind, repos, base, licences)
            pushed[kind] = _push_one(hub, kind, place, source, card, public, reporter)
    except DeepDoctorError as error:
        folder.update(push={**record, "status": "failed", "error": redact(error.message)})
        raise
    done = {kind: {"repo": one.repo, "url": one.url, "private": one.private} for kind, one in pushed.items()}
    moment = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    folder.update(push={**record, "to": place.to, "status": "done", "repos": done, "time": moment})
    return pushed


def push_after_run(
    run: RunFolder, to: str, what: str | Sequence[str] = "all", *, reporter: Reporter | None = None, **options: Any
) -> dict[str, PushedRepo]:
    """Push at the end of a run. A push that fails does not fail the run: it is said, with the command for later.

    options: the other ones of ``push_run``.
    """
    reporter = reporter or SilentReporter()
    try:
        return push_run(run, to, what, reporter=reporter, **options)
    except (DeepDoctorError, OSError) as error:
        message = error.message if isinstance(error, DeepDoctorError) else str(error)
        reporter.say(f"push: {redact(message)}", style="yellow")
        if isinstance(error, DeepDoctorError) and error.hint:
            reporter.say(f"hint: {redact(error.hint)}")
        reporter.say(f"the run is complete; push later: `deepdoctor push {run.path}`")
        return {}


def _base(folder: RunFolder, base: str | None) -> str | None:
    return base or hub_id(folder.manifest["recipe"]["model"]["id"])


def _sources(
    folder: RunFolder, kinds: Sequence[str], what: str | Sequence[str], base: str | None, reporter: Reporter
) -> dict[str, dict[str, LocalFile]]:
    """The files of every kind by their path in the repository. Raises RunError for a kind asked for and not there."""
    every = what == "all" or "all" in what
    sources = {}
    for kind in kinds:
        place = folder.path / "export" / kind
        if not place.is_dir():
            if every:
                continue
            raise RunError(
                f"{folder.path} has no export/{kind} to push",
                f"set `export.{kind}: true` and run `deepdoctor export RECIPE`, or push another kind",
            )
        if kind == "adapter" and _base(folder, base) is None:
            message = f"the adapter's base is a local folder ({_local_name(folder)}), which nobody else has"
            if not every or len(kinds) == 1:
                raise RunError(message, "name it with `--base owner/name` if it is on the Hub, or push `--what merged`")
            reporter.say(f"push: {message}: only the other kinds are pushed", style="yellow")
            continue
        sources[kind] = _files(place, _base(folder, base))
    if not sources:
        raise RunError(
            f"{folder.path} has nothing to push: no folder under export/", "run `deepdoctor export RECIPE` first"
        )
    return sources


def _local_name(folder: RunFolder) -> str:
    return Path(folder.manifest["recipe"]["model"]["id"]).name


def _files(place: Path, base: str | None) -> dict[str, LocalFile]:
    """A folder's files, the card aside; paths of this machine are taken out of the configs."""
    files = {}
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place).as_posix()
        if not path.is_file() or any(part.startswith(".") for part in name.split("/")) or name == CARD:
            continue
        files[name] = LocalFile(path)
        if name in ("adapter_config.json", "config.json"):
            files[name] = LocalFile(_public_config(path, base))
    return files


def _public_config(path: Path, base: str | None) -> bytes:
    """A config that means the same elsewhere: PEFT finds the base by its Hub id."""
    values = json.loads(path.read_text(encoding="utf-8"))
    changed = dict(values)
    if path.name == "adapter_config.json" and values.get("base_model_name_or_path") != base:
        changed |= {"base_model_name_or_path": base, "revision": None}
    if not is_hub_id(str(values.get("_name_or_path", "a/b"))):
        changed.pop("_name_or_path", None)
    return path.read_bytes() if changed == values else (json.dumps(changed, indent=2) + "\n").encode()


def _licences(hub: Hub, folder: RunFolder, base: str | None) -> list[Licence]:
    """Licences that the Hub knows and we do not; a Hub that does not say is no fault."""
    model, source = _base(folder, base), folder.manifest["recipe"]["data"]["source"]
    found = []
    if model and not base_licences(model)[0].id:
        found.append(Licence(model, hub.licence(model, "model")))
    if is_hub_id(source) and not data_licence(source).id:
        found.append(Licence(source, hub.licence(source, "dataset")))
    return found


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _card(
    folder: RunFolder, kind: str, repos: Mapping[str, str], base: str | None, licences: Sequence[Licence]
) -> LocalFile:
    text = card_text(
        kind,
        folder.manifest,
        stats=_json(folder.path / "compare" / "stats.json"),
        parity=_json(folder.path / "export" / kind / "parity.json"),
        repos=repos,
        base=base,
        licences=licences,
    )
    return LocalFile(redact(text).encode())


def _push_one(
    hub: Hub,
    kind: str,
    place: Destination,
    files: Mapping[str, LocalFile],
    card: LocalFile,
    public: bool,
    reporter: Reporter,
) -> PushedRepo:
    repo = place.repo(kind)
    private = hub.is_private(repo)
    if private is None:
        hub.create(repo, private=not public)
        private = not public
    elif not private and not public:
        raise HubError(
            f"{repo} exists and is public, and this push is private",
            "push with `--public`, to another name, or make it private in its settings on the Hub",
        )
    elif private and public:
        reporter.say(f"push: {repo} exists and is private; it stays so until you change it in its settings")
    there = hub.files(repo)
    foreign = sorted(path for path in there if path.endswith(WEIGHTS) and path not in files)
    if foreign:
        raise HubError(
            f"{repo} holds {foreign[0]}{' and more' if len(foreign) > 1 else ''}, which is not part of this {kind}: "
            "together, a loader could take one for the other",
            "push to another name, or delete those files on the Hub",
        )
    with reporter.meter(f"push {kind}", sum(map(weight, files.values())), "MB") as meter:
        sent = hub.put(repo, files, f"Upload {kind} with DeepDoctor", meter)
        sent += hub.put(repo, {CARD: card}, "Write the model card")
    if lacking := hub.lacking(repo, {**files, CARD: card}):
        raise HubError(f"{repo} does not hold what was sent: {', '.join(lacking[:3])}", f"{hub.later} sends it again")
    url = f"{hub.endpoint}/{repo}"
    reporter.say(
        f"push: {kind} is at {url} ({'private' if private else 'public'}; {sent / 1e6:.1f} MB sent, "
        f"{len(files) + 1} files checked there)"
    )
    return PushedRepo(repo, url, private, len(files) + 1, sent)
