"""Those who are told the numbers of a run: each with a stand-in for its package, which keeps what it is
told."""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from test_configurations import refused
from test_resume import NO_STOP
from test_training_loop import SMALL, configured, rows_of
from torch_hypergrad.experiment.run_folder import RunFolder
from torch_hypergrad.experiment.start import run_in


class Told:
    """What was called, in order."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[int, str], float] = {}
        self.config: dict[str, Any] = {}
        self.name = ""
        self.ended = False

    def log(self, numbers: dict[str, float], step: int) -> None:
        assert not self.ended
        assert all(isinstance(number, float) for number in numbers.values())
        self.numbers |= {(step, name): number for name, number in numbers.items()}

    def finish(self) -> None:
        self.ended = True


def stand_in(name: str, told: Told) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def init(name: str, id: str, resume: str, dir: str, config: dict[str, Any]) -> Told:
        assert (name, resume, Path(dir).name) == (id, "allow", name)
        told.name, told.config = name, config
        return told

    def start_run(run_name: str) -> None:
        told.name = run_name

    def log_dict(config: dict[str, Any], file: str) -> None:
        told.config = config

    vars(module).update(init=init, start_run=start_run, log_dict=log_dict)
    vars(module).update(log_metrics=told.log, end_run=told.finish)
    return module


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_is_told_every_number(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    monkeypatch.setitem(sys.modules, name, stand_in(name, told))
    config = configured(SMALL, tmp_path, output={"loggers": [name]})
    assert run_in(config, RunFolder(tmp_path / "run"), NO_STOP, quiet=True)
    assert told.ended
    assert told.name == "run"
    assert told.config["optimizer"] == {"name": "SGD", "lr": 0.1, "momentum": 0.9}
    expected = {(row["step"], "train/loss"): row["loss"] for row in rows_of(tmp_path / "run", "train")}
    expected |= {
        (row["step"], "eval/val/accuracy"): row["val"]["accuracy"]
        for row in rows_of(tmp_path / "run", "eval")
    }
    expected |= {
        (row["step"], "hyper/values/weight_decay/group0"): row["values"]["weight_decay/group0"]
        for row in rows_of(tmp_path / "run", "hyper")
    }
    assert len(expected) > 20
    assert expected.items() <= told.numbers.items()


def test_a_logger_that_is_none_or_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured(SMALL, tmp_path)
    arguments = ["train", "--config", tmp_path / "given.yaml", "--output.folder", tmp_path / "run"]
    assert "expected some of tensorboard, wandb, mlflow" in refused(
        *arguments, "--output.loggers=[tensorbord]"
    )
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in refused(*arguments, "--output.loggers=[wandb]")
    assert not (tmp_path / "run").exists()
