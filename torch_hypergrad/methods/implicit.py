"""The implicit function theorem at the current weights."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..device.capture import Captured
from ..ground.autodiff import add_lists
from ..history.packing import pack_step, unpack_step
from ..solvers import SolveInfo, Solver
from ..solvers.base import Matvec, check_positive_int
from ..step.gauss_newton import GaussNewton
from ..step.mean_gradient import MeanGradient
from ..step.problem import Problem
from ..step.reverse import Reverse
from ..step.second_order import SecondOrder, Way, check_second_order, ways
from ..step.state import PerParameter, State, Step
from ..step.stationarity import Derivatives, OptimumCondition, Space, product
from ..step.transition import optimizer_can_step, take_with_optimizer
from ..step.validation import Validation
from ..tune.hypergradient import Hypergradient
from ..tune.hyperparameter_set import HyperparameterSet
from ..updates import UpdateRule
from .base import Method, Statistics, Validate, Window


class Answer(NamedTuple):
    """All that takes products with the gradient's derivative.

    Args:
        q: the solution of the linear system.
        mixed: its mixed product for each tuned tensor of the training loss.
        numbers: what the solver asks to be judged.
        doubts: for each batch, what its products are to be judged by.
    """

    q: Tensor
    mixed: list[Tensor | None]
    num_matvecs: int
    residual: float | Tensor | None
    numbers: dict[str, Tensor]
    product_error: Tensor | None
    doubts: list[Tensor]


class System(NamedTuple):
    """What is to be solved.

    Args:
        b: the right-hand side.
        diagonal: that of the preconditioner; None for none.
        x0: where to start; None for 0.
        rtol: the tolerance of this solve; None for the solver's own.
    """

    b: Tensor
    diagonal: Tensor | None
    x0: Tensor | None
    rtol: float | None


@dataclass(frozen=True)
class Implicit(Method):
    r"""Takes the current weights for the training optimum :math:`F(\theta, \lambda) = 0` and differentiates
    that.

    .. math:: \frac{dL_{val}}{d\lambda} = \partial_\lambda L_{val} - (\partial_\lambda F)^\top q,
              \qquad (\partial_\theta F)^\top q = \nabla_\theta L_{val}

    F is the optimizer's stationarity: the gradient plus weight decay, which for decoupled decay (AdamW) is
    scaled by the frozen preconditioner. ``grad_transform`` does not move the optimum and is left out. There
    is no trajectory: weights may be changed or loaded between steps.

    Args:
        solver: how to solve for q: :class:`CG`, :class:`Nystrom`, :class:`Neumann`, :class:`Cholesky` or
            :class:`Identity`.
        num_batches: F is the mean over the last so many training batches.
        curvature: what stands for :math:`\partial_\theta g` in the system: the ``"hessian"``, which is exact,
            or ``"gauss_newton"``, :math:`J^\top H_{loss} J`, which is positive semi-definite and takes the
            model for linear. It needs a training loss that depends on the parameters through the model's
            outputs alone, and is convex in them. Mixed products are exact with both.
        preconditioner: ``"second_moments"`` gives the solver the system in the optimizer's own units,
            :math:`D^{-1/2} A D^{-1/2} y = D^{-1/2} b` and :math:`q = D^{-1/2} y`, with :math:`D = \sqrt{\hat
            v} + \epsilon` of Adam and its family. The solver's damping is then added in these units, :math:`A
            + damping\, D`; the residual is that of the system :math:`(A + damping\, D)\, q = b` itself, at
            the price of one more product.
        second_order: how the products with second derivatives are computed; see :class:`Unrolled`.

    Only what moves the optimum can be tuned: weight decay and the like, and tensors in the training loss.
    ``lr``, ``betas`` or ``momentum`` are refused.

    Raises:
        TypeError, ValueError: for a solver that is none, ``num_batches`` below 1, another curvature,
            preconditioner or second_order; and for an optimizer without second moments, when the
            HyperOptimizer is made.

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
            raise ValueError(
                f"Implicit: curvature must be 'hessian' or 'gauss_newton', got {self.curvature!r}."
            )
        check_second_order(self.second_order, "Implicit")
        if self.curvature == "gauss_newton" and self.second_order != "reverse":
            raise ValueError(
                "Implicit: curvature='gauss_newton' is computed through the graph of the model's outputs, "
                f"so it goes with second_order='reverse', got {self.second_order!r}."
            )
        if self.preconditioner not in (None, "second_moments"):
            raise ValueError(
                f"Implicit: preconditioner must be 'second_moments' or None, got {self.preconditioner!r}."
            )

    @property
    def needs_second_derivatives(self) -> bool:
        return self.second_order != "finite_difference"

    def check(self, hyperparameters: HyperparameterSet, rule: UpdateRule, optimizer_name: str) -> None:
        """Refuses settings that do not move the optimum, and a preconditioner that the optimizer does not
        have."""
        if rule.stationarity is None:
            raise ValueError(
                f"{optimizer_name} has no stationarity, the equation that holds at its training optimum, so "
                "the implicit method cannot differentiate it. Use method=Unrolled(), or register its rule "
                "with a stationarity."
            )
        if self.preconditioner is not None and rule.preconditioner is None:
            raise ValueError(
                f"{optimizer_name} keeps no second moments, so Implicit(preconditioner='second_moments') has "
                "nothing to scale the system by. Pass preconditioner=None, or train with Adam, AdamW, "
                "RMSprop, Adagrad or the like."
            )
        for setting in hyperparameters.settings:
            name = setting.spec.name
            if name not in rule.moves_optimum:
                able = ", ".join(rule.moves_optimum) or "none"
                raise ValueError(
                    f"{name!r} cannot be tuned with Implicit: it changes the way to the training optimum, "
                    "not the optimum, so its implicit hypergradient is zero although training depends on "
                    f"it. Use method=Unrolled(). Settings of {optimizer_name} that move the optimum: {able}."
                )
            if setting.granularity.is_per_step:
                raise ValueError(
                    f"Hyperparameter({name!r}, per='step') cannot be tuned with Implicit: an optimum has no "
                    "training steps. Use method=Unrolled(), or per='group'."
                )

    def cost(self, window: int, num_values: int, num_matvecs: int | None) -> float:
        return 3 + 2 * (num_matvecs or 0) * self.num_batches

    def start(self, problem: Problem) -> Window:
        """No batches yet."""
        return ImplicitWindow(problem, self)


class ImplicitWindow(Window):
    """The last training batches."""

    checks_parameters = False

    def __init__(self, problem: Problem, method: Implicit) -> None:
        self._problem, self._method = problem, method
        # The transformation of gradients does not move the optimum.
        self._gradient = problem.transition.gradient.untransformed()
        self._steps: deque[Step] = deque(maxlen=method.num_batches)
        self.reads_states = not optimizer_can_step(problem.hyperparameters)
        self._ways = ways(self._gradient, method.second_order)
        self._replayed: Captured | None = None
        self._solution: Tensor | None = None  # of the last solve, to start the next one from
        elementwise = problem.transition.update.rule.elementwise
        if method.second_order == "reverse" and elementwise and not method.solver.waits:
            self._replayed = self._gradient.captured(
                self._answer_of_batch, "the solve of the implicit method"
            )

    def take(self, step: Step, state: State | None) -> tuple[Step, State | None]:
        transition, after = self._problem.transition, None
        if state is None:
            step = take_with_optimizer(transition, step)
        else:
            step, after, _ = transition.take(step, state)
        self._steps.append(step)
        return step, after

    def note(self, step: Step) -> None:
        self._steps.append(replace(step, given=None))

    def steps(self) -> Iterable[Step]:
        return self._steps

    def clear(self) -> None:
        self._steps.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": [pack_step(step) for step in self._steps], "solution": self._solution}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._solution = saved["solution"]
        self._steps.clear()
        self._steps.extend(unpack_step(step) for step in saved["steps"])

    def hypergradient(self, validate: Validate) -> tuple[Hypergradient, Statistics]:
        problem, total = self._problem, Hypergradient(self._problem.hyperparameters)
        # At the current weights, whatever they were when the batches were recorded: no loss is what it was.
        steps = [replace(step, loss=None) for step in self._steps]
        state = problem.live.state()
        with problem.live.standing(state):
            validation = self._through_buffers(validate(), steps, state)
            problem.objective.add_direct(validation, total)
            if self._replayed is not None and len(steps) == 1:
                grads, answer = (
                    self._gradient_alone(steps[0], state),
                    partial(self._replay, self._replayed, steps[0], state),
                )
            else:
                mean = self._mean(steps, state)
                grads, answer = mean.value(), partial(self._answer, mean)
            condition = OptimumCondition(problem.transition.update, steps[-1], state, grads)
            b = condition.space.joined(validation.grads)
            diagonal = None if self._method.preconditioner is None else condition.preconditioner()
            system = System(b, diagonal, self._start(b), validate.rtol)
            found = answer(condition.space, condition.derivatives(), system)
        for doubts in found.doubts:
            problem.readings.ask([doubts], GaussNewton.judge)
        names = list(found.numbers)
        if names:
            numbers = [found.numbers[name] for name in names]
            problem.readings.ask(numbers, lambda read: self._method.solver.check(dict(zip(names, read))))
        self._solution = found.q.clone() if self._method.solver.warm_start else None
        condition.pull_tuned(-found.q, total)
        total.add_tensors([None if part is None else -part for part in found.mixed])
        return total, Statistics(found.num_matvecs, found.residual, found.product_error)

    def _start(self, b: Tensor) -> Tensor | None:
        """Where the solve is to begin: the last solution, if there is one of these parameters. One that is
        recorded takes 0 for none, so that it is the same each time."""
        if not self._method.solver.warm_start:
            return None
        last = self._solution
        if last is not None and last.shape == b.shape and last.dtype == b.dtype:
            return last.to(b.device)
        return None if self._replayed is None else torch.zeros_like(b)

    def _mean(self, steps: Sequence[Step], state: State) -> MeanGradient:
        """The mean gradient on the recorded batches, each with buffers of its own, which its graph may
        hold."""
        trace: Way = GaussNewton if self._method.curvature == "gauss_newton" else self._ways()
        traced = []
        for step in steps:
            with self._problem.live.model.copied_buffers():
                traced.append(trace(self._gradient, step, state))
        return MeanGradient(traced)

    def _through_buffers(self, validation: Validation, steps: Sequence[Step], state: State) -> Validation:
        """The total derivative of the validation loss: its buffers follow the weights and the tuned tensors,
        as the mean of what each batch would leave for good."""
        if validation.buffers is None:
            return validation
        share = tuple(None if b is None else b / len(steps) for b in validation.buffers)
        grads, direct = [validation.grads], [validation.direct]
        for step in steps:
            with self._problem.live.at(state):
                by_param, by_tensor, _ = self._gradient.pull_buffers(step, share, at_rest=True)
            grads.append(by_param)
            direct.append(by_tensor)
        return replace(validation, grads=add_lists(grads), direct=add_lists(direct))

    def _gradient_alone(self, step: Step, state: State) -> PerParameter:
        with self._problem.live.at(state):
            self._gradient.return_to(step)
            return self._gradient.plain(step).grads

    def _replay(self, replayed: Captured, step: Step, state: State, *inputs: Any) -> Answer:
        """:meth:`_answer` as one recorded function of the last batch and ``inputs``."""
        with self._problem.live.at(state):
            self._gradient.return_to(step)
            return Answer(*replayed((step.batch, *inputs)))

    def _answer_of_batch(self, inputs: Any) -> Answer:
        batch, *others = inputs
        kind = GaussNewton if self._method.curvature == "gauss_newton" else Reverse
        return self._answer(MeanGradient([kind(self._gradient, None, None, batch=batch)]), *others)

    def _answer(self, mean: MeanGradient, space: Space, derivatives: Derivatives, system: System) -> Answer:
        """Numbers of the update rule are in ``derivatives`` and ``system``, as tensors, so that none is kept
        by a recording."""
        q, info = self._solve(lambda v: product(space, derivatives, v, mean.product), system)
        mixed = mean.mixed(space.per_parameter(derivatives(q)[1]))
        return Answer(
            q, mixed, info.num_matvecs, info.residual, dict(info.numbers), mean.error, mean.doubts()
        )

    def _solve(self, matvec: Matvec, system: System) -> tuple[Tensor, SolveInfo]:
        solver, (b, diagonal, x0, rtol) = self._method.solver, system
        given: dict[str, Any] = {} if rtol is None else {"rtol": rtol}
        if diagonal is None:
            return solver.solve(matvec, b, **given if x0 is None else given | {"x0": x0})
        scale = diagonal.rsqrt()
        given |= {} if x0 is None else {"x0": x0 / scale}
        y, info = solver.solve(lambda v: matvec(v * scale).mul_(scale), b * scale, **given)
        q = y.mul_(scale)
        if info.residual is None:
            return q, info
        norm = b.norm()
        rest = (b - matvec(q)).sub_(diagonal * q, alpha=info.damping).norm()
        residual = rest / norm.masked_fill(norm == 0, 1)
        return q, replace(info, num_matvecs=info.num_matvecs + 1, residual=residual)
