"""Search along one coordinate at a time."""

from __future__ import annotations

import numpy as np

from .base import CubeSampler, Points, Tried


class CoordinateDescent(CubeSampler):
    """From the best point so far a step up or down along one coordinate, then the next. After a round of all
    coordinates without gain the steps are half as long, and stay so.

    Each trial since the best one stands for one turn of the round, whoever runs it and however it ends, so
    that workers at the same time look in different directions.

    Args:
        seed: of the first point; the rest has no chance in it.
        step: the first steps, as a part of each range.

    Source: Hooke and Jeeves 1961, without their pattern moves; as compass search in Kolda, Lewis and Torczon
    2003, section 1.1.
    """

    def __init__(self, seed: int | None = None, step: float = 0.25) -> None:
        super().__init__(seed)
        self._step = step

    def propose(self, tried: Tried, number: int, rng: np.random.Generator) -> Points:
        round_length = 2 * tried.points.shape[1]
        gains = np.flatnonzero(tried.losses < np.minimum.accumulate([np.inf, *tried.losses])[:-1])
        num_failed = np.diff([*tried.numbers[gains], number]) - 1
        # Where the last gain was made there may be more: the round begins with the same coordinate and sign.
        turn = (self._turn_of_best(tried) + num_failed[-1]) % round_length
        point = tried.points[tried.best].copy()
        point[turn // 2] += (1 - 2 * (turn % 2)) * self._step * 0.5 ** (num_failed // round_length).sum()
        return point

    @staticmethod
    def _turn_of_best(tried: Tried) -> int:
        """The turn that led to the best point; the first one where that was none."""
        moves = tried.points[tried.best] - tried.points[: tried.best]
        along = [move for move in moves if np.count_nonzero(np.abs(move) > 1e-9) == 1]
        if not along:
            return 0
        coordinate = int(np.argmax(np.abs(along[-1])))
        return 2 * coordinate + int(along[-1][coordinate] < 0)
