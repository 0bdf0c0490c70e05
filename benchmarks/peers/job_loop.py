"""What every answering process does with its jobs, ours and the peers': one after another, a result line for each."""

from __future__ import annotations

import gc
import json
import traceback
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["do_jobs"]


def do_jobs(
    jobs: list[dict[str, Any]], answer: Callable[[dict[str, Any]], dict[str, Any]], import_s: float, load_s: float
) -> None:
    """Do the jobs in turn, and print the result line of each as soon as it is there.

    A job that fails says so in its line, and the next is tried. answer: from a job to its figures.
    """
    for number, job in enumerate(jobs):
        try:
            if torch.cuda.is_available():
                gc.collect()
                torch.cuda.empty_cache()
            result = answer(job)
        except Exception:
            result = {"error": traceback.format_exc()[-3000:]}
        if number:
            result["to_first_token_s"] = None  # the jobs before it are no part of a start
        result |= {"number": number, "import_s": import_s, "load_s": load_s}
        print("RESULT", json.dumps(result), flush=True)
