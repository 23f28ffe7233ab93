"""What the parts of the package need, and what is said where it is missing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

from runs import ROOT

PACKAGE = ROOT / "torch_hypergrad"
PARTS = ("bilevel", "experiment", "search", "cli.py")  # which have extras of their own
BASE = {"torch", "higher", "tqdm"}


def imported(tree: ast.AST) -> set[str]:
    """The packages that are imported from elsewhere, unless the code goes on without them."""
    optional = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in optional:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
    return found


def test_the_engine_needs_torch_higher_and_tqdm_alone() -> None:
    files = [file for file in PACKAGE.rglob("*.py") if file.relative_to(PACKAGE).parts[0] not in PARTS]
    assert len(files) > 60
    found = {file: imported(ast.parse(file.read_text())) - BASE - sys.stdlib_module_names for file in files}
    assert not {str(file): names for file, names in found.items() if names}
    declared = (ROOT / "setup.py").read_text()
    assert 'install_requires=["torch>=2.6", "higher>=0.2.1", "tqdm>=4.66"]' in declared


@pytest.mark.parametrize(
    ("code", "missing", "told"),
    [
        ("import torch_hypergrad.bilevel", "scipy", "'torch-hypergrad[bilevel]'"),
        ("import torch_hypergrad.search", "optuna", "'torch-hypergrad[search]'"),
        ("from torch_hypergrad import load_run", "matplotlib", "'torch-hypergrad[cli]'"),
        (
            "from torch_hypergrad.__main__ import main; sys.exit(main())",
            "jsonargparse",
            "'torch-hypergrad[cli]'",
        ),
    ],
)
def test_what_is_missing_is_named_with_the_remedy(code: str, missing: str, told: str) -> None:
    text = f"import sys\nsys.modules[{missing!r}] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, encoding="utf-8", env=os.environ)
    last = done.stderr.splitlines()[-1]
    assert done.returncode != 0
    assert told in last, done.stderr
    assert f"needs {missing}, which is not installed" in last
