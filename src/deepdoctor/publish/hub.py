"""The Hub as pushing needs it: who asks, what is there, send what is missing, commit. Every call is patient.

Built on the public calls of huggingface_hub (1.3 to 2.4), over xet where hf_xet is installed and over LFS elsewhere.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from deepdoctor.errors import HubError
from deepdoctor.publish.faults import Fault, Patience, explain, fault_of
from deepdoctor.publish.secrets import Token, hide_in_logs
from deepdoctor.ui import Meter

__all__ = ["Account", "Hub", "LocalFile", "RemoteFile", "same", "weight"]

Result = TypeVar("Result")
SMALL_BYTES = 10_000_000
"""Files below go up in one call."""


@dataclass(frozen=True)
class Account:
    """Whose token it is. role: "read", "write", "fineGrained" or another word of the Hub's.

    orgs: organisation -> role in it. writable: names (namespaces and ``user/name``) a fine-grained token may write to.
    """

    name: str
    role: str
    orgs: dict[str, str]
    writable: frozenset[str] = frozenset()


@dataclass(frozen=True)
class RemoteFile:
    """A file on the Hub. size: bytes. sha256: of files in LFS or xet, else None. blob: git's name of the content."""

    size: int
    sha256: str | None
    blob: str


class LocalFile:
    """What is to be at a path of the repository: a file on disk, or bytes."""

    def __init__(self, content: Path | bytes):
        self.content = content

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """Of the content, read once."""
        if isinstance(self.content, bytes):
            return hashlib.sha256(self.content).hexdigest()
        with self.content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def blob(self) -> str:
        """The name git gives the content; for small files."""
        data = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def weight(file: LocalFile) -> int:
    """A file's share of a progress bar: megabytes, at least one."""
    return max(1, round(file.size / 1e6))


def same(local: LocalFile, remote: RemoteFile | None) -> bool:
    """Whether the Hub has this content, by size and hash."""
    if remote is None or remote.size != local.size:
        return False
    return local.sha256 == remote.sha256 if remote.sha256 else local.blob == remote.blob


class Hub:
    """Calls to one Hub with one token.

    endpoint: base URL, None for the one huggingface_hub uses. later: words for "do this again", part of every hint.
    Methods raise HubError for what does not pass; its text has no token.
    """

    def __init__(
        self,
        token: Token,
        endpoint: str | None = None,
        patience: Patience | None = None,
        say: Callable[[str], None] = lambda text: None,
        later: str = "run this again",
    ):
        from huggingface_hub import HfApi

        hide_in_logs()
        self.token, self.patience, self.say, self.later = token, patience or Patience(), say, later
        self.api = HfApi(endpoint=endpoint, token=token.value)
        self.endpoint: str = self.api.endpoint

    def _call(self, what: str, repo: str, call: Callable[[], Result]) -> Result:
        def words(fault: Fault) -> HubError:
            return explain(fault, what, repo, self.token.source, self.endpoint, self.later)

        return self.patience(what, call, words, self.say)

    def account(self) -> Account:
        """Return whose token it is and what it may do."""
        found = self._call("ask whose token this is at", self.endpoint, self.api.whoami)
        access = (found.get("auth") or {}).get("accessToken") or {}
        writable = [
            entry.get("entity", {}).get("name", "")
            for entry in (access.get("fineGrained") or {}).get("scoped", [])
            if "repo.write" in entry.get("permissions", [])
        ]
        orgs = {org["name"]: str(org.get("roleInOrg", "")) for org in found.get("orgs", []) if "name" in org}
        return Account(found["name"], str(access.get("role") or "oauth"), orgs, frozenset(writable))

    def is_private(self, repo: str) -> bool | None:
        """Return whether the repository is private; None where there is none."""
        from huggingface_hub.errors import RepositoryNotFoundError

        def look() -> bool | None:
            try:
                return bool(self.api.model_info(repo).private)
            except RepositoryNotFoundError as error:
                if error.response.status_code == 401:
                    raise
                return None

        return self._call("look at", repo, look)

    def licence(self, repo: str, kind: str) -> str:
        """Return the licence a model's or data set's card names; "" for none, "other", or where it cannot be had."""
        try:
            card = getattr(self.api.repo_info(repo, repo_type=kind), "card_data", None)
        except Exception as error:
            if fault_of(error) is None:
                raise
            return ""
        found = card.get("license") if card is not None else ""
        return found if isinstance(found, str) and found not in ("other", "unknown") else ""

    def create(self, repo: str, private: bool) -> None:
        """Make the repository unless it is there."""
        self._call("create", repo, lambda: self.api.create_repo(repo, private=private, exist_ok=True))

    def files(self, repo: str) -> dict[str, RemoteFile]:
        """Return every file of the repository's main branch by path."""

        def look() -> dict[str, RemoteFile]:
            found = {}
            for entry in self.api.list_repo_tree(repo, recursive=True):
                blob = getattr(entry, "blob_id", None)
                if blob is not None:
                    lfs: Any = getattr(entry, "lfs", None)
                    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
                    found[entry.path] = RemoteFile(getattr(entry, "size", 0), sha256, blob)
            return found

        return self._call("list the files of", repo, look)

    def put(self, repo: str, files: Mapping[str, LocalFile], message: str, meter: Meter | None = None) -> int:
        """Send the files that are not there yet and commit them in one commit; return the bytes of those sent.

        Large files go up one by one, so that an interrupted push keeps what arrived. The commit looks again at what is
        there before every attempt: one whose answer was lost is not made twice.
        """
        from huggingface_hub import CommitOperationAdd

        there = self.files(repo)
        missing = {path: file for path, file in files.items() if not same(file, there.get(path))}
        operations = {
            path: CommitOperationAdd(path, file.content if isinstance(file.content, bytes) else str(file.content))
            for path, file in missing.items()
        }
        if meter is not None:
            for path in files.keys() - missing.keys():
                meter.advance(weight(files[path]), f"{path} is there")
        small = [path for path, file in missing.items() if file.size < SMALL_BYTES]
        large = sorted(missing.keys() - set(small), key=lambda path: missing[path].size)
        for group in [small, *([path] for path in large)]:
            if group:
                self._preupload(repo, {path: operations[path] for path in group})
            for path in group:
                if meter is not None:
                    meter.advance(weight(missing[path]), path)

        def commit() -> None:
            now = self.files(repo)
            left = [operations[path] for path, file in missing.items() if not same(file, now.get(path))]
            if left:
                with _quiet_bars():
                    self.api.create_commit(repo, left, commit_message=message)

        if missing:
            self._call("commit to", repo, commit)
        return sum(file.size for file in missing.values())

    def _preupload(self, repo: str, operations: Mapping[str, Any]) -> None:
        what = next(iter(operations)) if len(operations) == 1 else f"{len(operations)} small files"

        def send() -> None:
            with _quiet_bars():
                self.api.preupload_lfs_files(repo, list(operations.values()), free_memory=False)

        self._call(f"upload {what} to", repo, send)

    def lacking(self, repo: str, files: Mapping[str, LocalFile]) -> list[str]:
        """Return the paths whose content on the Hub is not ours."""
        there = self.files(repo)
        return [path for path, file in files.items() if not same(file, there.get(path))]


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """The client's own bars and warnings off: the push has one line for both. They are back afterwards."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("huggingface_hub")
    level, was_off = logger.level, are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if not was_off:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not was_off:
            enable_progress_bars()
