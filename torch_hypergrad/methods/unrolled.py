"""Reverse mode through the recorded training steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..device.host_memory import total_memory
from ..history import GeneratorPath, History, KeptGraphs, Newest, Shelf, Snapshots, Within
from ..step.problem import Problem
from ..step.second_order import SecondOrder, check_second_order
from ..tune.hyperparameter_set import HyperparameterSet
from ..updates import UpdateRule
from .base import Method, Window
from .sweep import SweepWindow

DEFAULT_MEMORY = 0.1
"""The part of all memory that graphs may take, where nothing else is asked for."""


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
        memory: how much memory the graphs of steps may take, in bytes (an int), or as a part of all that the
            device has (a float). A step whose graph is kept need not be replayed, which is faster; the first
            ones that fit are kept, the others replayed. It never changes the answer. ``0`` replays all. None,
            the default, keeps a graph that weighs no more than the state at its step, and others within
            :data:`DEFAULT_MEMORY`, a tenth of the memory; but none where that was not asked for: with
            ``max_snapshots``, ``offload``, another ``second_order`` than ``"reverse"``, or captured steps.
        max_graphs: in the place of ``memory``, keep the graphs of the last so many steps, whatever they
            weigh.
        second_order: how the products with second derivatives are computed: ``"reverse"`` by double backward;
            ``"forward"`` by forward over reverse, which keeps no graph of a gradient; ``"finite_difference"``
            by central differences of gradients, which need first derivatives alone, and so work with compiled
            modules, fused attention and own kernels. The first two are exact; the report estimates the error
            of the third. Parts of the loss without a graph are constants with ``"reverse"`` alone (see
            ``docs/notation.md``).

    Memory: where every state is kept, one vector of parameters for each step, and those vectors of the
    optimizer's state that the derivative of the rule reads (none for a weight decay of SGD, all for Adam);
    with ``max_snapshots`` all vectors of each; one step's graph, and those that are kept; one vector more,
    the gradient, where every state is kept and ``second_order`` is not ``"reverse"`` or steps are captured.
    Time: a step with its graph costs a gradient with graph and one double backward, a replayed step a plain
    gradient more; by finite differences three gradients.

    Raises:
        TypeError: for numbers that are no ints, or a ``memory`` that is no number.
        ValueError: for numbers below 1, a negative ``memory`` or more than all, ``max_snapshots=1`` with a
            truncation, an unknown ``offload`` or ``second_order``, ``max_graphs`` or ``memory`` with another
            way than ``"reverse"``, or with ``offload``, or both.

    Source: Maclaurin, Duvenaud and Adams 2015; Franceschi et al. 2017, section 3.1.
    """

    truncation: int | None = None
    max_snapshots: int | None = None
    offload: Literal["cpu"] | None = None
    memory: int | float | None = None
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
        _check_graphs(self)

    @property
    def needs_second_derivatives(self) -> bool:
        return self.second_order != "finite_difference"

    def check(self, hyperparameters: HyperparameterSet, rule: UpdateRule, optimizer_name: str) -> None:
        """Every hyperparameter can be unrolled."""

    def cost(self, window: int, num_values: int, num_matvecs: int | None) -> float:
        return 1 + 3 * (window if self.truncation is None else min(window, self.truncation))

    def start(self, problem: Problem) -> Window:
        """An empty history."""
        return SweepWindow(problem, "Unrolled", history_of(problem, self), self.second_order)


def t1t2(second_order: SecondOrder = "reverse") -> Unrolled:
    r"""T1-T2: the last training step alone counts, ``Unrolled(truncation=1)``.

    With plain SGD, :math:`\theta' = \theta - \eta \nabla L_T(\theta, \lambda)`, the hypergradient is

    .. math:: \frac{d L_V(\theta', \lambda)}{d\lambda} = \partial_\lambda L_V(\theta', \lambda)
              - \eta\, (\partial_\theta \partial_\lambda L_T(\theta, \lambda))^\top \nabla L_V(\theta')

    with the mixed derivative at the weights before the step and the validation gradient after it. It is
    greedy: what a value does beyond the next step is left out. DARTS is the same step for a tensor that both
    losses read; where the training loss reads it detached, what is left is DARTS's first order.

    Args:
        second_order: as in :class:`Unrolled`. ``"finite_difference"`` is how DARTS computes the product.

    Raises:
        ValueError: for an unknown ``second_order``.

    Source: Luketina et al. 2016, section 2; Liu, Simonyan and Yang 2019, section 2.3.
    """
    return Unrolled(truncation=1, second_order=second_order)


def history_of(problem: Problem, method: Unrolled) -> History:
    """What keeps the steps that ``method`` will go back over."""
    transition, live = problem.transition, problem.live
    shelf = _shelf_of(problem, method)
    keeps_gradients = problem.records or method.second_order != "reverse"
    snapshots = Snapshots(
        transition,
        method.truncation,
        method.max_snapshots,
        method.offload,
        path=GeneratorPath(live.model.rng),
        keeps_gradients=keeps_gradients and method.max_snapshots is None,
    )
    return snapshots if shelf is None else KeptGraphs(transition, snapshots, shelf)


def _shelf_of(problem: Problem, method: Unrolled) -> Shelf | None:
    """Where graphs are kept, if any are."""
    if method.max_graphs is not None:
        return Newest(min(method.max_graphs, method.truncation or method.max_graphs))
    is_asked = method.memory is not None
    goes_with_none = method.offload or method.second_order != "reverse" or problem.records
    if method.memory == 0 or (not is_asked and (goes_with_none or method.max_snapshots is not None)):
        return None
    memory = DEFAULT_MEMORY if method.memory is None else method.memory
    if isinstance(memory, float):
        memory = int(memory * total_memory(problem.live.params[0].device))
    return Within(memory, with_light=not is_asked, max_age=method.truncation)


def _check_graphs(method: Unrolled) -> None:
    memory, max_graphs = method.memory, method.max_graphs
    if memory is not None and (not isinstance(memory, (int, float)) or isinstance(memory, bool)):
        raise TypeError(
            "Unrolled: memory must be an int (bytes), a float (a part of all memory) or None, got "
            f"{memory!r}."
        )
    if memory is not None and not 0 <= memory <= (1 if isinstance(memory, float) else math.inf):
        raise ValueError(
            f"Unrolled: memory must be at least 0, and a float at most 1, got {memory!r}. An int is a number "
            "of bytes, a float a part of all memory."
        )
    if memory is not None and max_graphs is not None:
        raise ValueError(
            f"Unrolled: memory={memory} and max_graphs={max_graphs} both say how many graphs are kept. Pass "
            "one of them."
        )
    goes_with_none = method.second_order != "reverse" or method.offload is not None
    if goes_with_none and (max_graphs is not None or memory):
        asked = f"memory={memory}" if max_graphs is None else f"max_graphs={max_graphs}"
        raise ValueError(
            f"Unrolled: {asked} keeps graphs of double backward in the device's memory, so it goes with "
            f"second_order='reverse' and offload=None, got second_order={method.second_order!r}, "
            f"offload={method.offload!r}. Leave {asked} out, or the other."
        )
