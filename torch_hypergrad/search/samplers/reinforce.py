"""A policy that learns where to look."""

from __future__ import annotations

import numpy as np

from .base import CubeSampler, Points, Tried


class Reinforce(CubeSampler):
    r"""Draws each point from a normal policy :math:`N(\mu, \mathrm{diag}\,\sigma^2)` over the cube, whose
    mean and width follow the losses of all points drawn so far, in order:

    .. math:: \mu \leftarrow \mu + \alpha A (x - \mu), \qquad
              \log\sigma \leftarrow \log\sigma + \beta A \Big(\frac{(x - \mu)^2}{\sigma^2} - 1\Big),
              \qquad A = \frac{b - \ell}{s},

    the gradient of the expected loss by its logarithm's derivative, in units of :math:`\sigma^2`, with the
    mean b of the losses so far as baseline and the distance s between their quartiles as unit. A is kept
    between -1 and 1 and the square over :math:`\sigma^2` below 4, so that no single point leads away; the
    mean stays in the cube, and :math:`\sigma` between 0.02 and 0.5. Choices lie on a line, in their order.

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

    def propose(self, tried: Tried, number: int, rng: np.random.Generator) -> Points:
        width = tried.points.shape[1]
        mean, log_width = np.full(width, 0.5), np.full(width, np.log(self._width))
        baselines = np.cumsum(tried.losses) / np.arange(1, len(tried.losses) + 1)
        advantages = np.clip((baselines - tried.losses) / tried.spreads(), -1.0, 1.0)
        for point, advantage in zip(tried.points, advantages):
            squares = ((point - mean) / np.exp(log_width)) ** 2
            mean = np.clip(mean + self._mean_rate * advantage * (point - mean), 0.0, 1.0)
            log_width += self._width_rate * advantage * (np.minimum(squares, 4.0) - 1)
            log_width = np.clip(log_width, np.log(0.02), np.log(0.5))
        return mean + np.exp(log_width) * rng.standard_normal(width)
