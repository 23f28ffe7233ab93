"""What our own samplers share: settings as points of the unit cube, and finished trials of the storage."""

from __future__ import annotations

import math
from abc import abstractmethod
from bisect import insort
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import intersection_search_space
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

Points = NDArray[np.float64]


@dataclass(frozen=True)
class Tried:
    """What finished trials say, one or more, in the order of their numbers.

    Args:
        points: of the unit cube, of shape ``(n, d)``.
        losses: what is to be minimized, of shape ``(n,)``.
        numbers: those of the trials, of shape ``(n,)``. They have gaps where trials failed or still run.
    """

    points: Points
    losses: Points
    numbers: NDArray[np.int64]

    @property
    def best(self) -> int:
        """The first place of the lowest loss."""
        return int(np.argmin(self.losses))

    def spreads(self) -> list[float]:
        """A unit for differences of losses as each trial ended: the distance between the quartiles of the
        losses up to it, or 1 where there is none."""
        ordered: list[float] = []
        found = []
        for loss in self.losses.tolist():
            insort(ordered, loss)
            found.append(_quantile(ordered, 0.75) - _quantile(ordered, 0.25) or 1.0)
        return found


class CubeSampler(BaseSampler):
    """Proposes points of the unit cube by those that were tried, with the losses there. All that it knows is
    in the storage: it goes on after a stop, and several workers may share it.

    Args:
        seed: of its random numbers; None draws others each time.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._seed = seed
        self._random = RandomSampler(seed=seed)

    @abstractmethod
    def propose(self, tried: Tried, number: int, rng: np.random.Generator) -> Points:
        """The point of the next trial, of shape ``(d,)``; what leaves the cube is reflected back.

        Args:
            tried: what is known.
            number: that of the trial. No other has it, of whatever worker.
            rng: random numbers, the same for the same seed and trial.
        """

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """What all finished trials have in common, single values aside.

        Raises:
            ValueError: for a study of several objectives.
        """
        if len(study.directions) > 1:
            raise ValueError(
                f"{type(self).__name__} minimizes or maximizes one value, and the study has "
                f"{len(study.directions)} objectives. Take sampler='nsga2', or one objective."
            )
        space = intersection_search_space(study.get_trials(deepcopy=False))
        return {name: of_one for name, of_one in space.items() if not of_one.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The settings at the proposed point."""
        done = [t for t in finished(study) if all(name in t.params for name in search_space)]
        if not done or not search_space:
            return {}
        points = np.array([[to_unit(search_space[n], t.params[n]) for n in search_space] for t in done])
        sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
        losses = sign * np.array([t.value for t in done], dtype=np.float64)
        tried = Tried(points, losses, np.array([t.number for t in done]))
        rng = np.random.default_rng(None if self._seed is None else [self._seed, trial.number])
        point = reflected(self.propose(tried, trial.number, rng))
        return {name: from_unit(of_one, u) for (name, of_one), u in zip(search_space.items(), point)}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """At random, for what is not in all trials: all of the first one."""
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        """Other random numbers, for one more worker."""
        self._seed = int(np.random.default_rng().integers(2**31))
        self._random.reseed_rng()


def finished(study: Study) -> list[FrozenTrial]:
    """The trials that came to an end, pruned ones with the last value that they reported, in the order of
    their numbers."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return [t for t in trials if t.value is not None and math.isfinite(t.value)]


def to_unit(distribution: BaseDistribution, value: Any) -> float:
    """Where a setting lies between 0 and 1; one of few values in the middle of its own stretch."""
    if isinstance(distribution, CategoricalDistribution):
        return (distribution.to_internal_repr(value) + 0.5) / len(distribution.choices)
    low, high = _range(distribution)
    number = math.log(value) if distribution.log else float(value)  # type: ignore[attr-defined]
    return (number - low) / (high - low)


def from_unit(distribution: BaseDistribution, u: float) -> Any:
    """The inverse of :func:`to_unit`, rounded to what the distribution has."""
    if isinstance(distribution, CategoricalDistribution):
        num = len(distribution.choices)
        return distribution.choices[min(int(u * num), num - 1)]
    low, high = _range(distribution)
    number = low + u * (high - low)
    number = math.exp(number) if distribution.log else number  # type: ignore[attr-defined]
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    if distribution.step is not None:
        number = distribution.low + round((number - distribution.low) / distribution.step) * distribution.step
    number = min(max(number, distribution.low), distribution.high)
    return int(number) if isinstance(distribution, IntDistribution) else float(number)


def reflected(point: Points) -> Points:
    """Brought back into the unit cube, as by mirrors on its sides."""
    folded = np.mod(point, 2.0)
    return np.where(folded > 1.0, 2.0 - folded, folded)


def _range(distribution: BaseDistribution) -> tuple[float, float]:
    if not isinstance(distribution, (FloatDistribution, IntDistribution)):
        raise TypeError(
            f"This sampler knows ranges and choices, and the trial suggests a {type(distribution).__name__}. "
            "Take suggest_float, suggest_int or suggest_categorical, or sampler='random'."
        )
    half = (distribution.step or 0.0) / 2  # so that the ends have as much room as what lies between
    low, high = distribution.low - half, distribution.high + half
    return (math.log(low), math.log(high)) if distribution.log else (low, high)


def _quantile(ordered: list[float], part: float) -> float:
    place = part * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
