"""Reverse mode through the recorded training steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from ..ground.vectors import norm
from ..history import GeneratorPath, History, KeptGraphs, Snapshots
from ..step.problem import Problem
from ..step.second_order import SecondOrder, check_second_order, ways
from ..step.state import State, Step
from ..tune.hypergradient import Hypergradient
from ..tune.hyperparameter_set import HyperparameterSet
from ..updates import UpdateRule
from .base import Method, Statistics, Validate, Window


@dataclass(frozen=True)
class Unrolled(Method):
    r"""Differentiates through the training steps since the last hyper step, last one first.

    With :math:`(\theta_{t+1}, s_{t+1}) = u(\theta_t, g_t, s_t, \lambda)`, the adjoints of
    :math:`\theta_{t+1}` and :math:`s_{t+1}` are pulled back through the update rule :math:`u` and then
    through the gradient :math:`g_t`, one step at a time: the graph of one step is all that ever lives. Exact
    for settings, batches and noise as recorded, and through the running statistics of normalizations
    (:func:`torch_hypergrad.register_buffers`); other buffers are constants.

    Args:
        truncation: only the last so many steps count (Williams and Peng 1990; Shaban et al. 2019). It changes
            the answer. None differentiates through all.
        max_snapshots: keep at most so many states while training and recompute the others, which keeps at
            most ``2 * max_snapshots + 3`` alive. It never changes the answer. None keeps every state. At
            least 2 with a truncation.
        offload: ``"cpu"`` keeps states and batches in CPU memory. It never changes the answer.
        max_graphs: keep the graphs of the last so many steps instead of replaying them, which is the fastest
            way for short windows, and takes the memory of as many graphs; those of steps that a truncation
            leaves out are not kept. It never changes the answer.
        second_order: how the products with second derivatives are computed: ``"reverse"`` by double backward;
            ``"forward"`` by forward over reverse, which keeps no graph of a gradient; ``"finite_difference"``
            by central differences of gradients, which need first derivatives alone, and so work with compiled
            modules, fused attention and own kernels. The first two are exact; the report estimates the error
            of the third. Parts of the loss without a graph are constants with ``"reverse"`` alone (see
            ``docs/notation.md``).

    Memory: ``(1 + number of state vectors) x parameters x snapshots``, and one step's graph; one vector more
    for each snapshot, its gradient, where every state is kept and ``second_order`` is not ``"reverse"`` or
    steps are captured. Time: a replayed step costs a gradient with graph and one double backward; by finite
    differences two gradients.

    Raises:
        TypeError: for numbers that are no ints.
        ValueError: for numbers below 1, ``max_snapshots=1`` with a truncation, an unknown ``offload`` or
            ``second_order``, or ``max_graphs`` with another way than ``"reverse"``, or with ``offload``.

    Source: Maclaurin, Duvenaud and Adams 2015; Franceschi et al. 2017, section 3.1.
    """

    truncation: int | None = None
    max_snapshots: int | None = None
    offload: Literal["cpu"] | None = None
    max_graphs: int | None = None
    second_order: SecondOrder = "reverse"

    def __post_init__(self) -> None:
        for name in ("truncation", "max_snapshots", "max_graphs"):
            number = getattr(self, name)
            if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
                raise TypeError(f"Unrolled: {name} must be an int or None, got {number!r}.")
            if number is not None and number < 1:
                raise ValueError(f"Unrolled: {name} must be at least 1, got {number}. None means no limit.")
        if self.truncation is not None and self.max_snapshots == 1:
            raise ValueError(
                "Unrolled: max_snapshots=1 with a truncation: the window moves on, so an older and a newer "
                "snapshot are needed at once. Pass max_snapshots=2 or more."
            )
        if self.offload not in (None, "cpu"):
            raise ValueError(f"Unrolled: offload must be 'cpu' or None, got {self.offload!r}.")
        check_second_order(self.second_order, "Unrolled")
        if self.max_graphs is not None and (self.second_order != "reverse" or self.offload is not None):
            raise ValueError(
                f"Unrolled: max_graphs={self.max_graphs} keeps graphs of double backward in the device's "
                "memory, so it goes with second_order='reverse' and offload=None, got "
                f"second_order={self.second_order!r}, offload={self.offload!r}. Leave max_graphs out, or the "
                "other."
            )

    @property
    def keeps_graphs(self) -> bool:
        return self.max_graphs is not None

    @property
    def needs_second_derivatives(self) -> bool:
        return self.second_order != "finite_difference"

    def check(self, hyperparameters: HyperparameterSet, rule: UpdateRule, optimizer_name: str) -> None:
        """Every hyperparameter can be unrolled."""

    def start(self, problem: Problem) -> Window:
        """An empty history."""
        return UnrolledWindow(problem, self)


class UnrolledWindow(Window):
    """A history, and the sweep over it."""

    def __init__(self, problem: Problem, method: Unrolled) -> None:
        self._problem = problem
        self._ways = ways(problem.transition.gradient, method.second_order)
        self._history = history_of(problem, method)
        self._kernels = partial(  # chosen once for a whole sweep
            problem.transition.gradient.kernels, twice_differentiable=method.needs_second_derivatives
        )

    def take(self, step: Step, state: State | None) -> tuple[Step, State]:
        assert state is not None
        return self._history.take(step, state)

    def steps(self) -> Iterable[Step]:
        return self._history.steps()

    def clear(self) -> None:
        self._history.clear()

    def state_dict(self) -> dict[str, Any]:
        return self._history.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._history.load_state_dict(saved)

    def hypergradient(self, validate: Validate) -> tuple[Hypergradient, Statistics]:
        total, validation = Hypergradient(self._problem.hyperparameters), validate()
        self._problem.objective.add_direct(validation, total)
        adjoint = self._problem.adjoint(validation)
        largest = last = norm(adjoint.params)
        way, error = self._ways(), None
        with self._kernels():
            for linearization in self._history.backward(way):
                adjoint = linearization.pull(adjoint, total)
                largest, error = torch.maximum(largest, norm(adjoint.params)), linearization.error
        growth = torch.where(last > 0, largest / last, torch.ones_like(last))
        return total, Statistics(product_error=error, adjoint_growth=growth)


def history_of(problem: Problem, method: Unrolled) -> History:
    """What keeps the steps that ``method`` will go back over."""
    transition, live = problem.transition, problem.live
    keeps_gradients = problem.records or method.second_order != "reverse"
    snapshots = Snapshots(
        transition,
        method.truncation,
        method.max_snapshots,
        method.offload,
        path=GeneratorPath(live.model.rng),
        keeps_gradients=keeps_gradients and method.max_snapshots is None,
    )
    if method.max_graphs is None:
        return snapshots
    return KeptGraphs(transition, snapshots, min(method.max_graphs, method.truncation or method.max_graphs))
