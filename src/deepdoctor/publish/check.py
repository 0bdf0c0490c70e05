"""What can be known before training: where a push would go, and whether this token may write there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from deepdoctor.errors import HubError, UsageError
from deepdoctor.export.licences import base_licences, hub_id, is_hub_id
from deepdoctor.publish.faults import Patience
from deepdoctor.publish.hub import Account, Hub
from deepdoctor.publish.secrets import Token, find_token, hide_in_logs, use_token
from deepdoctor.recipe import Recipe
from deepdoctor.ui import Reporter, SilentReporter

__all__ = ["KINDS", "SUFFIX", "Destination", "check_push", "check_what", "needs_hub", "open_hub", "prepare_hub"]

KINDS = ("adapter", "merged", "merged_4bit", "gguf")
SUFFIX = {"adapter": "-lora", "merged": "", "merged_4bit": "-bnb-4bit", "gguf": "-gguf"}
"""Each kind has its own repository, whatever else is pushed, so that no loader takes one for another."""


@dataclass(frozen=True)
class Destination:
    """Where a push goes. account: whose token. to: ``user/name``. notes: sentences to show."""

    account: str
    to: str
    notes: tuple[str, ...] = field(default=())

    def repo(self, kind: str) -> str:
        """Return the repository of a kind: ``user/name`` and SUFFIX."""
        return self.to + SUFFIX[kind]


def check_what(what: str | Sequence[str]) -> tuple[str, ...]:
    """Return the kinds that are asked for; "all" gives every kind. Raises UsageError for another word."""
    asked = [what] if isinstance(what, str) else list(what)
    if wrong := [word for word in asked if word not in (*KINDS, "all")] or (not asked and [""]):
        raise UsageError(f"push.what is {wrong[0]!r}, expected {', '.join(KINDS)} or all")
    return tuple(kind for kind in KINDS if kind in asked or "all" in asked)


def open_hub(
    token: Token | str | None,
    endpoint: str | None = None,
    patience: Patience | None = None,
    reporter: Reporter | None = None,
    later: str = "run this again",
) -> Hub:
    """Return the Hub with the token given or found. Raises HubError where there is none."""
    found = Token(token, "the caller") if isinstance(token, str) else token or find_token("hub")
    if found is None:
        raise HubError(
            "no Hugging Face token was found (environment, Kaggle and Colab secrets, stored login)",
            "`deepdoctor login` stores one, or set HF_TOKEN; it needs write access",
        )
    return Hub(found, endpoint, patience, (reporter or SilentReporter()).say, later)


def check_push(
    to: str,
    token: Token | str | None = None,
    *,
    what: str | Sequence[str] = "all",
    public: bool = False,
    model_id: str | None = None,
    endpoint: str | None = None,
    patience: Patience | None = None,
    hub: Hub | None = None,
) -> Destination:
    """Ask the Hub whether a push would be allowed, before hours are spent on what it would send.

    to: ``user/name``, or ``name`` in the token's own account. model_id: of the recipe, for what its licence asks of the
    name. One call, nothing is written. Raises UsageError for a name the Hub does not take, and HubError for no token, a
    token that is not valid or may not write there, and no network.
    """
    kinds = check_what(what)
    _check_name(to, kinds)
    hub = hub or open_hub(token, endpoint, patience)
    account = hub.account()
    if "/" not in to:
        to = f"{account.name}/{to}"
    _check_rights(account, to, [to + SUFFIX[kind] for kind in kinds], hub)
    return Destination(account.name, to, _notes(to, model_id, public))


def needs_hub(recipe: Recipe) -> bool:
    """Whether a recipe names something on the Hub: its model, its rows, or where it is pushed."""
    names = (recipe.model.id, recipe.data.source)
    return recipe.push.to is not None or any(is_hub_id(name) for name in names)


def prepare_hub(
    recipe: Recipe, reporter: Reporter, *, push: bool = True, patience: Patience | None = None
) -> Destination | None:
    """Do what a run needs done about the Hub before it starts; return where it will push, or None.

    Logs hide tokens from now on, and a token is found where the recipe names something on the Hub. push: whether this
    run ends with a push; then the token is asked for its rights. Raises UsageError for a name that the Hub does not
    take or an adapter that nobody else could load, HubError as ``check_push``.
    """
    hide_in_logs()
    token = use_token() if needs_hub(recipe) else None
    to = recipe.push.to
    if to is None or not push:
        return None
    base = recipe.push.base or hub_id(recipe.model.id)
    kinds = [kind for kind in check_what(recipe.push.what) if getattr(recipe.export, kind, False)]
    if base is None and ("adapter" in recipe.push.what or kinds == ["adapter"]):
        raise UsageError(
            f"push.what names the adapter, but its base is the local folder {recipe.model.id}, which nobody else has",
            "name it with `--push.base owner/name` if it is on the Hub, or `--push.what merged`",
        )
    later = "run this again, or without `--push.to` and `deepdoctor push RUN` afterwards"
    hub = open_hub(token, None, patience, reporter, later)
    place = check_push(to, what=kinds, public=recipe.push.public, model_id=base, hub=hub)
    reporter.say(f"push: this run will be pushed to {place.to} ({'public' if recipe.push.public else 'private'})")
    for note in place.notes:
        reporter.say(f"push: {note}", style="yellow")
    return place


def _check_name(to: str, kinds: Sequence[str]) -> None:
    """The Hub's own rules, asked of the longest name."""
    for kind in kinds:
        name = to + SUFFIX[kind]
        parts = name.split("/")
        good = len(parts) <= 2 and all(re.fullmatch(r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?", part) for part in parts)
        if not good or "--" in name or ".." in name or name.endswith((".git", ".ipynb")) or len(name) > 96:
            raise UsageError(
                f"push.to {to!r} is no name for the Hub",
                "write `user/name` of letters, digits, single `-`, `.` or `_`, at most 86 characters",
            )


def _check_rights(account: Account, to: str, repos: Sequence[str], hub: Hub) -> None:
    owner = to.split("/")[0]
    tokens = f"make one with write access at {hub.endpoint}/settings/tokens, then `deepdoctor login`"
    if account.role == "read":
        raise HubError(f"the token from {hub.token.source} can only read, so nothing could be pushed to {to}", tokens)
    if account.role == "fineGrained" and owner not in account.writable and not set(repos) <= account.writable:
        raise HubError(f"the token from {hub.token.source} has no write access to {owner}", tokens)
    if owner == account.name:
        return
    if owner not in account.orgs:
        mine = ", ".join([account.name, *account.orgs])
        raise HubError(
            f"{account.name}, whose token this is, cannot push to {to}: {owner} is neither the account nor one of its "
            "organisations",
            f"push to one of: {mine}",
        )
    if account.orgs[owner] in ("read", "no_access"):
        raise HubError(
            f"{account.name} can only read in the organisation {owner}", f"ask its admins, or push to {account.name}"
        )


def _notes(to: str, model_id: str | None, public: bool) -> tuple[str, ...]:
    licences = base_licences(model_id) if model_id else ()
    llama = [licence for licence in licences if licence.is_llama]
    if public and llama and not to.split("/")[1].lower().startswith("llama"):
        return (
            f'the licence of {llama[0].of} asks that the name of a published model begins with "Llama"; '
            f"{to.split('/')[1]} does not",
        )
    return ()
