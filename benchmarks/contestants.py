"""Who takes part in which task."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from torch_hypergrad import HyperOptimizer, Hyperparameter, Implicit, Neumann, Unrolled
from torch_hypergrad.methods import Method

from . import peers, yardsticks
from .cases import NEUMANN_DAMPING, Case, Problem, joined, neumann_scale
from .models import loss_of

MAX_GRAPHS = 100
BUDGETS = {"cnn_strided": 12_000_000}  # bytes, by model: too few for the graphs of all steps
TOLERANCE = 2e-2


@dataclass(frozen=True)
class Contestant:
    """One row of a table.

    Args:
        name: in the table.
        what: in the legend.
        run: prepares, does the work under the meter, and returns the answer as a vector, if there is one.
        tolerance: how far the answer may be from the others', as a part of the norm,
            before it counts as wrong.
    """

    name: str
    what: str
    run: Callable[[Problem, AbstractContextManager], Tensor | None]
    whose: Literal["ours", "peer", "yardstick"] = "ours"
    tolerance: float = TOLERANCE


# ---- ours --------------------------------------------------------------------------------------------------


def hyper_optimizer(problem: Problem, method: Method, **options: bool) -> HyperOptimizer:
    tune = [Hyperparameter("weight_decay", per=problem.case.per)]
    optimizer = problem.optimizer(problem.model.parameters())
    frozen = partial(torch.optim.SGD, lr=0.0)
    return HyperOptimizer(problem.model, optimizer, loss_of, tune, method, frozen, **options)


def unrolled(problem: Problem, meter: AbstractContextManager, **options: object) -> Tensor:
    method = Unrolled(**options)  # type: ignore[arg-type]
    with meter:
        hyper = hyper_optimizer(problem, method)
        for batch in problem.batches:
            hyper.step(batch)
        return joined(hyper.hypergradient(problem.val).values())


def few_snapshots(problem: Problem, meter: AbstractContextManager) -> Tensor:
    return unrolled(problem, meter, max_snapshots=2 * math.isqrt(problem.case.num_steps))


def budget(problem: Problem, meter: AbstractContextManager) -> Tensor:
    return unrolled(problem, meter, memory=BUDGETS[problem.case.model])


def neumann(case: Case) -> Implicit:
    return Implicit(Neumann(case.size, neumann_scale(case), NEUMANN_DAMPING))


def implicit(problem: Problem, meter: AbstractContextManager) -> Tensor:
    begin = [p.detach().clone() for p in problem.model.parameters()]
    hyper = hyper_optimizer(problem, neumann(problem.case))
    hyper.step(problem.batches[0])
    with torch.no_grad():  # back to where the others are: the implicit method takes the weights as they stand
        for p, value in zip(problem.model.parameters(), begin):
            p.copy_(value)
    with meter:
        return joined(hyper.hypergradient(problem.val).values())


def steps(problem: Problem, meter: AbstractContextManager, method: Method) -> Tensor:
    before = joined(problem.model.parameters())
    hyper = hyper_optimizer(problem, method)
    with meter:
        for batch in problem.batches:
            hyper.step(batch)
    return joined(problem.model.parameters()) - before


# ---- the tables --------------------------------------------------------------------------------------------


def yardstick(name: str, run: Callable[[Problem, AbstractContextManager], Tensor | None]) -> Contestant:
    return Contestant(name, _legend(run), run, "yardstick")


def peer(name: str, run: Callable[[Problem, AbstractContextManager], Tensor | None]) -> Contestant:
    return Contestant(name, _legend(run), run, "peer")


def _legend(run: Callable) -> str:
    return (run.__doc__ or "").rstrip(".").replace("``", "`")


CONTESTANTS: dict[str, list[Contestant]] = {
    "unrolled": [
        yardstick("plain", yardsticks.plain),
        yardstick("floor", yardsticks.floor),
        Contestant("unrolled", "`Unrolled()`: chooses by itself which steps keep their graphs", unrolled),
        Contestant("budget", "`Unrolled(memory=12_000_000)`: chooses within 12 MB", budget),
        Contestant("replay", "`Unrolled(memory=0)`: every step is taken again", partial(unrolled, memory=0)),
        Contestant(
            "graphs", f"`Unrolled(max_graphs={MAX_GRAPHS})`", partial(unrolled, max_graphs=MAX_GRAPHS)
        ),
        Contestant("few snapshots", "`Unrolled(max_snapshots=2 * isqrt(T))`", few_snapshots),
        Contestant(
            "finite difference",
            '`Unrolled(second_order="finite_difference")`',
            partial(unrolled, second_order="finite_difference"),
            tolerance=0.2,  # not exact where gradients jump, as with ReLU: see docs/how_to_choose.md
        ),
        Contestant(
            "forward", '`Unrolled(second_order="forward")`', partial(unrolled, second_order="forward")
        ),
        peer("higher", peers.higher_setting),
        peer("higher, penalty", peers.higher_penalty),
        peer("TorchOpt", peers.torchopt_setting),
        peer("TorchOpt, penalty", peers.torchopt_penalty),
    ],
    "implicit": [
        yardstick("double backwards", yardsticks.double_backwards),
        Contestant("implicit", "`Implicit(Neumann(K))`", implicit),
        peer("TorchOpt", peers.torchopt_implicit),
    ],
    "steps": [
        yardstick("plain", yardsticks.plain_steps),
        Contestant(
            "implicit",
            "`hyper.step` with `Implicit`: nothing is recorded",
            partial(steps, method=Implicit(Neumann(10))),
        ),
        Contestant(
            "unrolled",
            "`hyper.step` with `Unrolled()`: the window is recorded",
            partial(steps, method=Unrolled()),
        ),
    ],
}

REFERENCES: dict[str, Callable[[Problem], float]] = {
    "unrolled": yardsticks.unrolled_reference,
    "implicit": yardsticks.implicit_reference,
    "steps": yardsticks.steps_reference,
}


def contestants_of(case: Case) -> list[Contestant]:
    """Those that take part."""
    left_out = set()
    if case.model not in BUDGETS:
        left_out.add("budget")
    if case.per == "group":
        left_out.add("higher, penalty")  # for peers that need it: higher's own way is faster
    if case.optimizer != "sgd" or case.size >= 1000 or case.model == "resnet18":
        left_out.add("finite difference")  # with ReLU it is too far off there to be held to anything
    chosen = [c for c in CONTESTANTS[case.task] if case.only is None or c.name in case.only]
    return [c for c in chosen if c.name not in left_out]
