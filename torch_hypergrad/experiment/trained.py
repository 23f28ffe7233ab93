"""A network that a run has trained, ready to be used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .build import make_task
from .config import ConfigError
from .messages import one_line
from .networks import make_network
from .old import is_old
from .run_folder import RunFolder
from .tasks import Task


class TrainedModel(nn.Module):
    r"""A trained network with its preprocessing, from the task's stored inputs to the network's outputs,

    .. math:: f(\mathrm{prepared}(x)),

    in evaluation mode. Inputs of images are bytes, or numbers from 0 to 1. It computes in float32, also where
    training ran in bf16; so do the results at the end of a run, and in its report.

    Args:
        network: maps prepared inputs to outputs.
        task: prepares inputs, and reads files.
    """

    def __init__(self, network: nn.Module, task: Task) -> None:
        super().__init__()
        self.network, self.task = network, task
        self.eval()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the outputs, where they are classes."""
        return self.task.classes

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, outputs).

        Args:
            inputs: (n, ...), as the task stores them.
        """
        return self.network(self.task.inputs(inputs))

    def example(self, num: int) -> Tensor:
        """Inputs of zeros, such as it takes: (num, ...)."""
        return torch.zeros(num, *self.task.input_shape, dtype=self.task.input_dtype)

    def predict(self, files: Sequence[Path | str]) -> list[Sequence[str]]:
        """What the network says of files, a row of words for each thing in them; see the task's ``predict``.

        Raises:
            ConfigError: for a file that cannot be read.
        """
        return self.task.predict(self.network, [Path(file) for file in files])


def load_run(folder: Path | str) -> TrainedModel:
    """The network of a finished run, on the CPU.

    Raises:
        ConfigError: if there is no finished run in ``folder``, or its files do not fit together.
    """
    run = RunFolder(Path(folder).expanduser())
    if not run.finished and not run.config_file.is_file():
        found = "no such folder" if not run.path.exists() else f"no {run.config_file.name} in it"
        raise ConfigError(f"{folder}: expected the folder of a finished run, got {found}.")
    if not run.finished:
        raise ConfigError(f"The run in {folder} is not finished. Go on with: torch-hypergrad resume {folder}")
    summary = json.loads(run.summary_file.read_text(encoding="utf-8"))
    config, state = summary.get("config", {}), summary.get("inputs", {})
    if is_old(config) or "input_shape" not in state:
        raise ConfigError(f"{folder} is a run of an older version, without what is needed here. Train again.")
    task = make_task(config["task"])
    task.restore(state)
    network = make_network(config["model"], task.input_shape, task.num_outputs, task.input_dtype)
    try:
        network.load_state_dict(torch.load(run.model_file, map_location="cpu", weights_only=True))
    except Exception as error:  # damaged files fail in many ways
        raise ConfigError(
            f"{run.model_file} does not fit the network of the run: {one_line(error)}"
        ) from error
    return TrainedModel(network, task)
