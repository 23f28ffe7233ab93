"""The validation loss, over one batch or several, and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ground import autodiff
from ..tune.hypergradient import Hypergradient
from ..tune.hyperparameter_set import HyperparameterSet
from .live import Live
from .running import RunningBuffers
from .state import Buffers, State
from .user_functions import check_loss


@dataclass(frozen=True)
class Validation:
    """The validation loss at one state.

    Args:
        loss: a scalar without graph.
        grads: its gradient for each parameter of the optimizer; None where it does not depend on one.
        direct: its own gradient for each tuned tensor of the training loss.
        buffers: its gradient for each buffer; None where it reads none that moves with the weights.
    """

    loss: Tensor
    grads: list[Tensor | None]
    direct: list[Tensor | None]
    buffers: Buffers | None


@dataclass(frozen=True)
class Batches:
    """Validation batches.

    Args:
        batches: what the loss is called with, one after the other.
        sizes: the weight of each in the mean; None for one each.
    """

    batches: Iterable[Any]
    sizes: Sequence[float] | None = None

    def weighted(self) -> Iterable[tuple[Any, float]]:
        """Each batch with its weight.

        Raises:
            ValueError: if there is none, or another number of weights.
        """
        number = 0
        for number, batch in enumerate(self.batches, start=1):
            if self.sizes is not None and number > len(self.sizes):
                break
            yield batch, 1.0 if self.sizes is None else float(self.sizes[number - 1])
        if number == 0:
            raise ValueError(
                "batches is empty: there is no validation loss. A loader that was gone through, or a "
                "generator, has nothing left: pass the loader itself or a list."
            )
        if self.sizes is not None and number != len(self.sizes):
            more = "more" if number > len(self.sizes) else number
            raise ValueError(
                f"sizes has {len(self.sizes)} entries, and batches has {more}. Pass the size of each batch, "
                "in order, or leave sizes out to give each batch the same weight."
            )


class Objective:
    """The user's validation loss."""

    def __init__(
        self,
        live: Live,
        val_loss: Callable[[nn.Module, Any], Tensor],
        hyperparameters: HyperparameterSet,
        running: RunningBuffers,
    ) -> None:
        self._live, self.loss, self._running = live, val_loss, running
        self._hyperparameters = hyperparameters

    def at(self, batches: Batches, state: State | None = None) -> Validation:
        """The mean over the batches at a state; None for the current one. Buffers and random number
        generators move as the loss moves them."""
        total: list[Tensor | None] = []
        weights = 0.0
        with nullcontext() if state is None else self._live.at(state):
            for batch, weight in batches.weighted():
                found = self._of(batch)
                weights += weight
                total = autodiff.add_lists([total, _times(found, weight)])
        loss, *rest = total if weights == 1.0 else _times(total, 1 / weights)
        num_params, num_tensors = len(self._live.params), len(self._hyperparameters.tensors)
        buffers = rest[num_params + num_tensors :]
        assert loss is not None
        return Validation(
            loss,
            rest[:num_params],
            rest[num_params : num_params + num_tensors],
            None if all(b is None for b in buffers) else tuple(buffers),
        )

    def add_direct(self, validation: Validation, into: Hypergradient) -> None:
        """Adds the loss's own dependence on the tuned tensors."""
        for tuned, part in zip(self._hyperparameters.tensors, validation.direct):
            into.add_direct(tuned, part)

    def _of(self, batch: Any) -> list[Tensor | None]:
        """The loss on one batch, then its gradients in parameters, tuned tensors and buffers."""
        live, tensors = self._live, self._hyperparameters.loss_tensors
        trace = self._running.trace(buffers=True, padding=True)
        with torch.enable_grad(), trace.hooked():
            with live.model.casting():
                loss = self.loss(live.model.model, batch)
            check_loss(loss, "val_loss")
            trace.computed()
            trainable = [p for p in live.params if p.requires_grad]
            every = autodiff.gradients([loss], [*trainable, *tensors, *trace.leaves])
            trace.note_attributes(every[len(trainable) + len(tensors) + len(trace.before) :])
            trace.end()
        found = iter(every)
        grads = [next(found) if p.requires_grad else None for p in live.params]
        direct = [next(found) for _ in tensors]
        buffers = trace.placed(trace.of_buffers(found)) or ()
        trace.add_rows(grads, list(found))
        return [loss.detach(), *grads, *direct, *buffers]


def _times(tensors: Sequence[Tensor | None], factor: float) -> list[Tensor | None]:
    return [t if t is None or factor == 1.0 else t * factor for t in tensors]
