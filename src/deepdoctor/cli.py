"""The command line: parse, load the recipe, call a stage, print. Heavy imports live inside the commands."""

from __future__ import annotations

import sys

from cyclopts import App, CycloptsError
from cyclopts.exceptions import CoercionError

__all__ = ["app", "main"]

_COMMANDS = {
    "run": "The whole job: data, ask, train, ask, compare, export, push.",
    "data": "Check the rows, show what trains and what is masked.",
    "train": "Train the adapter of a run whose data stage is complete.",
    "compare": "Let base and tuned answer unseen questions; write the report.",
    "export": "Write the adapter and the merged model.",
    "push": "Publish what a run exported on the Hugging Face Hub.",
    "ask": "Ask both sides of a run a question.",
    "dashboard": "Show the curves and reports of runs in a page on this computer.",
    "plan": "Say what a recipe would take on this machine.",
    "doctor": "Check this machine, and what a recipe needs of it.",
    "login": "Store a Hugging Face or Weights & Biases token.",
    "recipe": "Print a recipe that comes along, to be changed.",
    "schema": "Print the JSON schema of a recipe.",
}

app = App(
    name="deepdoctor",
    help="Fine-tune an open reasoning model into a medical specialist on one GPU, and measure whether it got better.",
    version=lambda: __import__("deepdoctor").__version__,
    suppress_keyboard_interrupt=False,
)
for _name, _help in _COMMANDS.items():
    # By name, so that `deepdoctor --help` imports none of it.
    app.command(f"deepdoctor.commands:{_name}_command", name=_name, help=_help)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed, 2 usage, 130 stopped by the user."""
    from deepdoctor.errors import DeepDoctorError

    try:
        result = app(
            sys.argv[1:] if arguments is None else arguments,
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
        return int(result or 0)
    except CycloptsError as error:
        return _fail(_flat(error), "`deepdoctor --help` lists commands, `deepdoctor COMMAND --help` its options", 2)
    except DeepDoctorError as error:
        return _fail(error.message, error.hint, error.exit_code)
    except KeyboardInterrupt:
        return _fail("stopped", "complete stages are kept: run again with `--resume`", 130)
    except BrokenPipeError:
        return 0
    except OSError as error:
        return _fail(
            f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), "free some space or mend the path", 1
        )


def _flat(error: CycloptsError) -> str:
    text = " ".join(str(error).split())
    return text.replace("Invalid value", "invalid value", 1) if isinstance(error, CoercionError) else text


def _fail(message: str, hint: str | None, code: int) -> int:
    from deepdoctor.publish.secrets import redact

    print(f"error: {redact(message)}", file=sys.stderr)
    if hint:
        print(f"\nhint: {redact(hint)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
