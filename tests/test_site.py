"""The API pages of the site: every public name is on one, and is documented; what docstrings become."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

API = Path(__file__).parent.parent / "docs" / "api"
PACKAGES = (
    "torch_hypergrad",
    "torch_hypergrad.bilevel",
    "torch_hypergrad.search",
    "torch_hypergrad.experiment.tasks",
)
MODULES = (
    "torch_hypergrad.errors",
    "torch_hypergrad.testing",
    "torch_hypergrad.transforms",
)  # without __all__
SHOWN = Counter(
    name
    for page in sorted(API.glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
)


def own_names(module: Any) -> list[str]:
    """The public functions and classes that a module without ``__all__`` defines."""
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__
    ]


def public_things() -> list[Any]:
    """Each public name once, with the module that it is imported from."""
    modules = [importlib.import_module(name) for name in (*PACKAGES, *MODULES)]
    found: dict[int, tuple[str, str]] = {}
    for module in modules:
        for name in getattr(module, "__all__", None) or own_names(module):
            found.setdefault(id(getattr(module, name)), (module.__name__, name))
    return [pytest.param(*pair, id=".".join(pair)) for pair in found.values()]


def attribute_docstring(module: Any, name: str) -> str | None:
    """The string that follows the assignment of ``name`` in a module's source."""
    body = ast.parse(inspect.getsource(module)).body
    for statement, following in pairwise(body):
        targets = (
            statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        )
        is_string = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if any(isinstance(target, ast.Name) and target.id == name for target in targets) and is_string:
            return str(following.value.value)
    return None


def own_docstring(module: Any, name: str) -> str | None:
    """What the source says of a name; of a class not what it inherits, nor what dataclass makes up."""
    thing = getattr(module, name)
    if not (inspect.isclass(thing) or inspect.isroutine(thing)):
        home = next(m for m in vars(module).values() if inspect.ismodule(m) and vars(m).get(name) is thing)
        return attribute_docstring(home, name)
    text = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    return None if text is None or text.startswith(f"{thing.__name__}(") else text


@pytest.mark.parametrize(("module", "name"), public_things())
def test_a_public_name_is_on_one_page(module, name):
    assert SHOWN[f"{module}.{name}"] == 1


@pytest.mark.parametrize("path", sorted(SHOWN))
def test_what_is_on_a_page_is_there_and_documented(path):
    module, _, name = path.rpartition(".")
    assert own_docstring(importlib.import_module(module), name), f"{path} has no docstring of its own"


@pytest.mark.parametrize("path", sorted(SHOWN))
def test_public_members_are_documented_here_or_where_they_were_declared(path):
    module, _, name = path.rpartition(".")
    thing = getattr(importlib.import_module(module), name)
    members = vars(thing) if inspect.isclass(thing) else {}
    kinds = (property, staticmethod, classmethod)
    public = [
        m
        for m, v in members.items()
        if not m.startswith("_") and (inspect.isroutine(v) or isinstance(v, kinds))
    ]
    assert not [m for m in public if not inspect.getdoc(getattr(thing, m))]


def test_every_page_is_in_the_navigation():
    navigation = (API.parent.parent / "mkdocs.yml").read_text()
    pages = [page.relative_to(API.parent).as_posix() for page in API.parent.rglob("*.md")]
    notebooks = [f"notebooks/{page.stem}.md" for page in API.parent.glob("notebooks/*.py")]
    assert not [page for page in (*pages, *notebooks) if page not in navigation]
