"""A hypergradient as it is summed up."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..ground.buckets import Bucket
from .hyperparameter_set import HyperparameterSet
from .tuned import TunedSetting, TunedTensor


class Hypergradient:
    """Parts of the derivative with respect to the values of each hyperparameter, added up as a method finds
    them."""

    def __init__(self, hyperparameters: HyperparameterSet) -> None:
        self._all, self._tensors = hyperparameters.all, hyperparameters.tensors
        self._totals: dict[TunedSetting | TunedTensor, Tensor] = {}
        self._direct: dict[TunedSetting | TunedTensor, Tensor] = {}

    def add_setting(self, setting: TunedSetting, part: Tensor, bucket: Bucket, step: int) -> None:
        """Adds the adjoint of what the rule got for ``bucket`` at training step number ``step``."""
        setting.add_adjoint(self._total(setting), part, bucket, step)

    def add_tensors(self, parts: Sequence[Tensor | None]) -> None:
        """Adds one part for each tuned tensor of the training loss; None for zero."""
        for tuned, part in zip(self._tensors, parts):
            if part is not None:
                self._total(tuned).add_(part)

    def scale(self, factor: float) -> None:
        """Multiplies what was added so far."""
        if factor != 1:
            for part in (*self._totals.values(), *self._direct.values()):
                part.mul_(factor)

    def add_direct(self, tuned: TunedSetting | TunedTensor, part: Tensor | None) -> None:
        """Adds a part that has the shape of the values already."""
        if part is not None:
            before = self._direct.get(tuned)
            self._direct[tuned] = part if before is None else before + part

    def result(self) -> list[Tensor]:
        """One tensor for each hyperparameter, in the shape of its values."""
        sums = [(tuned.reduce(self._total(tuned)), self._direct.get(tuned)) for tuned in self._all]
        return [total if direct is None else total + direct for total, direct in sums]

    def _total(self, tuned: TunedSetting | TunedTensor) -> Tensor:
        if tuned not in self._totals:
            self._totals[tuned] = tuned.zero_adjoint()
        return self._totals[tuned]
