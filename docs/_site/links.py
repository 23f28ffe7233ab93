"""Links from pages to files outside docs/: to the repository, or to copies if REPO_URL is not set."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, find_lexer_class_for_filename

LINK = re.compile(r"(?<=\]\()(?P<path>\.\./[^)#\s]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Pages stay as they are in the repository, where GitHub shows them."""
    docs = Path(config.docs_dir).resolve()

    def moved(link: re.Match[str]) -> str:
        target = (docs / page.file.src_uri).parent.joinpath(link["path"]).resolve()
        if target.is_relative_to(docs) or not target.exists():
            return link[0]  # MkDocs says what is broken
        path = target.relative_to(docs.parent).as_posix()
        if config.repo_url:
            kind = "tree" if target.is_dir() else "blob"
            return f"{config.repo_url.rstrip('/')}/{kind}/main/{path}{link['anchor'] or ''}"
        copy = f"source/{path}.html"
        if copy not in files.src_uris:
            files.append(File.generated(config, copy, content=as_page(target)))
        return os.path.relpath(copy, Path(page.file.src_uri).parent)

    return LINK.sub(moved, markdown)


def as_page(target: Path) -> str:
    """A file with colours, or what is in a folder."""
    names = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else []
    text = "\n".join(names) if target.is_dir() else target.read_text(encoding="utf-8")
    lexer = find_lexer_class_for_filename(target.name) or TextLexer
    return highlight(text, lexer(), HtmlFormatter(full=True, title=target.name))
