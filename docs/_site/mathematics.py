"""Formulas become MathML when the site is built: no script and no network for the reader, and a formula that
cannot be read stops the build, as does markup that was left over."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
PRIME = re.compile(r"<msup>(<mi>[^<]*</mi>)<mi>&#x02032;</mi></msup>")  # fonts have it raised
LEFT_OVER = re.compile(r"\.\. \w+::|:(?:class|meth|func|data|math):|class=\"arithmatex\"|\$\$")
CODE = re.compile(r"<(pre|code|script)\b.*?</\1>", re.DOTALL)


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Called for each page once it is HTML."""
    html = FORMULA.sub(lambda found: mathml(found, page), html)
    left = LEFT_OVER.search(CODE.sub("", html))
    if left:
        around = html[max(html.find(left[0]) - 80, 0) :][:200]
        raise PluginError(f"{page.file.src_uri} shows markup: {left[0]!r} in {around!r}")
    return html


def mathml(found: re.Match[str], page: Page) -> str:
    """The formula; latex2mathml leaves commands that it does not know as they are."""
    latex = unescape(found["latex"]).strip()
    formula = convert(latex, display="block" if found["tag"] == "div" else "inline")
    formula = PRIME.sub(r'\g<1><mo lspace="0" rspace="0">&#x02032;</mo>', formula)
    if "\\" in formula:
        raise PluginError(f"{page.file.src_uri}: latex2mathml cannot read {latex!r}")
    return formula
