"""What is searched: a name and an Optuna distribution for each setting."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
    json_to_distribution,
)
from optuna.trial import BaseTrial

Space = dict[str, BaseDistribution]

KINDS: dict[str, type[FloatDistribution] | type[IntDistribution]] = {
    "float": FloatDistribution,
    "int": IntDistribution,
}
CHOICE_TYPES = (str, int, float, bool, type(None))
MAX_GRID = 100_000


def make_space(space: Mapping[str, Any]) -> Space:
    """A search space, checked.

    Args:
        space: for each name an Optuna distribution; or a list of choices; or a range as a dict, as it comes
            from a file: ``{"type": "float", "low": 1e-4, "high": 1.0, "log": True}``, where the type is
            ``"float"`` or ``"int"``, and ``step`` is Optuna's.

    Raises:
        TypeError, ValueError: if there is nothing to search, a range is reversed, holds a single value or is
            not finite, or choices are none that a storage can keep.

    Example:
        >>> make_space({"width": {"type": "int", "low": 8, "high": 64}, "activation": ["relu", "tanh"]})
        {'width': IntDistribution(high=64, log=False, low=8, step=1), \
'activation': CategoricalDistribution(choices=('relu', 'tanh'))}
    """
    if not isinstance(space, Mapping):
        raise TypeError(f"A space is a dict from names to ranges or choices, got {space!r}.")
    if not space:
        raise ValueError("The space is empty, so there is nothing to search. Give it a name and a range.")
    return {str(name): _distribution(f"space[{name!r}]", entry) for name, entry in space.items()}


def _distribution(who: str, entry: Any) -> BaseDistribution:
    if isinstance(entry, Mapping):
        entry = _range(who, dict(entry))
    elif isinstance(entry, (list, tuple)):
        entry = _choices(who, entry)
    if not isinstance(entry, BaseDistribution):
        raise TypeError(
            f"{who} must be an Optuna distribution, a list of choices, or a range such as "
            f"{{'type': 'float', 'low': 1e-4, 'high': 1.0, 'log': True}}, got {entry!r}."
        )
    if isinstance(entry, (FloatDistribution, IntDistribution)):
        _check_ends(who, entry.low, entry.high)
    if entry.single():
        raise ValueError(f"{who} has a single value, {entry}: nothing to search. Leave it out of the space.")
    return entry


def _range(who: str, entry: dict[str, Any]) -> BaseDistribution:
    kind = entry.pop("type", None)
    if kind not in KINDS:
        raise ValueError(f"{who}: a range needs 'type': 'float' or 'type': 'int', got {kind!r}.")
    known = ("low", "high", "log", "step")
    for key in entry:
        if key not in known:
            raise ValueError(f"{who}: {nearest('a range has', key, known)}")
    for end in ("low", "high"):
        value = entry.get(end)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{who}: {end} must be a number, got {value!r}.")
        if kind == "int" and value != int(value):
            raise ValueError(f"{who}: {end} of an int range must be a whole number, got {value!r}.")
    _check_ends(who, entry["low"], entry["high"])
    try:
        return KINDS[kind](**entry)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{who}: {error}") from error


def _choices(who: str, entry: Iterable[Any]) -> CategoricalDistribution:
    choices = list(entry)
    if not choices:
        raise ValueError(f"{who} has no choices. List some, or leave it out of the space.")
    for choice in choices:
        if not isinstance(choice, CHOICE_TYPES):
            raise TypeError(
                f"{who}: choices must be strings, numbers, True, False or None, which a storage can keep, "
                f"got {choice!r}. Give it a name, and look it up while you build."
            )
    return CategoricalDistribution(choices)


def _check_ends(who: str, low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{who}: low={low} and high={high} must be finite.")
    if not low < high:
        raise ValueError(
            f"{who}: low={low} must be below high={high}: no value lies between. Swap them if they are "
            "reversed; a value that is fixed does not belong to the space."
        )


def suggest(trial: BaseTrial, space: Space) -> dict[str, Any]:
    """The trial's value of each setting."""
    settings: dict[str, Any] = {}
    for name, entry in space.items():
        if isinstance(entry, FloatDistribution):
            settings[name] = trial.suggest_float(name, entry.low, entry.high, step=entry.step, log=entry.log)
        elif isinstance(entry, IntDistribution):
            settings[name] = trial.suggest_int(name, entry.low, entry.high, step=entry.step, log=entry.log)
        elif isinstance(entry, CategoricalDistribution):
            settings[name] = trial.suggest_categorical(name, entry.choices)
    return settings


def grid_values(space: Space, points: int) -> dict[str, list[Any]]:
    """All choices, and of each range all values or ``points`` of them, evenly spread on its scale.

    Raises:
        ValueError: for fewer than two points, or a grid of more than a hundred thousand.
    """
    if points < 2:
        raise ValueError(f"A grid needs at least 2 points in each range, got points={points}.")
    values = {name: _values(entry, points) for name, entry in space.items()}
    size = math.prod(len(of_one) for of_one in values.values())
    if size > MAX_GRID:
        some = ", ".join([*list(space)[:3], *(["..."] if len(space) > 3 else [])])
        raise ValueError(
            f"A grid over {some} with points={points} has {size:.3g} points. Take fewer, a smaller space, or "
            "sampler='random'."
        )
    return values


def _values(entry: BaseDistribution, points: int) -> list[Any]:
    if isinstance(entry, CategoricalDistribution):
        return list(entry.choices)
    assert isinstance(entry, (FloatDistribution, IntDistribution))
    if entry.step is None or entry.log:
        spaced = (np.geomspace if entry.log else np.linspace)(entry.low, entry.high, points)
        whole = isinstance(entry, IntDistribution)
        return sorted({int(value) for value in spaced.round()}) if whole else spaced.tolist()
    num_steps = round((entry.high - entry.low) / entry.step)
    chosen = np.unique(np.linspace(0, num_steps, min(points, num_steps + 1)).round())
    kind = int if isinstance(entry, IntDistribution) else float
    return [kind(entry.low + step * entry.step) for step in chosen]


def packed(space: Space) -> dict[str, Any]:
    """As a storage keeps it."""
    return {name: json.loads(distribution_to_json(entry)) for name, entry in space.items()}


def unpacked(stored: Mapping[str, Any]) -> Space:
    """The inverse of :func:`packed`."""
    return {name: json_to_distribution(json.dumps(entry)) for name, entry in stored.items()}


def nearest(what: str, name: object, known: Iterable[str]) -> str:
    """A sentence about a name that does not exist, with the nearest one that does."""
    names = sorted(known)
    found = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {found[0]!r}?" if found else ""
    return f"{what} {', '.join(map(repr, names))}, got {name!r}.{hint}"
