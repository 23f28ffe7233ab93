"""Objects from what a configuration says of them, checked against the signatures of their classes."""

from __future__ import annotations

import collections.abc as abc
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import SequenceMatcher, get_close_matches
from functools import cache
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from .config import NAMED, Config, ConfigError
from .import_path import imported
from .messages import one_line, shortened

T = TypeVar("T")
Known = Mapping[str, Callable[..., Any]]


def make(
    named: Mapping[str, Any], known: Known, base: type, key: str, *args: Any, skip: Collection[str] = ()
) -> Any:
    """The object that a configuration names: ``{name: SGD, lr: 0.1}``.

    Args:
        named: the name of the class and its arguments.
        known: what may be called by name alone; anything else by its import path.
        base: what it must be, if it is imported.
        key: where it stands in the configuration, for messages.
        args: positional arguments that come first.
        skip: names of ``args``.
    Raises:
        ConfigError: no such class, or arguments that it refuses. One line.
    """
    kind = find(named, known, base, key)
    options = {name: value for name, value in named.items() if name != "name"}
    return call_with_options(kind, options, key, *args, skip=skip)


def find(named: Mapping[str, Any], known: Known, base: type, key: str) -> Callable[..., Any]:
    """The class of that name. Raises as :func:`make`."""
    name = named.get("name")
    if not isinstance(name, str):
        raise ConfigError(f"{key} needs the name of a class, such as {next(iter(known))}; got name: {name}.")
    if name in known:
        return known[name]
    if "." in name:
        return imported(name, base, key)
    nearest = max(known, key=lambda each: _likeness(name, each))
    raise ConfigError(
        f"{key}: there is no {name}. The nearest is {nearest}; known are {', '.join(sorted(known))}, and "
        "import paths such as my_package.MyClass."
    )


def subclasses(base: type) -> dict[str, type]:
    """All that can be made, by name."""

    def below(kind: type) -> Iterator[type]:
        inner: list[type] = kind.__subclasses__()
        for each in inner:
            yield each
            yield from below(each)

    return {kind.__name__: kind for kind in below(base) if not inspect.isabstract(kind)}


def call_with_options(
    function: Callable[..., T], options: Mapping[str, Any], key: str, *args: Any, skip: Collection[str] = ()
) -> T:
    """``function(*args, **options)``, with names and types of the options as in the function's signature.

    Types follow the annotations, so that a list of YAML becomes the tuple that Adam's betas are.

    >>> import torch
    >>> weights = [torch.zeros(3, requires_grad=True)]
    >>> where = "options"
    >>> adam = call_with_options(torch.optim.Adam, {"betas": [0.5, 0.9]}, where, weights, skip={"params"})
    >>> adam.defaults["betas"]
    (0.5, 0.9)
    >>> call_with_options(torch.optim.SGD, {"momentun": 0.9}, where, weights, skip={"params"})
    Traceback (most recent call last):
    torch_hypergrad.experiment.config.ConfigError: options: SGD has no momentun. Did you mean momentum?

    Args:
        function: a function or a class
        options: keyword arguments, as a configuration holds them
        key: where they stand in the configuration, such as optimizer, for messages
        args: positional arguments that come first
        skip: names that options may not give, those of ``args``
    Raises:
        ConfigError: an unknown name, a wrong type, a missing argument, or a value that ``function`` refuses.
            One line.
    """
    checked = check_options(function, options, key, skip)
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}.{name}={value} must be a finite number.")
    try:
        return function(*args, **checked)
    except ConfigError:
        raise
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {_name(function)} refused {dict(options)}: {one_line(error)}") from error


def section(kind: Callable[..., T], content: Any, key: str = "") -> T:
    """The dataclass whose fields are the keys of a section: of the whole configuration, if ``key`` is empty.

    Raises:
        ConfigError: an unknown key, a wrong type, or a value out of its range. One line.
    """
    hints, _ = _signature(kind)
    for name in _mapping(content, key):
        if name not in hints:
            paths = [*(_under(key, each) for each in hints), *_paths()]
            nearest = max(paths, key=lambda path: _likeness(name, path))
            is_like = _likeness(name, nearest) >= LIKE
            there = f"The nearest is {nearest}" if is_like else f"It could be {', '.join(hints)}"
            raise ConfigError(f"Unknown key {_under(key, name)}. {there}; --help lists them all.")
    return kind(**check_options(kind, content, key))


def check_options(
    function: Callable[..., Any], options: Mapping[Any, Any], key: str, skip: Collection[str] = ()
) -> dict[str, Any]:
    """The options in the types of the signature. Raises as :func:`call_with_options` does, which see."""
    every, takes_others = _signature(function)
    hints = {name: hint for name, hint in every.items() if name not in skip}
    checked = {}
    for name, value in options.items():
        if name not in hints and not takes_others:
            near = get_close_matches(str(name), hints, n=1)
            others = f"It has {', '.join(hints)}." if hints else "It takes no options."
            remedy = f"Did you mean {near[0]}?" if near else others
            raise ConfigError(f"{key}: {_name(function)} has no {name}. {remedy}")
        checked[name] = _typed(value, hints.get(name, Any), _under(key, name))
    return checked


def _typed(value: Any, hint: Any, key: str) -> Any:
    """A value in the type of the hint."""
    kind = next((each for each in _alternatives(hint) if each is not NoneType), Any)
    if kind is Any or (value is None and NoneType in _alternatives(hint)):
        return value
    is_base = inspect.isabstract(kind) and (get_origin(kind) or kind).__module__ != "collections.abc"
    if is_base and isinstance(value, (str, Mapping)):  # such as the solver of a method
        return make({"name": value} if isinstance(value, str) else value, subclasses(kind), kind, key)
    if is_dataclass(kind) and not is_base:
        return section(kind, value, key)
    if get_origin(kind) is dict:
        inner = get_args(kind)[1]
        return {name: _typed(each, inner, f"{key}.{name}") for name, each in _mapping(value, key).items()}
    if (parser := _parser(hint)) is None:
        return value
    try:
        parsed = parser.instantiate(parser.parse_object({"value": value}))["value"]
    except ArgumentError as error:
        raise ConfigError(_wrong(value, hint, key)) from error
    if parsed is None:
        raise ConfigError(_wrong(value, hint, key))
    if type(parsed).__module__ == "jsonargparse.typing":  # a range or pattern, as in config.py
        parsed = type(parsed).__bases__[-1](parsed)
    return parsed


def _alternatives(hint: Any) -> Sequence[Any]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _mapping(content: Any, key: str) -> Mapping[Any, Any]:
    if not isinstance(content, Mapping):
        raise ConfigError(f"{key} is a section and needs keys with values, got {shortened(content)}.")
    for name in content:
        if not isinstance(name, str):
            raise ConfigError(f"Keys are names, got {shortened(name)} under {key or 'the top'}.")
    return content


@cache
def _parser(hint: Any) -> ArgumentParser | None:
    """What checks one value; None of a type that jsonargparse does not know."""
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=hint)
    except ValueError:
        return None
    return parser


@cache
def _signature(function: Any) -> tuple[dict[str, Any], bool]:
    """The types of its arguments, with those that a class hands on to what it inherits from; and whether
    there may be any others."""
    is_class, found = isinstance(function, type), dict[str, Any]()
    kinds = [kind for kind in function.__mro__ if "__init__" in vars(kind)] if is_class else []
    for call in [kind.__init__ for kind in kinds] if is_class else [function]:
        arguments = list(inspect.signature(call).parameters.values())[is_class:]
        for each in arguments:
            if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY):
                hint = _type_of(each.annotation, getattr(inspect.unwrap(call), "__globals__", {}))
                found.setdefault(each.name, hint | None if each.default is None else hint)
        if not any(each.kind is each.VAR_KEYWORD for each in arguments):
            return found, False
    return found, True


def _type_of(annotation: Any, names: dict[str, Any]) -> Any:
    """Any, where there is none, or one that cannot be resolved at run time."""
    given = {} if annotation is inspect.Parameter.empty else {"it": annotation}
    try:
        # torch's schedulers import the abstract collections for type checkers alone
        return get_type_hints(SimpleNamespace(__annotations__=given), names, vars(abc)).get("it", Any)
    except (NameError, TypeError, AttributeError):
        return Any


def _under(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", repr(function))


def _paths() -> Iterator[str]:
    """All keys, with the arguments of classes that a configuration names by itself."""
    yield "config"
    for name, default in vars(Config()).items():
        yield name
        inner = vars(default) if is_dataclass(default) else default if name in NAMED else {}
        yield from (f"{name}.{each}" for each in inner or ())


LIKE = 0.6  # as difflib has it


def _likeness(name: str, path: str) -> float:
    """Of a name, and the last part of a path."""
    return SequenceMatcher(None, name.lower(), path.rpartition(".")[2].lower()).ratio()


def _wrong(value: Any, hint: Any, key: str) -> str:
    kinds = _alternatives(hint)
    choices = [str(each) for kind in kinds if get_origin(kind) is Literal for each in get_args(kind)]
    near = get_close_matches(str(value), choices, n=1)
    nearest = f" The nearest is {near[0]}." if near else ""
    return f"{key}: got {shortened(value)}, expected {' or '.join(map(_in_words, kinds))}.{nearest}"


def _in_words(kind: Any) -> str:
    """A type as a user would say it."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    words = inspect.formatannotation(kind).strip("'\"").removeprefix("jsonargparse.typing.")
    return "null" if kind is NoneType else words
