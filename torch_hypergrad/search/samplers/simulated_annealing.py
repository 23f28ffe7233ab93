"""Simulated annealing."""

from __future__ import annotations

import numpy as np

from .base import CubeSampler, Points, spread_of


class SimulatedAnnealing(CubeSampler):
    r"""A walk that accepts a worse point with probability :math:`e^{-\Delta / T}`, the less often the longer
    it goes on: :math:`T_k = T_0\, q^k`. Steps are normal ones, which shrink with the temperature.

    Args:
        seed: of its random numbers.
        temperature: :math:`T_0`, in units of the distance between the quartiles of all losses.
        cooling: q, below 1.
        step: standard deviation of the first steps, as a part of each range.

    Source: Kirkpatrick, Gelatt and Vecchi 1983.
    """

    def __init__(
        self, seed: int | None = None, temperature: float = 1.0, cooling: float = 0.95, step: float = 0.3
    ) -> None:
        super().__init__(seed)
        self._temperature, self._cooling, self._step = temperature, cooling, step

    def propose(self, points: Points, losses: Points, rng: np.random.Generator) -> Points:
        unit, dice = spread_of(losses), np.random.default_rng(0)  # the walk so far is the same for everyone
        current = 0
        for k in range(1, len(losses)):
            rise = (losses[k] - losses[current]) / unit
            if dice.random() < np.exp(-max(rise, 0.0) / (self._temperature * self._cooling**k)):
                current = k
        width = self._step * max(self._cooling ** len(losses), 0.05)
        return points[current] + width * rng.standard_normal(points.shape[1])
