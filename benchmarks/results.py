"""Outcomes of repeated measurements, and whether the answers agree."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .cases import Case, direction
from .contestants import TOLERANCE, Contestant
from .measure import OUT_OF_MEMORY, TOO_SLOW, Outcome

ALLOWED_MARKS = (TOO_SLOW, OUT_OF_MEMORY)
Quantity = Literal["time", "first time", "memory", "error"]


class DisagreementError(Exception):
    """Two hypergradients that should be equal are not."""


@dataclass
class Row:
    """What one contestant measured on one case. ``error`` is the largest difference found,
    as a part of the norm."""

    contestant: Contestant
    outcomes: list[Outcome] = field(default_factory=list)
    error: float = math.nan
    mark: str = ""

    @property
    def measured(self) -> bool:
        return bool(self.outcomes) and not self.mark

    @property
    def later(self) -> list[float]:
        """Seconds of all later windows."""
        return [seconds for outcome in self.outcomes for seconds in outcome.later]

    def value(self, quantity: Quantity) -> float:
        """Median seconds of later windows or of first ones, median bytes, or the error."""
        if quantity == "error":
            return self.error
        if quantity == "time":
            return statistics.median(self.later)
        name = {"first time": "first", "memory": "memory"}[quantity]
        return statistics.median(getattr(outcome, name) for outcome in self.outcomes)


@dataclass
class Table:
    """The rows of one case."""

    case: Case
    rows: dict[str, Row]

    def best_peer(self, quantity: Quantity) -> float | None:
        """The faster peer's seconds, or the leaner peer's bytes: each quantity has a best peer of its own."""
        found = [
            row.value(quantity)
            for row in self.rows.values()
            if row.measured and row.contestant.whose == "peer"
        ]
        return min(found, default=None)

    def failures(self) -> list[str]:
        """Of our own contestants, which have no reason to fail."""
        ours = [row for row in self.rows.values() if row.contestant.whose == "ours"]
        return [
            f"{self.case.title}: {row.contestant.name}: {row.mark}"
            for row in ours
            if row.mark and row.mark not in ALLOWED_MARKS
        ]


class Judge:
    """Holds every answer of a case against the reference along a direction,
    and against the first answer as a whole."""

    def __init__(self, case: Case, reference: float | None) -> None:
        self._case, self._reference = case, reference
        self._first: tuple[str, np.ndarray] | None = None

    def error(self, name: str, answer: np.ndarray, tolerance: float = TOLERANCE) -> float:
        """The larger of both differences, as a part of the norm.

        Exact hypergradients in float32 differ by 1e-6 until rounding moves one input of a ReLU across zero,
        after which training goes on a little differently: by some 1e-3 here.

        Raises:
            DisagreementError: if it is more than the tolerance.
        """
        comparisons = []
        if self._reference is not None:
            along = float((answer * direction(answer.size).numpy()).sum())
            error = abs(along - self._reference) / max(_norm(answer), 1e-30)
            other = "the reference in float64"
            comparisons.append(("along a fixed direction", along, other, self._reference, error))
        if self._first is None:
            self._first = (name, answer)
        elif self._first[1].size == answer.size:
            other, first = self._first
            error = _norm(answer - first) / _norm(first)
            comparisons.append(("of norm", _norm(answer), other, _norm(first), error))
        for what, value, other, other_value, error in comparisons:
            if not error <= tolerance:  # NaN included
                raise DisagreementError(
                    f"{self._case.title}: {name} gives an answer of {value:.6g} {what}, {other} gives "
                    f"{other_value:.6g}: they differ by {error:.2g} of the norm, {tolerance:g} is allowed. "
                    "One of them is wrong, so no table is worth reading: "
                    "find out which before measuring again."
                )
        return max((error for *_, error in comparisons), default=0.0)


def _norm(values: np.ndarray) -> float:
    return math.sqrt(float((values * values).sum()))
