"""A class by its import path."""

from __future__ import annotations

import importlib
import os
import sys
from difflib import get_close_matches

from .config import ConfigError
from .messages import one_line


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
