"""Search along one coordinate at a time."""

from __future__ import annotations

import numpy as np

from .base import CubeSampler, Points, best_of


class CoordinateDescent(CubeSampler):
    """From the best point so far a step up or down along one coordinate, then the next. After a round of all
    coordinates without gain the steps are half as long.

    Args:
        seed: of the first point, and of the order of the coordinates.
        step: the first steps, as a part of each range.

    Source: Hooke and Jeeves 1961, without their pattern moves; as compass search in Kolda, Lewis and Torczon
    2003, section 1.1.
    """

    def __init__(self, seed: int | None = None, step: float = 0.25) -> None:
        super().__init__(seed)
        self._step = step

    def propose(self, points: Points, losses: Points, rng: np.random.Generator) -> Points:
        best, width = best_of(losses), points.shape[1]
        num_failed, order = len(losses) - 1 - best, np.random.default_rng(self._seed).permutation(width)
        # Where the last gain was made there may be more: the round begins with the same coordinate and sign.
        began = self._place(points, best, order)
        turn = (began + num_failed) % (2 * width)
        point = points[best].copy()
        point[order[turn // 2]] += (1 - 2 * (turn % 2)) * self._step * 0.5 ** (num_failed // (2 * width))
        return point

    @staticmethod
    def _place(points: Points, best: int, order: np.ndarray) -> int:
        """The turn that led to the best point; the first one where that was none."""
        moves = points[best] - points[:best]
        along = [move for move in moves if np.count_nonzero(np.abs(move) > 1e-9) == 1]
        if not along:
            return 0
        coordinate = int(np.argmax(np.abs(along[-1])))
        return 2 * int(np.flatnonzero(order == coordinate)[0]) + (along[-1][coordinate] < 0)
