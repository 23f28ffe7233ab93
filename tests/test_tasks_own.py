"""Tasks of one's own: that of the documentation works, and wrong ones are told what is wrong."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from runs import ROOT
from test_training_loop import summary_of
from torch_hypergrad import load_run
from torch_hypergrad.cli import main
from torch_hypergrad.experiment.build import _load
from torch_hypergrad.experiment.tasks import InMemory, Split, Task
from torch_hypergrad.experiment.tasks.base import Joined
from torch_hypergrad.experiment.tasks.checked import loaded

PAGE = (ROOT / "docs" / "tasks.md").read_text()
CPU = torch.device("cpu")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the files of the page, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_task", raising=False)
    (tmp_path / "my_task.py").write_text(blocks("python")[0])
    (tmp_path / "spring.yaml").write_text(blocks("yaml")[1])
    return tmp_path


# ---- the page ----------------------------------------------------------------------------------------------


def test_the_task_of_the_page_trains_and_is_reported(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--train.steps", "60", "--train.warmup", "20", "--output.loggers", "[]"]
    assert main(["train", "--config", "spring.yaml", "--output.folder", "run", *quick]) == 0
    assert "| measurements         |   mean error |   loss |" in capsys.readouterr().out
    page = (here / "run" / "report" / "report.html").read_text()
    assert "a damped spring: 100 training, 200 validation and 300 test measurements" in page
    assert "Where the network says the spring is" in page
    assert not re.search("accuracy|cross-entropy", page)
    random = torch.Generator().manual_seed(0)  # the data again, by hand
    inputs = 2 * torch.rand(600, 8, generator=random) - 1
    time = (1 + inputs[:, 2]) / 2
    places = torch.exp(-(2 + inputs[:, 1]) * time) * torch.cos((6 + inputs[:, 0]) * time)
    targets = places + 0.1 * torch.randn(600, generator=random)
    with torch.no_grad():
        told = load_run("run")(inputs[300:])[:, 0]
    result = summary_of(here / "run")["test"]
    gaps = (told - targets[300:]).abs()
    assert result["mean error"] == pytest.approx(gaps.mean().item(), rel=1e-5)
    huber = torch.where(gaps < 0.1, gaps.square() / 2, 0.1 * (gaps - 0.05)).mean().item()
    assert result["loss"] == pytest.approx(huber, rel=1e-5)


@pytest.mark.usefixtures("no_report")
def test_a_task_that_cannot_predict_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--train.steps", "30", "--train.warmup", "20", "--output.loggers", "[]"]
    assert main(["train", "--config", "spring.yaml", "--output.folder", "run", *quick]) == 0
    capsys.readouterr()
    assert main(["predict", "run", "spring.yaml"]) == 2
    assert "Spring cannot predict from files. Give it a method predict" in capsys.readouterr().err


def test_the_task_of_the_page_is_short_and_has_help(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert 20 < len(blocks("python")[0].splitlines()) <= 45
    assert main(["train", "--task.help", "my_task.Spring"]) == 0
    assert "--task.num_useless" in capsys.readouterr().out
    assert main(["train", "--config", "spring.yaml", "--task.noise", "much", "--dry_run"]) == 2
    assert "task.noise: got 'much', expected float" in capsys.readouterr().err


def test_the_set_on_disk_of_the_page(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec(compile(blocks("python")[1], "page", "exec"), names)
    array = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    np.save(tmp_path / "a.npy", array)
    examples = names["OnDisk"](str(tmp_path / "a.npy")).to(CPU)
    split = Split(examples, examples, examples)
    assert isinstance(examples.array, np.memmap)
    inputs, targets = split.train.take(torch.tensor([5, 5, 0]))
    np.testing.assert_array_equal(inputs, array[[5, 5, 0], :3])
    np.testing.assert_array_equal(targets, array[[5, 5, 0], 3])


def test_sets_that_are_joined_prepare_both() -> None:
    class Told(InMemory):
        rows: list[int]

        def prepare(self, rows: torch.Tensor) -> None:
            told.append((len(self), rows.tolist()))

    told: list[tuple[int, list[int]]] = []
    joined = Joined(Told(torch.arange(3), torch.arange(3)), Told(torch.arange(4), torch.arange(4)))
    joined.prepare(torch.tensor([6, 0, 3, 2]))
    assert told == [(3, [0, 2]), (4, [3, 0])]


# ---- what is wrong -----------------------------------------------------------------------------------------

LOAD = """        x = torch.linspace(-1, 1, 60)[:, None]
        self.input_shape, self.num_outputs = (1,), 1
        return Split(*(InMemory(part, 2 * part) for part in x.chunk(3)))
"""
LOSS = "        return (outputs - targets).square().flatten(1).mean(1)\n"


HEAD = """
import torch
from torch_hypergrad.experiment.tasks import Examples, InMemory, Metric, Split, Task
"""


def source(load: str = LOAD, loss: str = LOSS, more: str = "", base: str = "Task") -> str:
    methods = f"    def load(self, seed):\n{load}    def losses(self, outputs, targets):\n{loss}{more}"
    return f"{HEAD}\nclass Mine({base}):\n{methods}"


def loading(*changes: tuple[str, str]) -> str:
    """With another load."""
    load = LOAD
    for before, after in changes:
        assert before in load
        load = load.replace(before, after)
    return source(load)


SETS = "return Split(*(InMemory(part, 2 * part) for part in x.chunk(3)))"
SHAPES = "self.input_shape, self.num_outputs = (1,), 1"
MEAN = "        return (outputs - targets).square().mean()\n"
LISTS = """
class Lists(Examples):
    def __len__(self): return 9
    def take(self, rows): return [1, 2], [3, 4]
    def to(self, device): return self
"""
ELSEWHERE = """
class Elsewhere(InMemory):
    def take(self, rows):
        inputs, targets = super().take(rows)
        return inputs, targets.to("meta")
    def to(self, device): return self
"""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (source(base="object"), ["my_task.Mine is no subclass of", "Task"]),
        (source().replace("def losses", "def lossen"), ["task", "Mine", "losses"]),
        (source("        raise KeyError('price')\n"), ["Mine.load failed (KeyError: 'price')"]),
        (source("        open('nothing.npy')\n"), ["Mine.load failed (FileNotFoundError", "nothing.npy"]),
        (loading(("return", "x =")), ["Mine.load gave NoneType, expected a Split"]),
        (loading((SETS, "return x, x, x")), ["Mine.load gave tuple, expected a Split"]),
        (loading((SETS, "return Split(x, x, x)")), ["train set is Tensor, expected Examples"]),
        (loading(("(3))", "(3)[:2])")), ["Mine.load failed (TypeError", "'test'"]),
        (loading(("2 * part", "part[1:]")), ["Mine.load failed", "do not fit"]),
        (loading(("x.chunk(3)", "(x, x[:0], x)")), ["Mine's val set is empty"]),
        (loading(("chunk(3)))", "chunk(3)), wrong=x)")), ["Split.wrong has shape (60, 1)"]),
        (loading((SHAPES, "")), ["did not set self.input_shape"]),
        (loading((SHAPES, "self.input_shape = (1,)")), ["did not set self.num_outputs"]),
        (loading(("= (1,), 1", "= (2,), 1")), ["inputs of shape (1,)", "input_shape to (2,)"]),
        (loading(("[:, None]", "[:, None].double()")), ["model: the network, on inputs of Mine, failed"]),
        (loading(("InMemory(part, 2 * part)", "Lists()")) + LISTS, ["gave inputs of shape list"]),
        (loading(("InMemory(p", "Elsewhere(p")) + ELSEWHERE, ["targets on meta", "is on cpu"]),
        (source(loss=MEAN), ["Mine.losses gave ()", "expected (2,)", "without a mean"]),
        (source(loss=LOSS.replace(".flatten(1).mean(1)", "")), ["Mine.losses gave (2, 1)", "expected (2,)"]),
        (source(loss="        return 0.5\n"), ["Mine.losses gave float"]),
        (source(loss="        return (outputs > 0).flatten()\n"), ["Mine.losses gave (2,) of torch.bool"]),
        (source(loss="        return outputs.cheese()\n"), ["Mine.losses failed (AttributeError"]),
        (source(more="    def state(self): return {'x': torch.ones(1)}\n"), ["Mine.state", "JSON"]),
        (source(more="    def inputs(self, x): return x @ x\n"), ["taking examples [0, 1] of Mine's train"]),
        (source(more="    def to(self, device): self.nothing.to(1)\n"), ["moving Mine to cpu failed"]),
    ],
)  # fmt: skip
def test_a_wrong_task_is_told_what_is_wrong(
    content: str, words: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, code = train(content, here, capsys)
    assert code == 2
    assert told.startswith("torch-hypergrad: error: ")
    assert not [word for word in words if word not in told], told
    assert not (here / "run").exists()


def train(content: str, here: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, int]:
    """What it says in its one line, and the exit code."""
    (here / "my_task.py").write_text(content)
    _load.cache_clear()
    words = "--task my_task.Mine --model Linear --train.steps 20 --method null --output.loggers []"
    code = main(["train", *words.split(), "--output.folder", "run"])
    bars = re.compile(r"Training in|train:|\r|$")
    lines = [line for line in capsys.readouterr().err.splitlines() if not bars.match(line)]
    assert len(lines) == 1, lines
    return lines[0], code


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("Metric(lambda true, told: 1 / 0, lambda outputs, _: outputs)", ["ZeroDivisionError"]),
        ("Metric(lambda true, told: true, lambda outputs, _: outputs)", ["TypeError"]),
        ("Metric(lambda true, told: 1.0, lambda outputs: outputs)", ["TypeError", "argument"]),
        ("Metric(lambda true, told: 1.0, lambda outputs, _: 1.0)", ["TypeError"]),
    ],
)
def test_a_metric_that_fails_ends_the_run_with_its_name(
    metric: str, words: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, code = train(source(more=f"    def metrics(self): return {{'mine': {metric}}}\n"), here, capsys)
    assert code == 1
    assert told.startswith("torch-hypergrad: Training stopped: the metric mine of Mine failed (")
    assert not [word for word in words if word not in told], told


class Line(Task):
    """The least that a task is."""

    def load(self, seed: int) -> Split:
        self.input_shape, self.num_outputs = (1,), 1
        x = torch.linspace(-1, 1, 9)[:, None]
        return Split(*(InMemory(part, part) for part in x.chunk(3)))

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(outputs, targets, reduction="none")[:, 0]


def test_the_least_task_needs_no_more() -> None:
    task = Line()
    assert len(loaded(task, 0, CPU).val) == 3
    assert (task.metrics(), task.random, task.loss_tensor("x"), task.classes) == ({}, False, None, ())
    other = Line()
    other.restore(task.state())
    assert (other.input_shape, other.num_outputs) == ((1,), 1)


def test_running_out_of_memory_is_not_blamed_on_the_task() -> None:
    class Large(Line):
        def load(self, seed: int) -> Split:
            raise MemoryError

    with pytest.raises(MemoryError):
        loaded(Large(), 0, CPU)
