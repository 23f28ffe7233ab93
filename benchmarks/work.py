"""What a measuring process does."""

from __future__ import annotations

import cProfile
from dataclasses import replace
from pathlib import Path
from types import CodeType

import numpy as np
import torch

from .cases import Case, make_problem
from .contestants import REFERENCES, Contestant
from .measure import Meter, Outcome

WARM_UP = 2  # steps, or terms
NUM_LATER = 3
LONG = 1000
"""So many steps take minutes, in which noise averages out: there is one later window and one repeat."""


def measure(contestant: Contestant, case: Case) -> Outcome:
    """One contestant on one case: time and growth of memory in the first window, after a warm-up of imports,
    thread pools and kernels, and time in later ones, in memory that the process had before."""
    warm_up(contestant, case)
    first, later = Meter(), [Meter(released=False) for _ in range(NUM_LATER if case.size < LONG else 1)]
    answers: list[np.ndarray] = []
    for meter in (first, *later):
        found = contestant.run(make_problem(case), meter)
        answer = None if found is None else found.double().numpy()
        if answer is not None and not (answers and np.array_equal(answers[-1], answer)):
            answers.append(answer)
    return Outcome(first.seconds, tuple(meter.seconds for meter in later), first.memory, answers)


def warm_up(contestant: Contestant, case: Case) -> None:
    contestant.run(make_problem(replace(case, size=min(WARM_UP, case.size))), Meter())


def profile(contestant: Contestant, case: Case) -> Outcome:
    """The functions that one window spends its time in."""
    warm_up(contestant, case)
    profiler = cProfile.Profile()
    contestant.run(make_problem(case), profiler)
    found = [(name(e.code), e.callcount, e.inlinetime, e.totaltime) for e in profiler.getstats()]
    return Outcome(functions=sorted(found, key=lambda function: -function[2]))


def name(code: CodeType | str) -> str:
    """Where a function stands; what is not Python's has a name alone."""
    if isinstance(code, str):
        return code.strip("<>")
    path = Path(code.co_filename)
    return f"{path.parent.name}/{path.name}: {code.co_name}"


def reference(case: Case) -> Outcome:
    """The answer along a fixed direction, in float64 and by other means."""
    problem, meter = make_problem(case, torch.float64), Meter()
    with meter:
        value = REFERENCES[case.task](problem)
    return Outcome(meter.seconds, answers=[np.array([value])])
