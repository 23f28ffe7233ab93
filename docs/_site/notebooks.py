"""Notebooks, written as Python with cells, are run when the site is built and become pages like others."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

import jupytext
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import MarkdownExporter
from nbformat import NotebookNode

LONGEST = 120
"""Seconds of a cell."""


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Beside each ``notebooks/NAME.py`` its page ``NAME.md``, its pictures and ``NAME.ipynb`` to download."""
    sources = [f for f in files if PurePosixPath(f.src_uri).match("notebooks/*.py")]
    with ThreadPoolExecutor(2) as pool:  # each waits for a kernel, a process of its own
        notebooks = list(pool.map(run, sources))
    for file, notebook in zip(sources, notebooks):
        path = PurePosixPath(file.src_uri).with_suffix("")
        page, resources = MarkdownExporter().from_notebook_node(
            notebook, {"unique_key": path.name, "output_files_dir": path.name}
        )
        download = f"\n[This page as a notebook]({path.name}.ipynb){{ .md-button download }}\n"
        made = {f"{path}.md": page + download, f"{path}.ipynb": jupytext.writes(notebook, fmt="ipynb")}
        made |= {f"{path.parent}/{name}": picture for name, picture in resources["outputs"].items()}
        for name, content in made.items():
            files.append(File.generated(config, name, content=content))
        files.remove(file)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """In the repository links lead to the ``.py``."""
    return re.sub(r"(\]\((?:\.\./)*notebooks/\w+)\.py", r"\1.md", markdown)


def run(file: File) -> NotebookNode:
    """All cells; an error and a warning end the build."""
    notebook, name = jupytext.read(file.abs_src_path), file.src_uri
    client = NotebookClient(notebook, timeout=LONGEST, kernel_name="python3", coalesce_streams=True)
    try:
        client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})
    except CellExecutionError as error:
        raise PluginError(f"{name}: {error}") from error
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    complaints = [output.text for output in outputs if output.get("name") == "stderr"]
    if complaints:
        raise PluginError(f"{name} writes to stderr, which a page should not show: {complaints[0]}")
    return notebook
