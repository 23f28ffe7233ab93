"""Who else is told what a run tells: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .config import ConfigError


class Logger(ABC):
    """Gets the numbers of a run; a run that goes on tells it steps again, which it may see twice."""

    @abstractmethod
    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of one row of the metrics, by path: ``"eval/val/loss"``."""

    def flush(self) -> None:  # noqa: B027 - most have nothing to hand on
        """Hands everything to the operating system."""

    @abstractmethod
    def close(self) -> None:
        """The run has ended, or was stopped."""


class TensorBoard(Logger):
    """Event files in the folder of the run."""

    def __init__(self, folder: Path, step: int, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        purge = step + 1 if step else None  # what it has of later steps
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases(Logger):
    """A run of wandb, whose name and id are those of the folder, so that a resumed run goes on there.
    Project, mode and key are wandb's own environment variables."""

    def __init__(self, folder: Path, step: int, config: Mapping[str, Any]) -> None:
        import wandb

        name = folder.resolve().name
        self._run = wandb.init(name=name, id=name, resume="allow", dir=str(folder), config=dict(config))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow(Logger):
    """A run of mlflow with the name of the folder. Where it is kept, and the experiment, are mlflow's own
    environment variables."""

    def __init__(self, folder: Path, step: int, config: Mapping[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.start_run(run_name=folder.resolve().name)
        mlflow.log_dict(dict(config), "config.yaml")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(numbers), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


LOGGERS: dict[str, tuple[Callable[[Path, int, Mapping[str, Any]], Logger], str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "wandb": (WeightsAndBiases, "wandb"),
    "mlflow": (MLflow, "mlflow"),
}
"""By name, and the package that each needs."""


def check_loggers(names: Sequence[str]) -> None:
    """Refuses loggers that are none, or whose package is not installed.

    Raises:
        ConfigError: one line.
    """
    for name in names:
        if name not in LOGGERS:
            raise ConfigError(f"output.loggers: got {name}, expected some of {', '.join(LOGGERS)}.")
        package = LOGGERS[name][1]
        if find_spec(package) is None:
            raise ConfigError(
                f"output.loggers: {name} needs {package}, which is not installed: pip install {package}."
            )
