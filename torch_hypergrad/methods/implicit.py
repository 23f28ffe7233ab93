"""The implicit function theorem at the current weights."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, TypeAlias

from torch import Tensor

from ..capture import Captured
from ..curvature import BatchGraph, GradientGraph, Pull, captured_outputs
from ..hyperparameter_set import HyperparameterSet
from ..readings import in_turn, now_or_later
from ..records import State, Step
from ..second_order import MeanGradient, SecondOrder, check_second_order, way_of
from ..solvers import SolveInfo, Solver
from ..solvers.base import Matvec, check_positive_int
from ..stationarity import Derivatives, Space, Stationarity, product
from ..training import Training
from ..trajectory import pack_step, unpack_step
from ..updates import UpdateRule
from .base import Method, Recording, Statistics, Validation, add_direct

Answer: TypeAlias = tuple[Tensor, list[Tensor | None], tuple[Any, ...]]
"""q, its mixed product for each tuned tensor of the training loss, and the statistics."""


@dataclass(frozen=True)
class Implicit(Method):
    r"""Takes the current weights for the training optimum :math:`F(\theta, \lambda) = 0` and differentiates that.

    .. math:: \frac{dL_{val}}{d\lambda} = \partial_\lambda L_{val} - (\partial_\lambda F)^\top q,
              \qquad (\partial_\theta F)^\top q = \nabla_\theta L_{val}

    F is the optimizer's stationarity: the gradient plus weight decay, which for decoupled decay (AdamW) is scaled by the
    frozen preconditioner. ``grad_transform`` does not move the optimum and is left out. There is no trajectory: weights
    may be changed or loaded between steps.

    Args:
        solver: how to solve for q: :class:`CG`, :class:`Nystrom`, :class:`Neumann`, :class:`Cholesky` or :class:`Identity`.
        num_batches: F is the mean over the last so many training batches.
        curvature: what stands for :math:`\partial_\theta g` in the system: the ``"hessian"``, which is exact, or
            ``"gauss_newton"``, :math:`J^\top H_{loss} J`, which is positive semi-definite and takes the model for linear.
            It needs a training loss that depends on the parameters through the model's outputs alone, and is convex in
            them. Mixed products are exact with both.
        preconditioner: ``"second_moments"`` gives the solver the system in the optimizer's own units,
            :math:`D^{-1/2} A D^{-1/2} y = D^{-1/2} b` and :math:`q = D^{-1/2} y`, with :math:`D = \sqrt{\hat v} + \epsilon`
            of Adam and its family. The solver's damping is then added in these units, :math:`A + damping\, D`; the
            residual is that of the system :math:`(A + damping\, D)\, q = b` itself, at the price of one more product.
        second_order: how the products with second derivatives are computed; see :class:`Unrolled`.

    Only what moves the optimum can be tuned: weight decay and the like, and tensors in the training loss. ``lr``,
    ``betas`` or ``momentum`` are refused.

    Raises:
        TypeError, ValueError: for a solver that is none, ``num_batches`` below 1, another curvature, preconditioner or
            second_order; and for an optimizer without second moments, when the HyperOptimizer is made.

    Source: Bengio 2000; Pedregosa 2016; Lorraine, Vicol and Duvenaud 2020.
    """

    solver: Solver
    num_batches: int = 1
    curvature: Literal["hessian", "gauss_newton"] = "hessian"
    preconditioner: Literal["second_moments"] | None = None
    second_order: SecondOrder = "reverse"

    replays: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise TypeError(f"Implicit: solver must be a Solver such as Neumann(20), got {self.solver!r}.")
        check_positive_int(self.num_batches, "Implicit: num_batches")
        if self.curvature not in ("hessian", "gauss_newton"):
            raise ValueError(f"Implicit: curvature must be 'hessian' or 'gauss_newton', got {self.curvature!r}.")
        check_second_order(self.second_order, "Implicit")
        if self.curvature == "gauss_newton" and self.second_order != "reverse":
            raise ValueError(
                "Implicit: curvature='gauss_newton' is computed through the graph of the model's outputs, so it goes with "
                f"second_order='reverse', got {self.second_order!r}."
            )
        if self.preconditioner not in (None, "second_moments"):
            raise ValueError(f"Implicit: preconditioner must be 'second_moments' or None, got {self.preconditioner!r}.")

    @property
    def needs_second_derivatives(self) -> bool:
        return self.second_order != "finite_difference"

    def check(self, hyperparameters: HyperparameterSet, rule: UpdateRule, optimizer_name: str) -> None:
        """Refuses settings that do not move the optimum, and a preconditioner that the optimizer does not have."""
        if rule.stationarity is None:
            raise ValueError(
                f"{optimizer_name} has no stationarity, the equation that holds at its training optimum, so the implicit "
                "method cannot differentiate it. Use method=Unrolled(), or register its rule with a stationarity."
            )
        if self.preconditioner is not None and rule.preconditioner is None:
            raise ValueError(
                f"{optimizer_name} keeps no second moments, so Implicit(preconditioner='second_moments') has nothing to scale "
                "the system by. Pass preconditioner=None, or train with Adam, AdamW, RMSprop, Adagrad or the like."
            )
        for setting in hyperparameters.settings:
            name = setting.spec.name
            if name not in rule.moves_optimum:
                able = ", ".join(rule.moves_optimum) or "none"
                raise ValueError(
                    f"{name!r} cannot be tuned with Implicit: it changes the way to the training optimum, not the optimum, "
                    "so its implicit hypergradient is zero although training depends on it. Use method=Unrolled(). Settings "
                    f"of {optimizer_name} that move the optimum: {able}."
                )
            if setting.spec.per == "step":
                raise ValueError(
                    f"Hyperparameter({name!r}, per='step') cannot be tuned with Implicit: an optimum has no training steps. "
                    "Use method=Unrolled(), or per='group'."
                )

    def start(self, training: Training) -> Recording:
        """No batches yet."""
        return ImplicitRecording(training, self)


class ImplicitRecording(Recording):
    """The last training batches."""

    checks_parameters = False

    def __init__(self, training: Training, method: Implicit) -> None:
        self._training, self._method = training, method
        self._steps: deque[Step] = deque(maxlen=method.num_batches)
        self.reads_states = not training.optimizer_can_step
        self._way = way_of(training, method.second_order)
        self._replayed: Captured | None = None
        if method.second_order == "reverse" and training.rule.elementwise and not method.solver.waits:
            self._replayed = training.captured(self._answer_of_batch, "the solve of the implicit method")

    def take(self, step: Step, state: State | None) -> tuple[Step, State | None]:
        if state is None:
            step, after = self._training.take_with_optimizer(step), None
        else:
            step, after, _ = self._training.take(step, state)
        self._steps.append(step)
        return step, after

    def steps(self) -> Iterable[Step]:
        return self._steps

    def clear(self) -> None:
        self._steps.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": [pack_step(step) for step in self._steps]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._steps.clear()
        self._steps.extend(unpack_step(step) for step in saved["steps"])

    def hypergradient(self, validation: Validation) -> tuple[list[Tensor], Statistics]:
        training, hyperparameters = self._training, self._training.hyperparameters
        state = training.capture()
        if self._replayed is not None and len(self._steps) == 1:
            grads, answer = self._gradient(), partial(self._replay, self._replayed, state)
        else:
            graph = self._graph(state)
            grads, answer = graph.mean(), partial(self._answer, graph)
        stationarity = Stationarity(training, self._steps[-1], state, grads)
        b = stationarity.space.joined(validation.grads)
        diagonal = None if self._method.preconditioner is None else stationarity.preconditioner()
        q, mixed, found = answer(stationarity.space, stationarity.derivatives(), b, diagonal)
        totals = hyperparameters.zero_adjoints()
        stationarity.pull_tuned(q, totals)
        for total, part in zip(totals[len(hyperparameters.settings) :], mixed):
            if part is not None:
                total += part
        gradients = [-g for g in hyperparameters.reduce(totals)]
        return add_direct(hyperparameters, gradients, validation), Statistics(*found)

    def _gradient(self) -> list[Tensor | None]:
        """The gradient at the current weights on the last batch."""
        self._training.return_to(self._steps[-1])
        return self._training.plain_gradients(self._steps[-1].batch)[1]

    def _graph(self, state: State) -> GradientGraph | MeanGradient:
        """The mean gradient at the current weights on the recorded batches, and products with its derivative."""
        training, method = self._training, self._method
        if method.second_order != "reverse" or (training.captures and method.curvature == "hessian"):
            return MeanGradient(training, self._steps, state, self._way())
        batches = []
        for step in self._steps:
            training.return_to(step)
            batches.append(self._batch_graph(step.batch))
        return GradientGraph(batches, training.params, training.hyperparameters.loss_tensors)

    def _batch_graph(self, batch: Any) -> BatchGraph:
        with captured_outputs(self._training.model if self._method.curvature == "gauss_newton" else None) as outputs:
            loss, grads, _ = self._training.gradients(batch, create_graph=True)
        return BatchGraph(loss, grads, outputs)

    def _replay(self, replayed: Captured, state: State, *inputs: Any) -> Answer:
        """:meth:`_answer` as one recorded function of the last batch and ``inputs``."""
        assert state.buffers is not None
        self._training.model_state.set_buffers(state.buffers)
        self._training.return_to(self._steps[-1])
        return replayed((self._steps[-1].batch, *inputs))

    def _answer_of_batch(self, inputs: Any) -> Answer:
        batch, *others = inputs
        training = self._training
        graph = GradientGraph([self._batch_graph(batch)], training.params, training.hyperparameters.loss_tensors)
        return self._answer(graph, *others)

    def _answer(
        self,
        graph: GradientGraph | MeanGradient,
        space: Space,
        derivatives: Derivatives,
        b: Tensor,
        diagonal: Tensor | None,
    ) -> Answer:
        """All that takes products with the gradient's derivative. Numbers of the update rule are in ``derivatives`` and
        ``diagonal``, as tensors, so that none is kept by a recording."""
        pull: Pull = graph.hessian_product
        check = None
        if isinstance(graph, GradientGraph) and self._method.curvature == "gauss_newton":
            pull, check = graph.gauss_newton()
        q, info = self._solve(lambda v: product(space, derivatives, v, pull), b, diagonal)
        mixed = graph.mixed_product(space.per_parameter(derivatives(q)[1]))
        product_error = None if graph.error is None else now_or_later([graph.error], lambda numbers: numbers[0])
        return q, mixed, (info.num_matvecs, in_turn(check, info.residual), product_error)

    def _solve(self, matvec: Matvec, b: Tensor, diagonal: Tensor | None) -> tuple[Tensor, SolveInfo]:
        solver = self._method.solver
        if diagonal is None:
            return solver.solve(matvec, b)
        scale = diagonal.rsqrt()
        y, info = solver.solve(lambda v: matvec(v * scale).mul_(scale), b * scale)
        q = y.mul_(scale)
        if info.residual is None:
            return q, info
        norms = [(b - matvec(q)).sub_(diagonal * q, alpha=info.damping).norm(), b.norm()]
        relative = now_or_later(norms, lambda found: found[0] / found[1] if found[1] > 0 else 0.0)
        return q, replace(info, num_matvecs=info.num_matvecs + 1, residual=in_turn(info.residual, relative))
