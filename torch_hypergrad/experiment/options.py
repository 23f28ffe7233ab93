"""Objects by the name of their class, with arguments that are checked against its signature."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from .config import ConfigError

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
    near = get_close_matches(name.lower(), [each.lower() for each in known], n=1, cutoff=0)[0]
    nearest = next(each for each in known if each.lower() == near)
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


def imported(path: str, base: type, key: str) -> type:
    """The class at ``package.Class``, where the package may lie in the current folder.

    Raises:
        ConfigError: one line.
    """
    package, _, name = path.rpartition(".")
    if not package or not name:
        raise ConfigError(
            f"{key}: got {path!r}, expected package.Class, such as my_file.MyClass for my_file.py."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as of a script that is run there
    try:
        module = importlib.import_module(package)
    except Exception as error:  # whatever the user's code raises
        missing = isinstance(error, ModuleNotFoundError)
        remedy = f" Run where {package} can be imported, or install it." if missing else ""
        message = f"importing {package} failed ({type(error).__name__}: {one_line(error)})."
        raise ConfigError(f"{key}: {message}{remedy}") from error
    found = getattr(module, name, None)
    if found is None:
        near = get_close_matches(name, dir(module), n=1)
        raise ConfigError(f"{key}: {package} has no {name}.{f' Did you mean {near[0]}?' if near else ''}")
    if not isinstance(found, type) or not issubclass(found, base):
        kind = f"{base.__module__.partition('.')[0]}'s {base.__name__}"
        raise ConfigError(f"{key}: {path} is no subclass of {kind}. Make it one.")
    return found


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


def check_options(
    function: Callable[..., Any], options: Mapping[str, Any], key: str, skip: Collection[str] = ()
) -> dict[str, Any]:
    """The options in the types of the signature. Raises as :func:`call_with_options` does, which see."""
    parser, known = _parser(function, frozenset(skip))
    unknown = [str(name) for name in options if name not in known]
    if unknown and not _takes_any(function):
        raise ConfigError(f"{key}: {_name(function)} has no {unknown[0]}. {_suggest(unknown[0], known)}")
    given = {name: _object(value, function, name, key) for name, value in options.items() if name in known}
    try:
        parsed = parser.parse_object(given, defaults=False)
        parsed = (
            parser.instantiate(parsed)
            if hasattr(parser, "instantiate")
            else parser.instantiate_classes(parsed)
        )
    except ArgumentError as error:
        raise ConfigError(_explain(function, given, key, error)) from error
    return {**options, **{name: parsed[name] for name in given}}


def _object(value: Any, function: Callable[..., Any], name: str, key: str) -> Any:
    """An argument that names a class itself, such as the solver of a method."""
    base = _hints(function).get(name)
    if base is None or not inspect.isabstract(base) or not isinstance(value, (str, Mapping)):
        return value
    return make({"name": value} if isinstance(value, str) else value, subclasses(base), base, f"{key}.{name}")


@cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except (NameError, TypeError, AttributeError):  # annotations that cannot be resolved at run time
        return {}


@cache
def _parser(function: Callable[..., Any], skip: frozenset[str]) -> tuple[ArgumentParser, list[str]]:
    """What checks the arguments of a function, and their names."""
    parser = ArgumentParser(exit_on_error=False)
    add: Callable[..., list[str]]
    add = parser.add_class_arguments if inspect.isclass(function) else parser.add_function_arguments
    return parser, [name for name in add(function, skip=set(skip), fail_untyped=False) if name not in skip]


def one_line(message: object) -> str:
    """Its text with single spaces in place of line ends."""
    return " ".join(str(message).split())


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", repr(function))


def _takes_any(function: Callable[..., Any]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def _suggest(name: str, known: Collection[str]) -> str:
    near = get_close_matches(name, known, n=1)
    if near:
        return f"Did you mean {near[0]}?"
    return f"It has {', '.join(known)}." if known else "It takes no options."


def _explain(function: Callable[..., Any], given: Mapping[str, Any], key: str, error: ArgumentError) -> str:
    """In one line what jsonargparse says in many."""
    found = re.search(r'[Kk]ey "(\w+)', str(error))
    parameter = inspect.signature(function).parameters.get(found[1]) if found else None
    if not found or found[1] not in given or parameter is None:
        return f"{key}: {_name(function)}: {one_line(error)}."
    expected = _hints(function).get(found[1], parameter.annotation)
    return f"{key}.{found[1]}: got {given[found[1]]!r}, expected {_in_words(expected)}."


def _in_words(hint: Any) -> str:
    """A type as a user would say it."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_in_words, get_args(hint)))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    return "null" if hint is type(None) else inspect.formatannotation(hint).strip("'\"")
