"""Docstrings as the site shows them: mathematics between dollars, and public names that are links."""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from typing import Any

from griffe import Extension, Object

PACKAGES = ("torch_hypergrad", "torch_hypergrad.bilevel", "torch_hypergrad.search")
ROLE = re.compile(r":(?P<role>class|meth|func|data|math):`(?P<text>[^`]+)`")
BLOCK = re.compile(
    r"^(?P<indent> *)\.\. math:: *(?P<first>.*)\n(?P<rest>(?:(?P=indent) +\S.*\n?)*)", re.MULTILINE
)


@cache
def homes() -> dict[str, tuple[str, Any]]:
    """Where each public name is documented, and what it is."""
    packages = [import_module(name) for name in PACKAGES]
    return {name: (f"{p.__name__}.{name}", getattr(p, name)) for p in packages for name in p.__all__}


def block(found: re.Match[str]) -> str:
    """A formula of its own lines, which blank lines set apart."""
    lines = [found["first"], *found["rest"].splitlines()]
    formula = " ".join(line.strip() for line in lines if line.strip())
    return f"\n{found['indent']}$${formula}$$\n\n"


def link(text: str, scope: str) -> str:
    """``text`` as code, and as a link where it is public: itself, or in the class whose docstring this is."""
    parts = text.removeprefix("torch_hypergrad.").split(".")
    for path in (parts, [scope, *parts]):
        home, thing = homes().get(path[0], ("", None))
        if home and all(hasattr(thing, name) for name in path[1:]):
            return f"[`{text}`][{'.'.join((home, *path[1:]))}]"
    return f"`{text}`"


def to_markdown(text: str, scope: str = "") -> str:
    """A docstring in which Sphinx's directives and roles have become Markdown."""
    text = BLOCK.sub(block, text + "\n").rstrip()
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)  # as the parser calls this section
    return ROLE.sub(lambda f: f"${f['text']}$" if f["role"] == "math" else link(f["text"], scope), text)


class Docstrings(Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Called for each object of the package."""
        if obj.docstring:
            scope = obj if obj.is_class else obj.parent
            obj.docstring.value = to_markdown(obj.docstring.value, scope.name if scope else "")
