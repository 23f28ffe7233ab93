"""The examples run as a user runs them, in a short form, and write what they say they write."""

from __future__ import annotations

import ast
import io
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

EXAMPLES = Path(__file__).parent.parent / "examples"
HELPERS = {"command_line.py", "common.py"}
NAMES = sorted(
    path.name
    for path in EXAMPLES.glob("*.py")
    if path.name not in HELPERS and "option_parser(" in path.read_text(encoding="utf-8")
)
"""Those that train networks on images, with the options that come with it."""


def start_example(name: str, *args: object) -> str:
    """What it prints in a process of its own."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *map(str, args)]
    surroundings = {**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=surroundings, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_example(name: str, *args: object) -> str:
    """What it prints in this process, which has imported all already."""
    printed, before, path, num_threads = io.StringIO(), sys.argv, sys.path, torch.get_num_threads()
    sys.argv, sys.path = [name, *map(str, args)], [str(EXAMPLES), *path]
    try:
        with redirect_stdout(printed):
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        sys.argv, sys.path = before, path
        torch.set_num_threads(num_threads)
    return printed.getvalue()


def rows_of(table: str) -> dict[str, list[str]]:
    """The rows of the printed tables by their first cell."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def mean(cell: str) -> float:
    """Of a cell such as ``93.3 ± 0.8``."""
    return float(cell.split(" ± ")[0])


def check_picture(path: Path, printed: str) -> None:
    assert str(path) in printed
    pixels = imread(path)
    assert min(pixels.shape[:2]) > 200
    assert (pixels[0, 0, :3] == 1).all(), "a white background, for paper and for the dark"
    assert pixels.std() > 0.05, "nothing is drawn"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_is_short_and_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    assert ast.get_docstring(ast.parse(text))


def test_drop_in() -> None:
    printed = start_example("drop_in.py", "--steps", 200)
    assert re.search(r"step 200: validation loss 0\.\d+, weight decay 0\.00\d+", printed)
    rows = rows_of(printed)
    for name in ("tuned while training", "fixed at the start", "none", "fixed at what was learned"):
        _, accuracy, loss = map(mean, rows[name])
        assert 88 < accuracy < 99, name
        assert 0.1 < loss < 0.5, name
    assert 0 < mean(rows["tuned while training"][0]) < mean(rows["fixed at the start"][0])
    assert rows["tuned while training"][0] == rows["fixed at what was learned"][0]


def test_per_parameter_weight_decay(tmp_path: Path) -> None:
    printed = run_example(
        "per_parameter_weight_decay.py", "--seeds", 1, "--steps", 120, "--hidden", 64, "--out", tmp_path
    )
    rows = rows_of(printed)
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
        accuracy, loss = map(mean, rows[name][1:3])
        assert 88 < accuracy < 99, name
        assert 0.05 < loss < 0.5, name
    check_picture(tmp_path / "learned_decay.png", printed)


def test_learning_rate_schedule(tmp_path: Path) -> None:
    printed = run_example(
        "learning_rate_schedule.py", "--steps", 15, "--seeds", 2, "--episodes", 12, "--out", tmp_path
    )
    rows = rows_of(printed)
    for name in ("best constant of a grid", "best cosine of a grid", "learned"):
        first, peak, last, val_loss, test_loss, accuracy = map(mean, rows[name])
        assert 0 < first <= peak < 5, name
        assert 0 <= last < 1.5, name
        assert max(val_loss, test_loss) < 2.0, name
        assert 50 < accuracy < 99, name
    assert len(set(rows["learned"][:3])) > 1, "a schedule"
    check_picture(tmp_path / "schedules.png", printed)


def test_data_cleaning(tmp_path: Path) -> None:
    printed = run_example(
        "data_cleaning.py", "--steps", 140, "--seeds", 1, "--train-size", 200, "--out", tmp_path
    )
    rows = rows_of(printed)
    for name in (
        "noisy, one tuned weight for each",
        "noisy training images",
        "clean validation images",
        "both together",
        "kept by the weights, and validation",
        "right labels, which nobody knows",
    ):
        assert 60 < mean(rows[name][0]) < 99, name
    (num_wrong, found), (num_right, lost) = (map(int, rows[kind]) for kind in ("wrong", "right"))
    assert num_wrong == num_right == 100
    assert found > 2 * lost
    area = re.search(r"Area under the ROC curve: (0\.\d+)", printed)
    assert area
    assert 0.75 < float(area[1]) < 1
    check_picture(tmp_path / "weights.png", printed)


def test_augmentation(tmp_path: Path) -> None:
    printed = run_example(
        "augmentation.py", "--steps", 120, "--seeds", 1, "--train-size", 200, "--out", tmp_path
    )
    rows = rows_of(printed)
    for name in (
        "none",
        "Gaussian noise, best of a grid",
        "none, training on both sets",
        "same noise, training on both sets",
        "learned",
    ):
        accuracy, loss = map(mean, rows[name])
        assert 50 < accuracy < 99, name
        assert 0.2 < loss < 1.5, name
    check_picture(tmp_path / "augmented.png", printed)


def test_own_optimizer() -> None:
    rows = rows_of(run_example("own_optimizer.py", "--steps", 12, "--seeds", 2, "--episodes", 6))
    for name in ("lr/group0", "betas.0/group0", "betas.1/group0", "eps/group0", "weight_decay/group0"):
        computed, reference = map(float, rows[name])
        assert computed == pytest.approx(reference, rel=1e-5, abs=1e-9)
    losses = {}
    for name in ("usual lr", "best of a grid", "tuned"):
        lr, decay, accuracy, losses[name] = map(mean, rows[name])
        assert lr > 0, name
        assert decay >= 0, name
        assert 10 < accuracy < 99, name
    assert max(losses["tuned"], losses["best of a grid"]) < losses["usual lr"]


def test_t1t2(tmp_path: Path) -> None:
    printed = run_example("t1t2.py", "--steps", 40, "--seeds", 1, "--out", tmp_path)
    rows = rows_of(printed)
    decay, noise, *_ = map(float, rows["split 0: T1-T2, bad start"])
    assert decay < 0.01, "the bad start"
    assert 0 < noise < 1
    check_picture(tmp_path / "values.png", printed)


def test_darts(tmp_path: Path) -> None:
    printed = run_example("darts.py", "--steps", 12, "--seeds", 2, "--out", tmp_path)
    rows = rows_of(printed)
    rows.pop("cell")
    assert len(rows) == 16
    losses = [float(row[1]) for row in rows.values()]
    assert losses == sorted(losses)
    assert [int(row[0]) for row in rows.values()] == list(range(1, 17))
    for order, column in ((2, 4), (1, 5)):
        finders = {name: row[column] for name, row in rows.items() if row[column]}
        assert sorted(", ".join(finders.values()).split(", ")) == ["0", "1"], "each search finds one cell"
        best = next(iter(finders))
        assert f"Order {order}, the best cell found: {best}: rank {rows[best][0]} of 16" in printed
    check_picture(tmp_path / "shares.png", printed)


def test_drmad() -> None:
    rows = rows_of(run_example("drmad.py", "--steps", 60, "--seeds", 1, "--rounds", 4))
    for name in ("DrMAD, 6 points", "DrMAD, all 60 points", "exact: Unrolled"):
        first, last, _ = map(mean, rows[name])
        assert last < first, name
    assert mean(rows["exact: Unrolled"][1]) < mean(rows["DrMAD, 6 points"][0])


def refusal(name: str, args: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    """What the example says as it stops."""
    main = runpy.run_path(str(EXAMPLES / name))["main"]
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, args)])
    return capsys.readouterr().err if stopped.value.code == 2 else str(stopped.value)


@pytest.fixture
def beside_the_examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Examples import what they share from their own folder; nothing is written to the working directory."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("beside_the_examples")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--dataset", "mnist", "--data-root", "nowhere"],
            r"train-images-idx3-ubyte, .* not found in nowhere.*--download",
        ),
        (["--train-size", 1500, "--val-size", 500], r"2000 images, and digits has 1797"),
        (["--seeds", 0], r"--seeds must be at least 1, got 0"),
        (["--steps", 0], r"--steps must be at least \d+, got 0"),
    ],
    ids=["no data", "too many images", "no seeds", "no steps"],
)
def test_refuses(
    name: str, args: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = refusal(name, args, capsys)
    assert re.search(message, shown)
    assert "Traceback" not in shown
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("beside_the_examples")
@pytest.mark.parametrize(
    ("name", "steps", "least"), [("per_parameter_weight_decay.py", 100, 101), ("augmentation.py", 99, 100)]
)
def test_refuses_to_end_before_tuning_begins(
    name: str, steps: int, least: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"--steps must be at least {least}, got {steps}" in refusal(name, ["--steps", steps], capsys)
