"""A policy that learns where to look."""

from __future__ import annotations

import numpy as np

from .base import CubeSampler, Points, spread_of


class Reinforce(CubeSampler):
    r"""Draws each point from a normal policy :math:`N(\mu, \mathrm{diag}\,\sigma^2)` over the cube, whose
    mean and width follow the losses of all points drawn so far, in order:

    .. math:: \mu \leftarrow \mu + \alpha A (x - \mu), \qquad
              \log\sigma \leftarrow \log\sigma + \beta A \Big(\frac{(x - \mu)^2}{\sigma^2} - 1\Big),
              \qquad A = \frac{b - \ell}{s},

    the gradient of the expected loss by its logarithm's derivative, in units of :math:`\sigma^2`, with the
    running mean b of the losses as baseline and the distance s between their quartiles as unit. A is kept
    between -1 and 1, so that no single point leads away.

    Args:
        seed: of its random numbers.
        mean_rate: :math:`\alpha`.
        width_rate: :math:`\beta`.
        width: the first :math:`\sigma`.

    Source: Williams 1992, section 6 for the normal policy.
    """

    def __init__(
        self,
        seed: int | None = None,
        mean_rate: float = 0.3,
        width_rate: float = 0.1,
        width: float = 0.3,
    ) -> None:
        super().__init__(seed)
        self._mean_rate, self._width_rate, self._width = mean_rate, width_rate, width

    def propose(self, points: Points, losses: Points, rng: np.random.Generator) -> Points:
        unit = spread_of(losses)
        mean, log_width = np.full(points.shape[1], 0.5), np.full(points.shape[1], np.log(self._width))
        baselines = np.cumsum(losses) / np.arange(1, len(losses) + 1)
        for point, loss, baseline in zip(points, losses, baselines):
            advantage = np.clip((baseline - loss) / unit, -1.0, 1.0)
            relative = (point - mean) / np.exp(log_width)
            mean = np.clip(mean + self._mean_rate * advantage * (point - mean), 0.0, 1.0)
            log_width += self._width_rate * advantage * np.clip(relative**2 - 1, -1.0, 3.0)
            log_width = np.clip(log_width, np.log(0.02), np.log(0.5))
        return mean + np.exp(log_width) * rng.standard_normal(points.shape[1])
