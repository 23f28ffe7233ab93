"""Keyword arguments from a configuration: checked against the signature that they are for."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser

from .config import ConfigError

T = TypeVar("T")


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
        key: where they stand in the configuration, such as optimizer.options, for messages
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
    given = {name: value for name, value in options.items() if name in known}
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
    expected = inspect.formatannotation(parameter.annotation).strip("'\"")
    return f"{key}.{found[1]}: got {given[found[1]]!r}, expected {expected}."
