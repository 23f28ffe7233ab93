"""The examples run as a user runs them, in a short form, and write what they say they write."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(name: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *map(str, args)]
    surroundings = {**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=surroundings, timeout=120)


def rows_of(table: str) -> dict[str, list[str]]:
    """The rows of a printed table by their first cell."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def check_picture(path: Path) -> None:
    pixels = imread(path)
    assert min(pixels.shape[:2]) > 200
    assert (pixels[0, 0, :3] == 1).all(), "a white background, for paper and for the dark"
    assert pixels.std() > 0.05, "nothing is drawn"


def test_per_parameter_weight_decay(tmp_path: Path) -> None:
    done = run_example("per_parameter_weight_decay.py", "--seeds", 2, "--steps", 120, "--hidden", 64, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"train=0\.\d+, val=0\.\d+", done.stderr), "the bar shows live losses"
    rows = rows_of(done.stdout)
    num_values = {
        "no weight decay": 0,
        "best single value": 1,
        "same, training on both sets": 1,
        "tuned per group": 1,
        "tuned per tensor": 4,
        "tuned per element": 64 * 64 + 64 + 64 * 10 + 10,
    }
    assert {name: int(rows[name][0]) for name in num_values} == num_values
    for name in num_values:
        accuracy, loss = (float(cell.split(" ± ")[0]) for cell in rows[name][1:3])
        assert 88 < accuracy < 99, name
        assert 0.05 < loss < 0.5, name
    for picture in ("loss_curves.png", "learned_decay.png"):
        assert str(tmp_path / picture) in done.stdout
        check_picture(tmp_path / picture)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dataset", "mnist", "--data-root", "nowhere"], r"train-images-idx3-ubyte, .* not found in nowhere.*--download"),
        (["--train-size", 1500], r"2000 images, and digits has 1797"),
        (["--steps", 100], r"--steps above 100"),
    ],
)
def test_per_parameter_weight_decay_refuses(
    args: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(EXAMPLES / "per_parameter_weight_decay.py"))["main"]
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, args), "--out", str(tmp_path)])
    shown = capsys.readouterr().err if stopped.value.code == 2 else str(stopped.value)
    assert re.search(message, shown)
    assert not any(tmp_path.iterdir())
