"""Puts the report together: one page of HTML that holds its pictures, and the same pictures beside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from .style import Picture


@dataclass(frozen=True)
class Table:
    """Cells of text, and how many columns from the left are words; the others are numbers, on the right."""

    cells: pd.DataFrame
    num_words: int = 1
    folded: str = ""  # if given, the words to click on to see the table
    links: Sequence[str] = ()  # for each row, where its first cell leads; empty for nowhere


@dataclass(frozen=True)
class Section:
    """A headline and what stands under it: sentences, pictures, tables, in this order."""

    title: str
    sentences: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Page:
    """All that the template shows."""

    title: str
    subtitle: str
    numbers: Sequence[tuple[str, str]]  # large: value and what it is
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    warnings: Sequence[str] = ()
    configuration: str = ""
    surroundings: Sequence[tuple[str, str]] = ()
    commands: Sequence[tuple[str, str]] = field(default_factory=tuple)  # what it does, and the command


def write_page(page: Page, out: Path) -> Path:
    """Writes report.html and the PNGs into ``out`` and returns the path of the page."""
    out.mkdir(parents=True, exist_ok=True)
    for section in page.sections:
        for picture in section.pictures:
            (out / f"{picture.name}.png").write_bytes(picture.png)
    path = out / "report.html"
    path.write_text(render(page), encoding="utf-8")
    return path


def render(page: Page) -> str:
    """The page as one HTML text that needs no other file."""
    environment = Environment(
        loader=PackageLoader("torch_hypergrad.experiment.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.get_template("template.html.j2").render(page=page)
