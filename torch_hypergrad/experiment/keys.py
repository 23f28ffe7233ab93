"""Which keys a configuration has, and the nearest one to a name that is none."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from .config import NAMED, Config, ConfigError, Tune

ANY = "*"  # a name that the user chooses, or one that only the named class knows


def _schema(kind: type) -> dict[str, Any]:
    """Sections as dicts of keys, other keys as None."""
    hints = get_type_hints(kind)
    special: dict[str, Any] = {"tune": {ANY: {f.name: None for f in fields(Tune)}}, "space": {ANY: None}}
    special |= {name: {ANY: None} for name in NAMED}
    sections = {f.name: _schema(hints[f.name]) for f in fields(kind) if is_dataclass(hints[f.name])}
    return {f.name: sections.get(f.name, special.get(f.name)) for f in fields(kind)}


SCHEMA: dict[str, Any] = _schema(Config)


def _paths(schema: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, inner in schema.items():
        yield prefix + name
        yield from _paths(inner or {}, f"{prefix}{name}.")


PATHS = tuple(path for path in _paths(SCHEMA) if ANY not in path)


def check_content(
    content: Mapping[Any, Any], where: str, schema: Mapping[str, Any] = SCHEMA, path: str = ""
) -> None:
    """Refuses keys that a configuration does not have.

    Raises:
        ConfigError: with the nearest valid key.
    """
    for name, value in content.items():
        if not isinstance(name, str):
            raise ConfigError(f"Keys are names, got {name!r} under {path.rstrip('.') or 'the top'} {where}.")
        _check_name(name, schema, path, where)
        inner = schema.get(name, schema.get(ANY))
        if inner is None or (not path and name in NAMED and (value is None or isinstance(value, str))):
            continue
        if not isinstance(value, dict):
            raise ConfigError(
                f"{path}{name} is a section and needs keys with values, got {shortened(value)} {where}."
            )
        check_content(value, where, inner, f"{path}{name}.")


def _check_name(name: str, schema: Mapping[str, Any], path: str, where: str) -> None:
    if name in schema or ANY in schema:
        return
    near = difflib.get_close_matches(name, schema, n=1)
    nearest = path + near[0] if near else _nearest(path + name)
    raise ConfigError(f"Unknown key {path}{name} {where}. The nearest is {nearest}; --help lists them all.")


def _nearest(path: str) -> str:
    """The key of any section whose last part is most like that of ``path``."""
    last = path.rpartition(".")[2]
    return max(
        PATHS,
        key=lambda known: (
            difflib.SequenceMatcher(None, last, known.rpartition(".")[2]).ratio(),
            -len(known),
        ),
    )


def shortened(value: Any) -> str:
    """A value in a message, on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) < 80 else text[:77] + "..."
