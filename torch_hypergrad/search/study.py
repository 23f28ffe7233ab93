"""A study: made, resumed, or joined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.study import Study

from .heartbeat import HEARTBEAT, retry_stale
from .names import make_pruner, make_sampler
from .space import Space, make_space, packed, unpacked
from .storage import FILES, check_alone, keeps_time, make_storage, reached, scheme_of, shown

SPACE = "space"
"""The study's user attribute."""


def create_study(
    space: Mapping[str, Any],
    *,
    name: str = "search",
    storage: str | BaseStorage | None = None,
    sampler: str | BaseSampler = "tpe",
    pruner: str | BasePruner = "none",
    seed: int | None = None,
    direction: Literal["minimize", "maximize"] = "minimize",
    heartbeat: int = 60,
) -> Study:
    """Makes an Optuna study over a space, or goes on with the one of that name in the storage: after a stop,
    and as one more worker on it, on whatever machine.

    Args:
        space: as :func:`make_space` takes it.
        name: of the study. A file holds one study, a server any number.
        storage: as :func:`make_storage` takes it.
        sampler: a key of :data:`SAMPLERS`, or an Optuna sampler.
        pruner: a key of :data:`PRUNERS`, or an Optuna pruner.
        seed: of a sampler by name. Whoever goes on with a study draws other numbers, since the same ones
            would be the same trials again.
        direction: of the search.
        heartbeat: seconds between two signs of life of a trial; see :func:`make_storage`.

    Raises:
        TypeError, ValueError: for a bad space, name or storage; if the study there has another space or
            direction, or was not made here; if the file holds another study. Nothing has changed then.
        ConnectionError: if the storage cannot be reached.
    """
    checked = make_space(space)
    if not (isinstance(name, str) and name):
        raise TypeError(f"name must be a string that names the study, got {name!r}.")
    if direction not in ("minimize", "maximize"):
        raise ValueError(f"direction must be 'minimize' or 'maximize', got {direction!r}.")
    chosen = _pruner(pruner)
    first, later = (_sampler(sampler, checked, one) for one in (seed, None))
    opened = make_storage(storage, heartbeat=heartbeat)
    if isinstance(storage, str) and scheme_of(storage) in FILES:
        check_alone(storage, opened, name)
    with reached(storage):
        try:
            study = optuna.create_study(
                storage=opened, study_name=name, direction=direction, sampler=first, pruner=chosen
            )
        except DuplicatedStudyError:
            study = optuna.load_study(storage=opened, study_name=name, sampler=later, pruner=chosen)
    _check_same(study, checked, direction, f"The study {name!r} in {shown(storage)}")
    if not keeps_time(opened):
        study.set_user_attr(HEARTBEAT, heartbeat)
        retry_stale(study, heartbeat)
    return study


def space_of(study: Study) -> Space:
    """What a study searches.

    Raises:
        ValueError: for one that was not made by :func:`create_study`.
    """
    if SPACE not in study.user_attrs:
        raise ValueError(
            f"The study {study.study_name!r} has no space: it was not made by "
            "torch_hypergrad.search.create_study. Make it so, or pass Optuna an objective of your own."
        )
    return unpacked(study.user_attrs[SPACE])


def _sampler(sampler: str | BaseSampler, space: Space, seed: int | None) -> BaseSampler:
    if isinstance(sampler, str):
        return make_sampler(sampler, space, seed=seed)
    if not isinstance(sampler, BaseSampler):
        raise TypeError(f"sampler must be a name such as 'tpe' or an Optuna sampler, got {sampler!r}.")
    return sampler


def _pruner(pruner: str | BasePruner) -> BasePruner:
    if isinstance(pruner, str):
        return make_pruner(pruner)
    if not isinstance(pruner, BasePruner):
        raise TypeError(f"pruner must be a name such as 'median' or an Optuna pruner, got {pruner!r}.")
    return pruner


def _check_same(study: Study, space: Space, direction: str, who: str) -> None:
    """Refuses to go on with another search; writes down what a new one is."""
    if study.direction.name.lower() != direction:
        raise ValueError(f"{who} is to {study.direction.name.lower()}, got direction={direction!r}.")
    if SPACE not in study.user_attrs and not study.get_trials(deepcopy=False):
        study.set_user_attr(SPACE, packed(space))
    if SPACE not in study.user_attrs:
        raise ValueError(
            f"{who} was not made by torch_hypergrad.search, so what it searches is not known. Go on with it "
            "by optuna.load_study, or pass another name or storage."
        )
    stored = space_of(study)
    for name in [*stored, *space]:
        if stored.get(name) != space.get(name):
            raise ValueError(
                f"{who} has another space: its {name!r} is {stored.get(name, 'not searched')}, got "
                f"{space.get(name, 'none')}. Pass the same space to go on, or another name and storage."
            )
