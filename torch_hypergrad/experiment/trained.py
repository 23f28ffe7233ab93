"""A network that a run has trained, ready to be used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .config import ConfigError, ModelConfig
from .datasets import read_pictures
from .models import make_model
from .options import one_line
from .run_folder import RunFolder


class TrainedModel(nn.Module):
    r"""A trained network with its preprocessing, from pixels to logits:

    .. math:: f\big((x - \mu) / \sigma\big),

    with mean and standard deviation of the training images, channel by channel. In evaluation mode.

    Args:
        network: maps standardized images to one logit for each class.
        classes: their names, in the order of the logits.
        image_shape: channels, height and width of the images that it was trained on.
        mean: (channels,), of pixels from 0 to 1.
        std: (channels,), likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        classes: Sequence[str],
        image_shape: Sequence[int],
        mean: Tensor,
        std: Tensor,
    ) -> None:
        super().__init__()
        self.network, self.classes, self.image_shape = network, tuple(classes), tuple(image_shape)
        self.register_buffer("mean", mean.view(-1, 1, 1))
        self.register_buffer("std", std.view(-1, 1, 1))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (n, classes).

        Args:
            images: (n, channels, height, width), with pixels from 0 to 1.
        """
        return self.network((images - self.mean) / self.std)

    @torch.no_grad()
    def predict(self, files: Sequence[Path | str]) -> list[tuple[str, float]]:
        """The class of each picture and its probability, as the network has it.

        Pictures are turned upright, made grey where the network takes one channel, and resized to the images
        that it was trained on.

        Raises:
            ConfigError: for a file that is no readable picture.
        """
        channels, height, width = self.image_shape
        images = read_pictures([str(file) for file in files], width, height)
        if channels == 1:  # as Pillow does: ITU-R 601
            images = (images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        best = self((images / 255).to(self.mean)).softmax(1).max(1)
        return [(self.classes[place], p) for place, p in zip(best.indices.tolist(), best.values.tolist())]


def load_run(folder: Path | str) -> TrainedModel:
    """The network of a finished run, on the CPU.

    Raises:
        ConfigError: if there is no finished run in ``folder``, or its files do not fit together.
    """
    run = RunFolder(Path(folder).expanduser())
    if not run.finished:
        raise ConfigError(f"{folder} holds no finished run. Go on with: torch-hypergrad resume {folder}")
    summary = json.loads(run.summary_file.read_text(encoding="utf-8"))
    inputs = summary.get("inputs")
    if inputs is None:
        raise ConfigError(f"{folder} is a run of an older version, without what is needed here. Train again.")
    shape, classes = tuple(inputs["shape"]), inputs["classes"]
    network = make_model(ModelConfig(**summary["config"]["model"]), shape, len(classes))
    try:
        network.load_state_dict(torch.load(run.model_file, map_location="cpu", weights_only=True))
    except Exception as error:  # damaged files fail in many ways
        raise ConfigError(
            f"{run.model_file} does not fit the network of the run: {one_line(error)}"
        ) from error
    return TrainedModel(network, classes, shape, *(torch.tensor(inputs[key]) for key in ("mean", "std")))
