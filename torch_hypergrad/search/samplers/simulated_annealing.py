"""Simulated annealing."""

from __future__ import annotations

import numpy as np

from .base import CubeSampler, Points, Tried


class SimulatedAnnealing(CubeSampler):
    r"""A walk that accepts a worse point with probability :math:`e^{-\Delta / T}`, the less often the longer
    it goes on: :math:`T_k = T_0\, q^k` at trial number k. Steps are normal ones, which shrink as the
    temperature does, to a twentieth at the end. The dice of trial k are the same for everyone, so that all
    workers agree on the walk so far.

    Args:
        seed: of its random numbers.
        temperature: :math:`T_0`, in units of the distance between the quartiles of the losses up to then.
        cooling: q, below 1.
        step: standard deviation of the first steps, as a part of each range.

    Source: Kirkpatrick, Gelatt and Vecchi 1983.
    """

    def __init__(
        self, seed: int | None = None, temperature: float = 1.0, cooling: float = 0.95, step: float = 0.3
    ) -> None:
        super().__init__(seed)
        self._temperature, self._cooling, self._step = temperature, cooling, step

    def propose(self, tried: Tried, number: int, rng: np.random.Generator) -> Points:
        current = 0
        for i, (k, unit) in enumerate(zip(tried.numbers, tried.spreads())):
            rise = max(tried.losses[i] - tried.losses[current], 0.0) / unit
            if np.random.default_rng(k).random() < np.exp(-rise / (self._temperature * self._cooling**k)):
                current = i
        width = self._step * max(self._cooling**number, 0.05)
        return tried.points[current] + width * rng.standard_normal(tried.points.shape[1])
