"""Several folds with the same hyperparameters, as one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..hyper_optimizer import HyperOptimizer
from ..safety.checks import check_hyper_optimizer
from ..safety.hyper_step import (
    Evaluation,
    HyperReport,
    move_values,
    num_clipped,
    put_back_on_error,
)


class CrossValidation:
    r"""k trainings with the same hyperparameters, tuned for the mean of their validation losses,

    .. math:: f(\lambda) = \frac1k \sum_i f_i(\lambda), \qquad \nabla f = \frac1k \sum_i \nabla f_i.

    The calls are those of a HyperOptimizer; where that takes a batch, this takes a sequence of batches, one
    for each fold.

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
        _check_folds(self.folds)
        self._hyperparameters = self.folds[0]._hyperparameters
        self.hyper_optimizer = hyper_optimizer([tuned.leaf for tuned in self._hyperparameters.all])
        check_hyper_optimizer(self.hyper_optimizer, self._hyperparameters)

    # ---- training -----------------------------------------------------------------------------------------

    def step(self, batches: Sequence[Any]) -> list[Tensor]:
        """One training step of each fold: the losses before it."""
        return [fold.step(batch) for fold, batch in self._each(batches)]

    def record(self, batches: Sequence[Any]) -> None:
        """Notes a batch for each fold, without moving its weights."""
        for fold, batch in self._each(batches):
            fold.record(batch)

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
        """Replaces values by name, in each fold."""
        for fold in self.folds:
            fold.set_values(values)

    def evaluate(self, val_batches: Sequence[Any], *, rtol: float | None = None) -> Evaluation:
        """The means of validation losses and hypergradients; of the statistics the sum of the products, and
        the worst of the others."""
        found = [fold.evaluate(batch, rtol=rtol) for fold, batch in self._each(val_batches)]
        return Evaluation(
            sum(one.val_loss for one in found) / len(found),
            {name: torch.stack([one.hypergradient[name] for one in found]).mean(0) for name in self.values()},
            _over(sum, [one.num_matvecs for one in found]),
            _over(max, [one.residual for one in found]),
            _over(max, [one.product_error for one in found]),
            _over(max, [one.adjoint_growth for one in found]),
            [f"fold {i}: {text}" for i, one in enumerate(found) for text in one.warnings],
        )

    def hypergradient(self, val_batches: Sequence[Any], *, rtol: float | None = None) -> dict[str, Tensor]:
        """The derivative that :meth:`evaluate` gives."""
        return self.evaluate(val_batches, rtol=rtol).hypergradient

    def hyper_step(self, val_batches: Sequence[Any], *, rtol: float | None = None) -> HyperReport:
        """The hypergradient, then one step of the hyper optimizer on the shared values. The recordings end.

        Raises:
            HypergradientError: of a fold; then nothing has changed.
        """
        found, leader = self.evaluate(val_batches, rtol=rtol), self.folds[0]
        gradients, readings = self._hyperparameters.from_named(found.hypergradient), leader._problem.readings
        with put_back_on_error(leader._problem, self.hyper_optimizer, leader._watch):
            constants = [_constants_of(fold) for fold in self.folds]
            clipped = move_values(
                self._hyperparameters, self.hyper_optimizer, gradients, lambda: found.val_loss, readings
            )
            readings.read()
        self.begin_window()
        for fold in self.folds[1:]:
            for tuned, first in zip(fold._hyperparameters.all, self._hyperparameters.all):
                tuned.set_leaf(first.leaf)
        return HyperReport(
            found.val_loss,
            math.sqrt(sum(float(g.double().square().sum()) for g in gradients)),
            found.num_matvecs,
            found.residual,
            found.product_error,
            found.adjoint_growth,
            sorted({name for names in constants for name in names}),
            num_clipped(clipped),
            found.warnings,
        )

    # ---- checkpoints --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The runs of all folds, and the hyper optimizer."""
        return {
            "folds": [fold.state_dict() for fold in self.folds],
            "hyper_optimizer": self.hyper_optimizer.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave.

        Raises:
            ValueError: for another number of folds, or as :meth:`HyperOptimizer.load_state_dict`.
        """
        saved = state_dict["folds"]
        if len(saved) != len(self.folds):
            raise ValueError(f"The checkpoint has {len(saved)} folds, and this has {len(self.folds)}.")
        for fold, state in zip(self.folds, saved):
            fold.load_state_dict(state)
        self.hyper_optimizer.load_state_dict(state_dict["hyper_optimizer"])

    def _each(self, batches: Sequence[Any]) -> list[tuple[HyperOptimizer, Any]]:
        """Each fold with its batch."""
        if not isinstance(batches, (list, tuple)) or len(batches) != len(self.folds):
            got = len(batches) if isinstance(batches, (list, tuple)) else f"a {type(batches).__name__}"
            raise ValueError(f"Pass a list of {len(self.folds)} batches, one for each fold; got {got}.")
        return list(zip(self.folds, batches))


def _constants_of(fold: HyperOptimizer) -> list[str]:
    readings = fold._problem.readings
    asked = fold._problem.transition.gradient.running.constants(fold._buffers or ())
    readings.read()
    return asked.value


def _over(how: Callable[[Any], Any], numbers: Sequence[Any]) -> Any:
    """The sum or the like of numbers, None where there are none."""
    present = [number for number in numbers if number is not None]
    return how(present) if present else None


def _check_folds(folds: Sequence[Any]) -> None:
    for fold in folds:
        if not isinstance(fold, HyperOptimizer):
            raise TypeError(f"CrossValidation takes a list of HyperOptimizers, got {fold!r} in it.")
    if len(folds) < 2:
        raise ValueError(f"CrossValidation takes two folds or more, got {len(folds)}.")
    first = folds[0].values()
    for number, fold in enumerate(folds[1:], start=1):
        values = fold.values()
        if {n: v.shape for n, v in values.items()} != {n: v.shape for n, v in first.items()}:
            raise ValueError(
                f"Fold {number} tunes {', '.join(values)}, and fold 0 {', '.join(first)}: names and shapes "
                "must be the same. Make all folds by one function."
            )
        scales = [[t.scale for t in one._hyperparameters.all] for one in (folds[0], fold)]
        different = [n for n in first if not torch.equal(first[n].cpu(), values[n].cpu())]
        if scales[0] != scales[1] or different:
            what = f"other values of {different[0]!r}" if different else "other bounds or another scale"
            raise ValueError(f"Fold {number} begins with {what} than fold 0. Make all folds by one function.")
        if fold.model is folds[0].model or any(fold is other for other in folds[:number]):
            raise ValueError(f"Fold {number} has the model of another: each fold is trained by itself.")
