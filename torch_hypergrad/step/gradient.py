"""The first stage of a training step: the loss, its gradient, and the buffers that it leaves; then
``grad_transform``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..device import readings
from ..device.capture import Captured, Recorder
from ..device.readings import Readings
from ..errors import TrajectoryError
from ..ground import autodiff
from .batch import is_as_seen, recorded
from .live import Live
from .running import RunningBuffers, Trace
from .state import Buffers, PerParameter, Step
from .user_functions import GradTransform, Loss, call_transform, check_loss


@dataclass(frozen=True)
class LossAndGradient:
    """A training loss and its gradient.

    Args:
        loss: the loss.
        grads: its gradient for each parameter, before any transformation.
        others: its gradient for each of the other tensors that were asked for.
        rng: the random number generators afterwards, where ``grad_transform`` finds them.
    """

    loss: Tensor
    grads: list[Tensor | None]
    others: Sequence[Tensor | None] = ()
    rng: tuple[Tensor, ...] = ()


class GradientStage:
    """A training loss, on recorded batches and in their surroundings.

    Args:
        live: the model.
        train_loss: the loss.
        grad_transform: what is done to its gradient.
        tensors: the tuned tensors that the loss reads.
        running: the buffers that move by rules.
        asked: where is asked whether a loss that was computed again is what it was.
        recorder: what records the gradient, to be replayed as a whole; None where nothing is recorded.
        twice_differentiable: take every step with kernels that can be differentiated twice, so that a step
            taken again has the very same gradient and the same dropout masks.
    """

    def __init__(
        self,
        live: Live,
        train_loss: Loss,
        grad_transform: GradTransform | None,
        tensors: Sequence[Tensor],
        running: RunningBuffers,
        asked: Readings,
        recorder: Recorder | None,
        *,
        twice_differentiable: bool,
    ) -> None:
        self.live, self.tensors, self.running, self.readings = live, list(tensors), running, asked
        self.loss, self.grad_transform, self.recorder = train_loss, grad_transform, recorder
        self._twice_differentiable = twice_differentiable
        self._is_first = True
        self._inspected: set[tuple[str, int, bool, bool]] = set()
        self._plain = self.captured(self._plain_gradient, "the training gradient") or self._plain_gradient

    def captured(self, function: Callable[[Any], Any], name: str) -> Captured | None:
        """A function of tensors and of the model, to be recorded and replayed; None where nothing is
        recorded."""
        if self.recorder is None:
            return None
        return Captured(function, self.live.model.memory, self.live.model.modes, self.recorder, name)

    def untransformed(self) -> GradientStage:
        """The same without ``grad_transform``."""
        plain = copy.copy(self)
        plain.grad_transform = None
        return plain

    # ---- the loss and its gradient, with model and generators as they stand -------------------------------

    def plain(self, step: Step) -> LossAndGradient:
        """The loss on a step's batch and its gradient, without graph."""
        batch = step.given if step.given is not None else recorded(step.batch)
        if self._is_first and self.running.may_find:
            found = self.evaluate(batch, trace=self.running.trace(buffers=False, padding=True))
            loss, grads = found.loss.detach(), found.grads
        else:
            loss, grads = self._plain(batch)
        self._is_first = False
        return LossAndGradient(loss, grads, rng=self._rng())

    def evaluate(
        self,
        batch: Any,
        *,
        create_graph: bool = False,
        dual: bool = False,
        also: Callable[[], Sequence[Tensor]] = list,
        trace: Trace | None = None,
    ) -> LossAndGradient:
        """The loss on a batch, and its gradient for the parameters and each of ``also``.

        Args:
            create_graph: give the gradient a graph.
            dual: parameters are dual numbers.
            also: called when the loss has been computed.
            trace: what follows the buffers; then what the modules have in their place is asked for last.
        """
        twice = create_graph or dual
        with torch.enable_grad(), self.kernels(twice_differentiable=twice or self._twice_differentiable):
            with nullcontext() if trace is None else trace.hooked():
                before = autodiff.num_nodes()
                loss = self._loss(batch, trace)
                # Losses of one structure are looked at once: a penalty may come at every third step.
                nodes = autodiff.num_nodes() - before
                kind = loss.grad_fn.name(), nodes, twice, trace is None  # type: ignore[union-attr]
                is_new = kind not in self._inspected
                if is_new:
                    autodiff.refuse_reentrant_checkpoints(loss)
                if trace is not None:
                    trace.refuse_reading_moved()
                if is_new and trace is not None:
                    autodiff.refuse_unseen_padding(loss, trace.num_padded)
                if is_new and twice:
                    autodiff.refuse_wrong_third_derivatives(loss)
                handed = [] if trace is None else list(trace.handed.leaves.values())
                grads, others = self._gradient(loss, [*also(), *handed], create_graph=create_graph)
                if trace is not None:
                    trace.note_attributes(others[len(others) - len(handed) :])
                    trace.end()
            if is_new and create_graph:
                autodiff.refuse_wrong_second_derivatives([g for g in grads if g is not None])
            self._inspected.add(kind)
        return LossAndGradient(loss, grads, others, self._rng())

    def kernels(self, *, twice_differentiable: bool) -> AbstractContextManager[None]:
        """The context to compute losses in, and products with the derivatives of their gradients."""
        if not twice_differentiable:
            return nullcontext()
        return autodiff.differentiable_kernels(recurrent=self.live.model.recurrent)

    def _loss(self, batch: Any, trace: Trace | None = None) -> Tensor:
        with self.live.model.unwritten(), self.live.model.casting():
            loss = self.loss(self.live.model.model, batch)
        check_loss(loss, "train_loss")
        if trace is not None:
            trace.computed()
        return loss

    def _gradient(
        self, loss: Tensor, also: Sequence[Tensor], *, create_graph: bool = False, retain_graph: bool = False
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        params = self.live.params
        trainable = [i for i, p in enumerate(params) if p.requires_grad]
        # A seed that requires a gradient makes functions marked once_differentiable show in the graph, which
        # they do not when the gradient that reaches them is a constant.
        seed = torch.ones_like(loss).requires_grad_(create_graph)
        inputs = [*(params[i] for i in trainable), *also]
        retain = create_graph or retain_graph
        found = autodiff.gradients([loss], inputs, [seed], create_graph=create_graph, retain_graph=retain)
        grads: list[Tensor | None] = [None] * len(params)
        for i, g in zip(trainable, found):
            if g is not None and g.layout is not torch.strided:
                raise ValueError(
                    f"The gradient of {self.live.model.names[i]!r} is sparse. Sparse gradients have no "
                    "second derivative: make the embedding with sparse=False."
                )
            grads[i] = g
        return grads, found[len(trainable) :]

    def _plain_gradient(self, batch: Any) -> tuple[Tensor, list[Tensor | None]]:
        found = self.evaluate(batch)
        return found.loss.detach(), found.grads

    def _rng(self) -> tuple[Tensor, ...]:
        return () if self.grad_transform is None else self.live.model.rng()

    # ---- the same for recorded steps ----------------------------------------------------------------------

    def revisit(self, step: Step, *, compare: bool = True, **options: Any) -> LossAndGradient:
        """:meth:`evaluate` on a recorded step's batch, in its surroundings, at the model's current weights.

        Args:
            compare: the weights are those of the step, so that the loss must be what it was.
        """
        if step.given is not None:  # it is being taken: everything is as it should be
            return self.evaluate(step.given, **options)
        self.return_to(step)
        found = self.evaluate(recorded(step.batch), **options)
        if compare:
            self.compare(step, found.loss)
        return found

    def return_to(self, step: Step) -> None:
        """Brings back a recorded step's surroundings, and refuses a batch that was changed."""
        self.check_batch(step)
        self.live.model.set_surroundings(step.surroundings)

    def loss_again(self, step: Step) -> None:
        """Compares the loss alone, at the model's current weights."""
        self.return_to(step)
        with torch.enable_grad(), self.kernels(twice_differentiable=self._twice_differentiable):
            self.compare(step, self._loss(recorded(step.batch)))

    def pull_buffers(
        self, step: Step, adj_buffers: Buffers, *, recomputes: bool = False, at_rest: bool = False
    ) -> tuple[list[Tensor | None], list[Tensor | None], Buffers | None]:
        """The vector-Jacobian product of the buffers after a recorded step's loss, at the model's current
        weights: for parameters, tuned tensors and the buffers before. It takes first derivatives alone.

        Args:
            recomputes: the loss's gradient makes calls again, which move buffers once more.
            at_rest: of the buffers that such steps without end would leave, r with ``r = after(r)``, which no
                buffers before have a part in. Those that the loss does not move have none.
        """
        self.return_to(step)
        trace = self.running.trace(buffers=True)
        with (
            torch.enable_grad(),
            self.kernels(twice_differentiable=self._twice_differentiable),
            trace.hooked(),
        ):
            loss = self._loss(recorded(step.batch), trace)
            if recomputes:
                self._gradient(loss, [], retain_graph=True)
            trace.end()
            before, after, adjoints = (
                list(trace.before.values()),
                list(trace.after.values()),
                trace.at(adj_buffers),
            )
            if at_rest:
                kept = autodiff.gradients([a.sum() for a in after], before, retain_graph=True)
                adjoints = [_at_rest(adjoint, k) for adjoint, k in zip(adjoints, kept)]
            params = self.live.params
            trainable = [p for p in params if p.requires_grad]
            found = iter(autodiff.pulled(after, adjoints, [*trainable, *self.tensors, *trace.buffer_leaves]))
            by_param = [next(found) if p.requires_grad else None for p in params]
            return (
                by_param,
                [next(found) for _ in self.tensors],
                trace.placed(trace.of_buffers(found), adj_buffers),
            )

    def check_batch(self, step: Step) -> None:
        """Refuses a step whose batch is not what it was.

        Raises:
            TrajectoryError: if so.
        """
        if not is_as_seen(step.batch, step.seen):
            raise TrajectoryError(
                f"A tensor in the batch of training step {step.number + 1} was changed in place after the "
                "step, or another one put into its place. The step is replayed on the recorded batch, which "
                "is kept by reference: pass a fresh tensor to each step, or a clone of a buffer that is "
                "used again."
            )

    def compare(self, step: Step, loss: Tensor) -> None:
        """Refuses a loss that is not what it was at the same weights, at once or when everything is read.

        Raises:
            TrajectoryError: with both numbers.
        """
        before, again = step.loss, loss.detach()
        if before is None or (readings.at_once(again) and torch.equal(before, again)):
            return
        # Kernels may round otherwise where memory lies otherwise, and on a GPU from call to call.
        rounding = torch.finfo(again.dtype).eps
        tolerance = 64 * rounding if readings.at_once(again) else rounding**0.5

        def refuse(losses: list[float]) -> None:
            old, new = losses
            if not abs(old - new) <= tolerance * max(abs(old), abs(new)) and not (old != old and new != new):
                raise TrajectoryError(
                    f"The training loss of training step {step.number + 1} was {old:.9g}, and is {new:.9g} "
                    "computed again from the same weights, batch and random numbers of torch, so the step "
                    "cannot be differentiated. Likely causes: train_loss reads something else that changes, "
                    "such as Python's or numpy's random numbers, a torch.Generator of its own, a counter, "
                    "an attribute that the model writes, or a batch that was changed. Put it into the "
                    "batch; or use Unrolled(max_graphs=...) or ForwardMode, which compute no loss again."
                )

        self.readings.ask([before, again], refuse)

    # ---- what is done to the gradient ---------------------------------------------------------------------

    def transform(self, found: LossAndGradient, *, keep: bool = False) -> list[Tensor | None]:
        """The gradient as the update rule gets it.

        Args:
            keep: the gradient is needed as it is, so that a transformation in place gets copies.
        """
        if self.grad_transform is None:
            return list(found.grads)
        return self.transform_again(found.grads, found.rng, keep=keep)

    def transform_again(
        self, grads: PerParameter, rng: tuple[Tensor, ...], *, keep: bool = True
    ) -> list[Tensor | None]:
        """The same with generators as they were after the loss."""
        if self.grad_transform is None:
            return list(grads)
        self.live.model.set_rng(rng)
        with torch.enable_grad():
            given = [g.clone() if keep else g for g in grads if g is not None]
            transformed = iter(call_transform(self.grad_transform, given))
        return [None if g is None else next(transformed) for g in grads]


def _at_rest(adjoint: Tensor | None, kept: Tensor | None) -> Tensor | None:
    """The adjoint of the buffers at rest as one of those after a step, of whose own value before a part is
    kept."""
    if adjoint is None or kept is None:
        return adjoint
    rest = 1 - kept
    return (adjoint / rest.masked_fill(rest == 0, 1)).masked_fill(rest == 0, 0)
