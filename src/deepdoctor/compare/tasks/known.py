"""Find a question set by name, or take a file of one's own as one."""

from __future__ import annotations

import difflib
from pathlib import Path

from deepdoctor.compare.tasks import medmcqa, medqa, medxpertqa, mmlu_pro_health, pubmedqa
from deepdoctor.compare.tasks.task import Task
from deepdoctor.errors import UsageError

__all__ = ["TASKS", "find_task"]

TASKS = {m.TASK.name: m.TASK for m in (medqa, medmcqa, mmlu_pro_health, medxpertqa, pubmedqa)}


def find_task(name: str) -> tuple[Task, Path | None]:
    """Return the task of a name or of a questions file, and the file where one was named.

    name: a key of TASKS, or a ``.jsonl`` file of questions. A file that carries a known task's usual name is that task.
    Raises UsageError for anything else, with the nearest name.
    """
    if name in TASKS:
        return TASKS[name], None
    if name.endswith(".jsonl"):
        path = Path(name)
        known = next((task for task in TASKS.values() if task.file == path.name), None)
        own = Task(path.stem, "1", path.name, "not stated", path.name, "not stated", (2, 26))
        return known or own, path
    near = difflib.get_close_matches(name.lower().replace("_", "-"), TASKS, n=1, cutoff=0.5)
    raise UsageError(
        f"--task {name!r} is neither a known question set ({', '.join(TASKS)}) nor a .jsonl file",
        f"did you mean `{near[0]}`?" if near else "give the questions file: `--task FILE.jsonl`",
    )
