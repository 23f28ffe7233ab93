"""What training minimizes at the current hyperparameters, as a function of one flat vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import NonFiniteError, SolverError
from .mean_gradient import MeanGradient
from .problem import Problem
from .second_order import Way
from .state import PerParameter, State, Step
from .stationarity import OptimumCondition, product


class InnerProblem:
    r"""The mean training loss over some batches, with what the optimizer's rule adds to it: its stationarity
    is :math:`F = g + C\theta`, so that

    .. math:: f(\theta) = L(\theta) + \tfrac12 \theta^\top C \theta, \qquad \nabla f = F.

    Vectors are flat, over the parameters that have a gradient, of shape ``(n,)``. Random numbers, modes and
    buffers are those of the batches' recording each time: it is one and the same function.

    Args:
        steps: the batches as they are about to be recorded.
        way: how gradients are traced for :meth:`product`.

    Raises:
        NonFiniteError: if the loss is not finite at the current weights.
        ValueError: if the stationarity is no gradient of such a function.
    """

    def __init__(self, problem: Problem, steps: Sequence[Step], way: Way) -> None:
        self._problem, self._steps, self._way = problem, [replace(s, given=None) for s in steps], way
        self._stage = problem.transition.gradient.untransformed()
        self._start = problem.live.state()
        self._found = loss, grads = self._loss(self._start)
        if not bool(loss.isfinite()):
            raise NonFiniteError(
                f"The training loss is {float(loss)} at the weights that fit begins at. Weights that have "
                "diverged need a new start (restart(), or load others); check the batch too."
            )
        try:
            self._space = self._condition(self._start, grads).space
            self.start = self._space.joined(self._start.per_parameter(self._num_params))
            """The current parameters."""
            is_function = self._is_function(grads)
        except SolverError:  # of a rule that needs the optimizer's state
            is_function = False
        if not is_function:
            raise ValueError(
                "fit minimizes the training loss with the weight decay that is added to its gradient, "
                f"and the optimum of {type(problem.live.optimizer.optimizer).__name__} with its present "
                "settings is none of that: it depends on the state of the optimizer (a decoupled decay), or "
                "maximize=True. Train with step(), or wrap SGD or Adam."
            )

    @property
    def _num_params(self) -> int:
        return len(self._problem.live.params)

    def value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f, of shape ``()``, and its gradient."""
        state = self.state(x)
        loss, grads = self._found if torch.equal(x, self.start) else self._loss(state)
        residual = self._condition(state, grads).value()
        added = residual - self._space.joined(grads)
        return loss + 0.5 * torch.dot(x, added), residual

    def hessian(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """``v -> H v`` with the Hessian of f at ``x``."""
        state, traced = self.state(x), []
        for step in self._steps:
            with self._problem.live.model.copied_buffers():
                traced.append(self._way(self._stage, step, state))
        mean = MeanGradient(traced)
        derivatives = self._condition(state, mean.value()).derivatives()
        return lambda v: product(self._space, derivatives, v, mean.product)

    def state(self, x: Tensor) -> State:
        """The state with parameters ``x``; those without a gradient, and all else, as they stand."""
        every = self._start.per_parameter(self._num_params)
        for bucket, part in zip(self._space.buckets, self._space.split(x)):
            for i, piece in bucket.scatter(part):
                every[i] = piece
        parts = [part._replace(param=part.bucket.gather(every)) for part in self._start.parts]
        return replace(self._start, parts=tuple(parts))

    def _loss(self, state: State) -> tuple[Tensor, PerParameter]:
        """The mean loss and its gradient."""
        found = []
        for step in self._steps:
            with self._problem.live.at(state):
                self._stage.return_to(step)
                found.append(self._stage.plain(step))
        losses, gradients = [one.loss for one in found], [one.grads for one in found]
        return torch.stack(losses).mean(), [_mean(of_one) for of_one in zip(*gradients)]

    def _condition(self, state: State, grads: PerParameter) -> OptimumCondition:
        return OptimumCondition(self._problem.transition.update, self._steps[-1], state, grads)

    def _is_function(self, grads: PerParameter) -> bool:
        """Whether the stationarity is ``g + C theta`` with a constant C: else F at other weights is none of
        one function's gradients."""
        g, start = self._space.joined(grads), self._start
        added = self._condition(start, grads).value() - g
        without = self._condition(self._without_rule_state(start), grads).value() - g
        twice = self._condition(self._without_rule_state(self.state(2 * self.start)), grads).value() - g
        rounding = 100 * torch.finfo(added.dtype).eps * (g.abs().max() + added.abs().max())
        differences = torch.stack([without - added, twice / 2 - added])
        return bool((differences.abs() <= rounding).all())

    @staticmethod
    def _without_rule_state(state: State) -> State:
        return replace(state, parts=tuple(part._replace(rule_state={}) for part in state.parts))


def _mean(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [t for t in tensors if t is not None]
    return torch.stack(present).sum(0) / len(tensors) if present else None
