"""A checker for hypergradients, as ``torch.autograd.gradcheck`` is for gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .errors import HypergradientError, NonFiniteError
from .hyper_optimizer import HyperOptimizer
from .step.state import Buffers

NUM_LEVELS = 6
CONVERGED = 1e-9
"""Differences whose estimated error is below this part of them are not refined any more."""


class HypergradientMismatchError(HypergradientError, AssertionError):
    """A hypergradient differs from finite differences."""


@dataclass(frozen=True)
class CheckedEntry:
    """One number of a hypergradient and its reference.

    Args:
        name: the hyperparameter, as in ``HyperOptimizer.values()``.
        index: which entry of it, in flat order.
        computed: the hypergradient.
        reference: the derivative by finite differences of re-run training.
        uncertainty: an estimate of the error of ``reference``.
    """

    name: str
    index: int
    computed: float
    reference: float
    uncertainty: float

    def agrees(self, rtol: float, atol: float) -> bool:
        """Whether the two are within ``atol + rtol * |reference|``."""
        return abs(self.computed - self.reference) <= atol + rtol * abs(self.reference)


def check_hypergradient(
    make: Callable[[], HyperOptimizer],
    train_batches: Sequence[Any],
    val_batch: Any,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-9,
    num_entries: int = 3,
    seed: int = 0,
) -> list[CheckedEntry]:
    """Compares a hypergradient with central finite differences of the validation loss after re-run training.

    Training is run anew for each perturbed value, with the same random numbers. Running statistics, and other
    buffers with a rule (:func:`torch_hypergrad.register_buffers`), move as training moves them. Other buffers
    are put back to those of the first run before each step, since hypergradients take them for constants. The
    differences are extrapolated to step size 0 (Ridders 1982) from steps of a 50th of the value, or half the
    way to its upper bound, down to a 32nd of that, or until they are known to nine digits.

    Args:
        make: makes a fresh HyperOptimizer, model and all, the same each time (set seeds inside). Parameters
            in float64.
        train_batches: one batch for each training step; for implicit methods, enough to converge.
        val_batch: the validation batch.
        rtol: relative tolerance.
        atol: absolute tolerance.
        num_entries: how many entries of each named hyperparameter are checked, chosen at random.
        seed: of that choice, and of the random numbers during training.

    Returns:
        What was compared, entry by entry.

    Raises:
        ValueError: if parameters are not float64, in which finite differences have no digits left.
        HypergradientMismatchError: if an entry differs; the message lists the ones that do.
    """
    with torch.random.fork_rng():
        training = _Training(make, train_batches, val_batch, seed)
        generator = torch.Generator().manual_seed(seed)
        entries = []
        for name, computed in training.hypergradient().items():
            for index in torch.randperm(computed.numel(), generator=generator)[:num_entries].tolist():
                width = _width(training.hyper, name, index)
                reference, uncertainty = derivative(partial(training.loss_at, name, index), width)
                found = computed.reshape(-1)[index].item()
                entries.append(CheckedEntry(name, index, found, reference, uncertainty))
    _raise_on_mismatch(entries, rtol, atol)
    return entries


def _width(hyper: HyperOptimizer, name: str, index: int) -> float:
    """The largest step of the differences: a 50th of the value, and at most half the way to its upper bound,
    past which beta2 = 0.999 has no meaning."""
    value = hyper.values()[name].reshape(-1)[index].item()
    width = 0.02 * (abs(value) if value != 0 else 0.1)
    tuned_here = [t for t in hyper._hyperparameters.all if name in t.named(t.values())]
    highs = [tuned.scale.high for tuned in tuned_here]
    above = min(highs, default=math.inf) - value
    return min(width, above / 2) if above > 0 else width


def derivative(function: Callable[[float], float], width: float) -> tuple[float, float]:
    """The derivative at 0 by central differences, extrapolated, and an estimate of its error (Ridders 1982).

    Args:
        function: a smooth function of one number.
        width: the largest step; each following one is half of it, until the estimate is below a billionth of
            the derivative, or there are six.
    """
    best, uncertainty = 0.0, float("inf")
    above: list[float] = []
    for level in range(NUM_LEVELS):
        h = width / 2**level
        row = [(function(h) - function(-h)) / (2 * h)]
        for order, coarse in enumerate(above, start=1):
            row.append((4**order * row[-1] - coarse) / (4**order - 1))
            error = max(abs(row[-1] - row[-2]), abs(row[-1] - coarse))
            if error < uncertainty:
                best, uncertainty = row[-1], error
        if uncertainty <= CONVERGED * abs(best):
            break
        above = row
    return best, uncertainty


class _Training:
    """Training that is run anew, with the same random numbers and, in the place of buffers that are constants
    of differentiation, those of the first run."""

    def __init__(
        self, make: Callable[[], HyperOptimizer], train_batches: Sequence[Any], val_batch: Any, seed: int
    ) -> None:
        self._make, self._batches, self._val_batch, self._seed = make, train_batches, val_batch, seed
        self._constants: list[Buffers] = []
        self._moving: Container[int] = ()
        self.hyper, self._constants = self._run()
        for name, p in self.hyper.model.named_parameters():
            if p.dtype != torch.float64:
                raise ValueError(
                    f"check_hypergradient needs float64, and the parameter {name!r} is {p.dtype}: call "
                    "model.double() and give float64 batches. Finite differences have no digits left in "
                    "lower precision."
                )

    def hypergradient(self) -> dict[str, Tensor]:
        """That of the first run."""
        found = self.hyper.hypergradient(self._val_batch)
        self._moving = self.hyper._problem.transition.gradient.running.moving
        return found

    def loss_at(self, name: str, index: int, shift: float) -> float:
        """The validation loss with one value moved."""
        hyper, _ = self._run(name, index, shift)
        try:
            return hyper.validation_loss(self._val_batch).item()
        except NonFiniteError as error:
            raise NonFiniteError(
                f"Training with {name}[{index}] moved by {shift:g} does not end with a finite validation "
                "loss, so there are no finite differences to compare with. Check at a value where training "
                "is stable, with fewer steps."
            ) from error

    def _run(
        self, name: str = "", index: int = 0, shift: float = 0.0
    ) -> tuple[HyperOptimizer, list[Buffers]]:
        """A trained HyperOptimizer, and the buffers before each step and at the end."""
        torch.manual_seed(self._seed)
        hyper = self._make()
        if name:
            value = hyper.values()[name]
            value.view(-1)[index] += shift
            hyper._hyperparameters.set_values({name: value})  # also out of bounds: zero starts have two sides
        model, found = hyper._problem.live.model, []
        torch.manual_seed(self._seed)
        for t in range(len(self._batches) + 1):
            now = model.buffers()
            if self._constants:
                pairs = enumerate(zip(now, self._constants[t]))
                model.set_buffers([own if i in self._moving else constant for i, (own, constant) in pairs])
            found.append(now)
            if t < len(self._batches):
                hyper.step(self._batches[t])
        return hyper, found


def _raise_on_mismatch(entries: Sequence[CheckedEntry], rtol: float, atol: float) -> None:
    wrong = [entry for entry in entries if not entry.agrees(rtol, atol)]
    if wrong:
        lines = "\n".join(
            f"  {e.name}[{e.index}]: computed {e.computed:.10g}, finite differences {e.reference:.10g} +- "
            f"{e.uncertainty:.1g}"
            for e in wrong
        )
        raise HypergradientMismatchError(
            f"{len(wrong)} of {len(entries)} entries of the hypergradient differ from finite differences by "
            f"more than rtol={rtol:g}, atol={atol:g}:\n{lines}\nLikely causes: a train_loss that reads what "
            "changes between steps, a kink close to the value, make() that is not the same each time, or an "
            "update rule that is wrong."
        )
