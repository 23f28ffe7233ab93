"""Optuna's samplers and pruners, and our own, by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from optuna.exceptions import ExperimentalWarning
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    PercentilePruner,
    SuccessiveHalvingPruner,
)
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    GridSampler,
    NSGAIISampler,
    RandomSampler,
    TPESampler,
)

from .samplers import CoordinateDescent, ParticleSwarm, Reinforce, SimulatedAnnealing
from .space import grid_values, make_space, nearest

SAMPLERS: dict[str, Callable[..., BaseSampler]] = {
    "cmaes": CmaEsSampler,
    "coordinate_descent": CoordinateDescent,
    "gp": GPSampler,
    "grid": GridSampler,
    "nsga2": NSGAIISampler,
    "particle_swarm": ParticleSwarm,
    "random": RandomSampler,
    "reinforce": Reinforce,
    "simulated_annealing": SimulatedAnnealing,
    "tpe": TPESampler,
}
"""What :func:`make_sampler` makes, by name: Optuna's samplers and our own."""

PRUNERS: dict[str, Callable[..., BasePruner]] = {
    "asha": SuccessiveHalvingPruner,
    "hyperband": HyperbandPruner,
    "median": MedianPruner,
    "none": NopPruner,
    "percentile": PercentilePruner,
}
"""What :func:`make_pruner` makes, by name: Optuna's pruners."""


def make_sampler(
    name: str, space: Mapping[str, Any] | None = None, *, seed: int | None = None, **options: Any
) -> BaseSampler:
    """One of Optuna's samplers, or of our own, by name.

    Args:
        name: a key of :data:`SAMPLERS`.
        space: what is searched, as :func:`make_space` takes it; for ``"grid"`` alone.
        seed: of its random numbers; None draws others each time. A grid is shuffled in the same way for
            everyone, so that workers share it.
        options: the sampler's own; of ``"grid"``: ``points=5``, how many values of each range.

    Raises:
        TypeError, ValueError: for a name that does not exist, a grid without a space or with too many points,
            or options that the sampler does not have.
        ModuleNotFoundError: for ``"cmaes"`` without the package ``cmaes``.
    """
    if name not in SAMPLERS:
        raise ValueError(nearest("sampler must be one of", name, SAMPLERS))
    if name == "grid":
        if space is None:
            raise ValueError("sampler 'grid' needs the space: make_sampler('grid', space, points=5).")
        return GridSampler(grid_values(make_space(space), **{"points": 5, **options}), seed=0)
    if name == "cmaes" and find_spec("cmaes") is None:  # Optuna would only say so in the first trial
        raise ModuleNotFoundError(
            "sampler 'cmaes' needs the package cmaes, which is not installed: pip install "
            "'torch-hypergrad[search]'.",
            name="cmaes",
        )
    with warnings.catch_warnings():  # what Optuna calls experimental depends on its version
        warnings.simplefilter("ignore", ExperimentalWarning)
        return SAMPLERS[name](seed=seed, **options)


def make_pruner(name: str, **options: Any) -> BasePruner:
    """One of Optuna's pruners by name.

    Args:
        name: a key of :data:`PRUNERS`; ``"asha"`` is successive halving, of asynchronous workers.
        options: the pruner's own. ``"percentile"`` takes the better half without any.

    Raises:
        TypeError, ValueError: for a name that does not exist, or options that the pruner does not have.

    Source: asha: Li et al. 2020; hyperband: Li et al. 2018.
    """
    if name not in PRUNERS:
        raise ValueError(nearest("pruner must be one of", name, PRUNERS))
    if name == "percentile":
        options = {"percentile": 50.0, **options}
    return PRUNERS[name](**options)
