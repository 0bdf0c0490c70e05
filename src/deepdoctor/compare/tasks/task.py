"""What is said of a question set before anybody answers it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Task"]


@dataclass(frozen=True, slots=True)
class Task:
    """A question set: where it comes from, how it is asked and counted, and what it cannot show.

    name: as given to ``--task``. version: raised when protocol or counting change. source: authors and split. licence:
    of the questions. file: usual name of the questions file. protocol: how it is asked. options: fewest and most.
    questions, distinct: of the whole public set, as rows and as different questions; None where not known.
    cluster_field: the field that joins questions which vary together. harm_margin: a share; where it is given the set
    is a harm check (can a loss beyond the margin be ruled out), and neither adjusted by Holm nor pooled.
    traps: sentences for the report's limits.
    """

    name: str
    version: str
    source: str
    licence: str
    file: str
    protocol: str
    options: tuple[int, int]
    questions: int | None = None
    distinct: int | None = None
    cluster_field: str = "dup_group"
    harm_margin: float | None = None
    traps: tuple[str, ...] = ()
