"""Outcomes of repeated measurements, and whether the answers agree."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

import numpy as np

from .cases import Case, direction
from .contestants import Contestant
from .measure import OUT_OF_MEMORY, TOO_SLOW, Outcome

ALLOWED_MARKS = (TOO_SLOW, OUT_OF_MEMORY)

# A part of the norm. Exact hypergradients in float32 differ by 1e-6 until rounding moves one input of a ReLU
# across zero, after which training goes on a little differently: by some 1e-3 here.


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

    def median(self, quantity: str) -> float:
        """Of ``time`` in seconds, or ``memory`` in bytes."""
        name = {"time": "seconds", "memory": "memory"}[quantity]
        return statistics.median(getattr(o, name) for o in self.outcomes)


@dataclass
class Table:
    """The rows of one case."""

    case: Case
    rows: dict[str, Row]

    def best_peer(self, quantity: str) -> float | None:
        """The faster peer's seconds, or the leaner peer's bytes."""
        found = [
            row.median(quantity)
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

    def __init__(self, case: Case, reference: Outcome) -> None:
        self._case = case
        self._reference = None if reference.answer is None else float(reference.answer[0])
        self._first: tuple[Contestant, np.ndarray] | None = None

    def error(self, contestant: Contestant, answer: np.ndarray) -> float:
        """The larger of both differences, as a part of the norm.

        Raises:
            DisagreementError: if it is more than the contestant's tolerance.
        """
        errors = [0.0]
        if self._reference is not None:
            along = float((answer * direction(answer.size).numpy()).sum())
            norm = max(_norm(answer), 1e-30)
            errors.append(abs(along - self._reference) / norm)
            self._check(
                contestant,
                errors[-1],
                "along a fixed direction",
                along,
                "the reference in float64",
                self._reference,
            )
        if self._first is not None and self._first[1].size == answer.size:
            other, first = self._first
            errors.append(_norm(answer - first) / _norm(first))
            self._check(contestant, errors[-1], "of norm", _norm(answer), other.name, _norm(first))
        elif self._first is None:
            self._first = (contestant, answer)
        return max(errors)

    def _check(
        self, contestant: Contestant, error: float, what: str, value: float, other: str, other_value: float
    ) -> None:
        if not error <= contestant.tolerance:  # NaN included
            raise DisagreementError(
                f"{self._case.title}: {contestant.name} gives an answer of {value:.6g} {what}, {other} gives "
                f"{other_value:.6g}: they differ by {error:.2g} of the norm, "
                f"{contestant.tolerance:g} is allowed. One of them is wrong, so no table is worth reading: "
                "find out which before measuring again."
            )


def _norm(values: np.ndarray) -> float:
    return math.sqrt(float((values * values).sum()))
