"""What a measuring process does."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch

from .cases import Case, make_problem
from .contestants import REFERENCES, Contestant
from .measure import Meter, Outcome
from .profiling import Clock, clocked

WARM_UP = 2  # steps, or terms


def num_steps(case: Case) -> int:
    return 1 if case.task == "implicit" else case.size


def measure(contestant: Contestant, case: Case, profile: bool = False) -> Outcome:
    """One contestant on one case: growth of memory at the first time, after a warm-up of imports,
    thread pools and kernels, and seconds at the second time, as in a training loop that takes many
    hyper steps, in memory that it had before."""
    small = replace(case, size=min(WARM_UP, case.size))
    contestant.run(make_problem(small, num_steps(small)), Meter())
    first, second, clock = Meter(), Meter(released=False), Clock()
    contestant.run(make_problem(case, num_steps(case)), first)
    with clocked(clock) if profile else nullcontext():
        answer = contestant.run(make_problem(case, num_steps(case)), second)
    return Outcome(
        second.seconds, first.memory, None if answer is None else answer.double().numpy(), clock.seconds
    )


def reference(case: Case) -> Outcome:
    """The answer along a fixed direction, in float64 and by other means."""
    problem, meter = make_problem(case, num_steps(case), torch.float64), Meter()
    with meter:
        value = REFERENCES[case.task](problem)
    return Outcome(meter.seconds, meter.memory, np.array([value]))
