"""The Hub: can it be reached, whose token is there, may it write where the recipe pushes. Asked in the background."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from deepdoctor.doctor.check import Check, make_check
from deepdoctor.errors import DeepDoctorError
from deepdoctor.export.licences import is_hub_id
from deepdoctor.model.shape import cached_model
from deepdoctor.publish.check import prepare_hub
from deepdoctor.publish.faults import Patience, fault_of
from deepdoctor.publish.login import login_checks
from deepdoctor.publish.secrets import redact
from deepdoctor.recipe import Recipe
from deepdoctor.ui import SilentReporter

__all__ = ["ask_hub", "downloads"]

Result = TypeVar("Result")
WAIT_S = 2.5
"""How long answers are waited for, from the moment they were asked for; what has not come by then is said so."""
ONCE = Patience(attempts=1)


class _Later(Generic[Result]):
    """A call that goes on in a thread of its own, which nobody waits for at the end of the process."""

    def __init__(self, call: Callable[[], Result]):
        self._call = call
        self._result: Result | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._call()
        except Exception as error:
            self._error = error

    def wait(self, until: float) -> Result | None:
        """The result, or None where it has not come until that moment (of time.monotonic). Raises what the call did."""
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._error is not None:
            raise self._error
        return None if self._thread.is_alive() else self._result


def ask_hub(recipe: Recipe | None = None, wait_s: float = WAIT_S) -> Callable[[], list[Check]]:
    """Start to ask, and return the function that gives the answers: the Hub, each service's token, the push.

    The Hub is bad where the recipe needs it and it cannot be reached; a push is bad where it would be refused.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return lambda: _without(recipe, "not asked: HF_HUB_OFFLINE is set", "unset it to download or push")
    until = time.monotonic() + wait_s
    reach = _Later(lambda: _reach(wait_s))
    tokens = _Later(lambda: _login(True))
    pushes = recipe is not None and recipe.push.to is not None
    push = _Later(lambda: _push(recipe)) if recipe is not None and pushes else None

    def answers() -> list[Check]:
        try:
            found = reach.wait(until)
        except Exception as error:
            fault = fault_of(error)
            why = fault.message if fault is not None else f"{type(error).__name__}: {error}"
            found = None
            missing = f"{constants.ENDPOINT} cannot be reached ({redact(why)})"
        else:
            missing = f"{constants.ENDPOINT} has not answered within {wait_s:g} s"
        if found is None:
            remedy = "check network, proxy and HF_ENDPOINT; local folders and files need no Hub"
            return _without(recipe, missing, remedy)
        checks = [make_check("hub", "ok", found), *_tokens(tokens, until)]
        if push is not None:
            try:
                said = push.wait(until)
            except DeepDoctorError as error:
                checks.append(make_check("push", "bad", error.message, error.hint or "see docs/guide/publish.md"))
            else:
                slow = make_check("push", "note", f"no answer within {wait_s:g} s", "ask again")
                checks.append(make_check("push", "ok", said) if said else slow)
        return checks

    return answers


def _reach(wait_s: float) -> str:
    """Knock; any answer will do."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    started = time.monotonic()
    get_session().head(constants.ENDPOINT, timeout=wait_s)
    return f"{constants.ENDPOINT} answers in {1000 * (time.monotonic() - started):.0f} ms"


def _push(recipe: Recipe) -> str:
    place = prepare_hub(recipe, SilentReporter(), patience=ONCE)
    assert place is not None
    return "; ".join([f"{place.to} may be written by {place.account}", *place.notes])


def _login(ask: bool) -> list[Check]:
    found = login_checks(ask_hub=ask, patience=ONCE)
    return [make_check(one["name"], one["state"], one["found"], one["remedy"]) for one in found]


def _tokens(asked: _Later[list[Check]] | None, until: float) -> list[Check]:
    """The login's checks; where the Hub has not said whose token it is, those that need nobody."""
    try:
        found = asked.wait(until) if asked is not None else None
        return found if found is not None else _login(False)
    except DeepDoctorError as error:
        return [make_check("Hugging Face token", "note", error.message, error.hint)]


def _without(recipe: Recipe | None, why: str, remedy: str) -> list[Check]:
    """The lines where the Hub does not answer: no fault, unless the recipe needs it."""
    needs = [] if recipe is None else downloads(recipe)
    checks = [make_check("hub", "bad" if needs else "note", why, remedy), *_tokens(None, 0.0)]
    if needs:
        checks[0]["found"] += f"; the recipe reads {' and '.join(needs)} from it"
    if recipe is not None and recipe.push.to is not None:
        said = f"whether {recipe.push.to} may be written could not be asked"
        checks.append(make_check("push", "bad", said, "leave `push.to` out and `deepdoctor push RUN` afterwards"))
    return checks


def downloads(recipe: Recipe) -> list[str]:
    """Hub ids of the recipe's model and rows that are not in the local cache."""
    from huggingface_hub import constants

    found = []
    if is_hub_id(recipe.model.id) and cached_model(recipe.model.id, recipe.model.revision) is None:
        found.append(recipe.model.id)
    source = recipe.data.source
    cached = Path(constants.HF_HUB_CACHE) / f"datasets--{source.replace('/', '--')}"
    if is_hub_id(source) and not cached.is_dir():
        found.append(source)
    return found
