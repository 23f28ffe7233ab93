"""Which keys a configuration has, and the nearest one to a name that is none."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from .config import Config, ConfigError, Tune

ANY = "*"  # a name that the user chooses, such as those under tune
COMMAND_KEYS = (
    "config",
    "dry_run",
    "seeds",
    "jobs",
    "help",
    "last",
    "version",
    "print_config",
    "out",
)  # of commands, not of a run


def _schema(kind: type) -> dict[str, Any]:
    """Sections as dicts of keys, other keys as None."""
    hints = get_type_hints(kind)
    special = {"tune": {ANY: {f.name: None for f in fields(Tune)}}, "options": {ANY: None}}
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
    """Refuses keys of a YAML file that a configuration does not have.

    Raises:
        ConfigError: with the nearest valid key.
    """
    for name, value in content.items():
        if not isinstance(name, str):
            raise ConfigError(
                f"Keys are names, got {name!r} under {path.rstrip('.') or 'the top'} in {where}."
            )
        if not path and name in COMMAND_KEYS:
            continue
        _check_name(name, schema, path, f"in {where}")
        inner = schema.get(name, schema.get(ANY))
        if inner is not None:
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{path}{name} is a section and needs keys with "
                    f"values, got {shortened(value)} in {where}."
                )
            check_content(value, where, inner, f"{path}{name}.")


def check_flag(flag: str) -> None:
    """Refuses ``--a.key`` on the command line that a configuration does not have.

    Raises:
        ConfigError: with the nearest valid key.
    """
    parts = flag.split(".")
    if parts[0] in COMMAND_KEYS:
        return
    if parts[0] == "tune" and len(parts) > 3:
        name, key = ".".join(parts[1:-1]), parts[-1]
        raise ConfigError(
            f"On the command line a name with a dot, {name}, is "
            f"given as --tune '{{{name}: {{{key}: VALUE}}}}'."
        )
    schema: Mapping[str, Any] = SCHEMA
    for i, name in enumerate(parts):
        if name == "help":
            return
        _check_name(name, schema, "".join(f"{part}." for part in parts[:i]), "on the command line")
        schema = schema.get(name, schema.get(ANY)) or {ANY: None}


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
