"""Several folds with the same hyperparameters, as one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import HypergradientError
from ..hyper_optimizer import HyperOptimizer
from ..safety.checkpoint import check_run
from ..safety.checks import check_hyper_optimizer
from ..safety.hyper_step import (
    Evaluation,
    HyperReport,
    move_values,
    num_clipped,
    put_back_on_error,
)
from .folds import check_folds

T = TypeVar("T")

PARTS = ("folds", "hyper_optimizer", "kind")
"""Those of a checkpoint."""


class CrossValidation:
    r"""k trainings with the same hyperparameters, tuned for the mean of their validation losses,

    .. math:: f(\lambda) = \frac1k \sum_i f_i(\lambda), \qquad \nabla f = \frac1k \sum_i \nabla f_i.

    The calls are those of a HyperOptimizer; where that takes a batch, this takes a list of batches, one for
    each fold. Each fold counts the same, however many examples it has. Folds may be trained one by one too,
    by ``fit`` or their own ``step``.

    Args:
        folds: a HyperOptimizer for each fold, with models of their own, the same hyperparameters, and the
            same values to begin with. A tensor that their losses read may be one and the same. Their hyper
            optimizers are not used.
        hyper_optimizer: makes the optimizer of the hyperparameters, as for a HyperOptimizer.

    Raises:
        TypeError, ValueError: for fewer than two folds, or such as do not belong together.

    Example:
        >>> from functools import partial
        >>> from torch_hypergrad import Hyperparameter, Implicit, Cholesky
        >>> def fold():
        ...     model = torch.nn.Linear(3, 1)
        ...     return HyperOptimizer(
        ...         model, torch.optim.SGD(model.parameters(), lr=0.1),
        ...         lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
        ...         [Hyperparameter("weight_decay", init=0.1)], Implicit(Cholesky()), torch.optim.SGD)
        >>> folds = CrossValidation([fold(), fold()], partial(torch.optim.SGD, lr=0.1))
        >>> batches = [(torch.randn(9, 3), torch.randn(9, 1)) for _ in range(2)]
        >>> losses = folds.step(batches)
        >>> sorted(folds.hypergradient(batches))
        ['weight_decay/group0']
    """

    def __init__(
        self,
        folds: Sequence[HyperOptimizer],
        hyper_optimizer: Callable[[list[Tensor]], Optimizer],
    ) -> None:
        self.folds = list(folds)
        check_folds(self.folds)
        self._hyperparameters = self.folds[0]._hyperparameters
        self.hyper_optimizer = hyper_optimizer([tuned.leaf for tuned in self._hyperparameters.all])
        check_hyper_optimizer(self.hyper_optimizer, self._hyperparameters)
        self._share()  # the logarithm of a tensor that is read by all may differ in its last digit

    # ---- training -----------------------------------------------------------------------------------------

    def step(self, batches: Sequence[Any]) -> list[Tensor]:
        """One training step of each fold: the losses before it.

        Raises:
            ValueError: for another number of batches.
            TypeError, ValueError, HypergradientError: of a fold, which is then as it was; those before it
                have taken their step.
        """
        return self._each(HyperOptimizer.step, batches, "training")

    def record(self, batches: Sequence[Any]) -> None:
        """Notes a batch for each fold, without moving its weights."""
        self._each(HyperOptimizer.record, batches, "training")

    def restart(self) -> None:
        """Puts each fold back to where it began. Hyperparameters stay."""
        for fold in self.folds:
            fold.restart()

    def begin_window(self) -> None:
        """Drops the recorded steps of each fold."""
        for fold in self.folds:
            fold.begin_window()

    # ---- hyperparameters ----------------------------------------------------------------------------------

    def values(self) -> dict[str, Tensor]:
        """The current values by name."""
        return self.folds[0].values()

    def set_values(self, values: dict[str, Tensor]) -> None:
        """Replaces values by name, in each fold.

        Raises:
            ValueError, TrajectoryError: as :meth:`HyperOptimizer.set_values`; nothing has changed then.
        """
        with self._undone_on_error():
            for number, fold in enumerate(self.folds):
                with _named(number):
                    fold.set_values(values)
            self._share()

    def validation_loss(self, val_batches: Sequence[Any]) -> Tensor:
        """The mean of the validation losses, a scalar without graph."""
        losses = self._each(HyperOptimizer.validation_loss, val_batches, "validation")
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()

    def evaluate(self, val_batches: Sequence[Any], *, rtol: float | None = None) -> Evaluation:
        """The means of validation losses and hypergradients; of the statistics the sum of the products, and
        the worst of the others.

        Raises:
            ValueError: for another number of batches.
            TypeError, ValueError, HypergradientError: of a fold, as :meth:`HyperOptimizer.evaluate`.
        """
        found = self._each(partial(HyperOptimizer.evaluate, rtol=rtol), val_batches, "validation")
        means = {
            name: torch.stack([one.hypergradient[name].to(value.device) for one in found]).mean(0)
            for name, value in self.values().items()
        }
        return Evaluation(
            sum(one.val_loss for one in found) / len(found),
            means,
            _over(sum, [one.num_matvecs for one in found]),
            _over(max, [one.residual for one in found]),
            _over(max, [one.product_error for one in found]),
            _over(max, [one.adjoint_growth for one in found]),
            [f"Fold {number}: {text}" for number, one in enumerate(found) for text in one.warnings],
        )

    def hypergradient(self, val_batches: Sequence[Any], *, rtol: float | None = None) -> dict[str, Tensor]:
        """The derivative that :meth:`evaluate` gives."""
        return self.evaluate(val_batches, rtol=rtol).hypergradient

    def hyper_step(self, val_batches: Sequence[Any], *, rtol: float | None = None) -> HyperReport:
        """The hypergradient, then one step of the hyper optimizer on the shared values, then projection onto
        bounds. The recordings end.

        Raises:
            ValueError, TypeError, HypergradientError: as :meth:`evaluate`; then nothing has changed.
        """
        found, readings = self.evaluate(val_batches, rtol=rtol), self.folds[0]._problem.readings
        gradients = self._hyperparameters.from_named(found.hypergradient)
        constants = sorted({name for fold in self.folds for name in _constants(fold)})
        with self._undone_on_error():
            clipped = move_values(
                self._hyperparameters, self.hyper_optimizer, gradients, lambda: found.val_loss, readings, rtol
            )
            readings.read()
        self.begin_window()
        self._share()
        return HyperReport(
            found.val_loss,
            math.sqrt(sum(float(g.double().square().sum()) for g in gradients)),
            found.num_matvecs,
            found.residual,
            found.product_error,
            found.adjoint_growth,
            constants,
            num_clipped(clipped),
            found.warnings,
        )

    # ---- checkpoints --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The runs of all folds, and the hyper optimizer: see :meth:`HyperOptimizer.state_dict`."""
        return {
            "folds": [fold.state_dict() for fold in self.folds],
            "hyper_optimizer": self.hyper_optimizer.state_dict(),
            "kind": type(self.hyper_optimizer).__name__,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave: what follows is bitwise what would have followed there.

        Raises:
            TypeError: if it is no dict.
            ValueError: for another number of folds or another hyper optimizer, or as
                :meth:`HyperOptimizer.load_state_dict`; nothing has changed then.
        """
        self._check_saved(state_dict)
        # A copy: torch's optimizers go on with the very tensors that they are given.
        self.hyper_optimizer.load_state_dict(copy.deepcopy(state_dict["hyper_optimizer"]))
        for fold, saved in zip(self.folds, state_dict["folds"]):
            fold.load_state_dict(saved)
        self._take_as_unchanged()  # the next fold has written to what it shares

    def _check_saved(self, saved: Any) -> None:
        if not isinstance(saved, dict) or any(part not in saved for part in PARTS):
            kind = TypeError if not isinstance(saved, dict) else ValueError
            got = list(map(str, saved))[:5] if isinstance(saved, dict) else repr(saved)
            raise kind(
                f"This is no checkpoint of a CrossValidation, a dict with {', '.join(PARTS)}: got {got}. "
                "Save with torch.save(folds.state_dict(), path), and load what torch.load(path, "
                "weights_only=True) returns."
            )
        ours = len(self.folds), type(self.hyper_optimizer).__name__
        theirs = len(saved["folds"]), saved["kind"]
        if theirs != ours:
            raise ValueError(
                f"The checkpoint has {theirs[0]} folds tuned by {theirs[1]}, and this CrossValidation has "
                f"{ours[0]} tuned by {ours[1]}. Make it as it was made for the saved run, then load. Nothing "
                "was changed."
            )
        for fold, of_fold in zip(self.folds, saved["folds"]):
            check_run(of_fold, fold._problem, fold.method, fold.hyper_optimizer)

    # ---- what the folds share -----------------------------------------------------------------------------

    def _each(self, call: Callable[[HyperOptimizer, Any], T], batches: Any, kind: str) -> list[T]:
        """What ``call`` gives for each fold and its batch."""
        if not isinstance(batches, (list, tuple)) or len(batches) != len(self.folds):
            got = len(batches) if isinstance(batches, (list, tuple)) else f"a {type(batches).__name__}"
            raise ValueError(
                f"CrossValidation takes a list of {len(self.folds)} {kind} batches, one for each fold; got "
                f"{got}."
            )
        found = []
        for number, (fold, batch) in enumerate(zip(self.folds, batches)):
            with _named(number):
                found.append(call(fold, batch))
        return found

    def _share(self) -> None:
        """Gives each fold the values of the first one, bit for bit."""
        for fold in self.folds[1:]:
            for tuned, first in zip(fold._hyperparameters.all, self._hyperparameters.all):
                if not torch.equal(tuned.leaf, first.leaf.to(tuned.leaf.device)):
                    tuned.set_leaf(first.leaf)

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """Puts the values of all folds and the hyper optimizer back if the block fails."""
        first = self.folds[0]
        try:
            with put_back_on_error(first._problem, self.hyper_optimizer, first._watch):
                yield
        except BaseException:
            self._share()
            self._take_as_unchanged()
            raise

    def _take_as_unchanged(self) -> None:
        """The values are what they were, though somebody has written to them."""
        for fold in self.folds:
            fold._watch.hyperparameters_restored()


@contextmanager
def _named(number: int) -> Iterator[None]:
    """An error of the block says which fold it is of."""
    try:
        yield
    except HypergradientError as error:
        raise type(error)(f"Fold {number}: {error}") from error


def _constants(fold: HyperOptimizer) -> list[str]:
    """The buffers that hypergradients take for constants."""
    readings = fold._problem.readings
    asked = fold._problem.transition.gradient.running.constants(fold._buffers or ())
    readings.read()
    return asked.value


def _over(how: Callable[[Any], Any], numbers: Sequence[Any]) -> Any:
    """The sum or the like of numbers, None where there are none."""
    present = [number for number in numbers if number is not None]
    return how(present) if present else None
