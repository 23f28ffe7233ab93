"""Particle swarm optimization."""

from __future__ import annotations

import numpy as np

from .base import CubeSampler, Points, Tried


class ParticleSwarm(CubeSampler):
    r"""Particles that fly on, drawn to the best point of their own and to the best of all,

    .. math:: v \leftarrow w v + c_1 r_1 (p - x) + c_2 r_2 (g - x), \qquad x \leftarrow x + v,

    with random :math:`r_1, r_2` between 0 and 1. Trial number k is the next place of particle k modulo
    ``num_particles``; its velocity is the way between its last two places, of those that are finished.

    Args:
        seed: of its random numbers.
        num_particles: of the swarm; their first places are random.
        inertia: w.
        own: :math:`c_1`.
        common: :math:`c_2`.

    Source: Kennedy and Eberhart 1995; inertia by Shi and Eberhart 1998, numbers by Clerc and Kennedy 2002.
    """

    def __init__(
        self,
        seed: int | None = None,
        num_particles: int = 8,
        inertia: float = 0.7298,
        own: float = 1.4962,
        common: float = 1.4962,
    ) -> None:
        super().__init__(seed)
        self._num, self._inertia, self._own, self._common = num_particles, inertia, own, common

    def propose(self, tried: Tried, number: int, rng: np.random.Generator) -> Points:
        width: int = tried.points.shape[1]
        mine = tried.numbers % self._num == number % self._num
        path, found = tried.points[mine], tried.losses[mine]
        if not len(path):
            return rng.random(width)
        velocity = path[-1] - path[-2] if len(path) > 1 else (rng.random(width) - 0.5) * 0.2
        to_own, to_best = path[np.argmin(found)] - path[-1], tried.points[tried.best] - path[-1]
        pull = self._own * rng.random(width) * to_own + self._common * rng.random(width) * to_best
        return path[-1] + self._inertia * velocity + pull
