"""Networks by name or import path, an augmentation network, and random changes to images."""

from __future__ import annotations

import importlib
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from itertools import pairwise
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from .config import ConfigError, ModelConfig
from .options import call_with_options, one_line

Shape = tuple[int, int, int]  # channels, height, width


def make_model(config: ModelConfig, image_shape: Shape, num_classes: int) -> nn.Module:
    """The network of the configuration, with initial weights from torch's global random numbers.

    >>> from torch_hypergrad.experiment.config import ModelConfig
    >>> model = make_model(ModelConfig(name="mlp", options={"hidden": [64]}), (1, 8, 8), 10)
    >>> [(name, tuple(param.shape)) for name, param in model.named_parameters() if param.ndim > 1]
    [('hidden.0.weight', (64, 64)), ('out.weight', (10, 64))]

    Raises:
        ConfigError: options that the network does not have or refuses; a module that cannot be imported, is
            no ``nn.Module``, or does not map such images to ``num_classes`` logits. One line.
    """
    if config.module is not None:
        model = call_with_options(_import_module(config.module), config.options, "model.options")
        return _checked(model, config.module, image_shape, num_classes)
    return call_with_options(
        NETWORKS[config.name],
        config.options,
        "model.options",
        image_shape,
        num_classes,
        skip=("image_shape", "num_classes"),
    )


# ---- networks ----------------------------------------------------------------------------------------------


def linear(image_shape: Shape, num_classes: int) -> nn.Module:
    """Softmax regression on the pixels."""
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), out=nn.Linear(prod(image_shape), num_classes)))


class MLP(nn.Module):
    """Fully connected layers with ReLU.

    Args:
        image_shape: channels, height and width
        num_classes: number of logits
        hidden: units of each hidden layer
        dropout: this share of the units of each hidden layer is dropped in training
    """

    def __init__(
        self, image_shape: Shape, num_classes: int, hidden: Sequence[int] = (256,), dropout: float = 0.0
    ) -> None:
        super().__init__()
        if not all(units >= 1 for units in hidden):
            raise ValueError("hidden layers need at least 1 unit")
        sizes = [prod(image_shape), *hidden]
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(sizes[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        units = images.flatten(1)
        for layer in self.hidden:
            units = self.dropout(F.relu(layer(units)))
        return self.out(units)


class CNN(nn.Module):
    """Three 3x3 convolutions with ReLU, each followed by a pooling that halves the image, and a linear layer.

    Args:
        image_shape: channels, height and width
        num_classes: number of logits
        width: channels of the first convolution; the others have twice as many
        dropout: this share of the inputs of the linear layer is dropped in training
    """

    def __init__(self, image_shape: Shape, num_classes: int, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        if width < 1:
            raise ValueError("width must be at least 1")
        channels, height, breadth = image_shape
        sizes = [channels, width, 2 * width, 2 * width]
        self.convs = nn.ModuleList(nn.Conv2d(*pair, 3, padding=1) for pair in pairwise(sizes))
        self.pool = nn.MaxPool2d(2, ceil_mode=True)  # rounding up, small images never vanish
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(sizes[-1] * -(-height // 8) * -(-breadth // 8), num_classes)

    def forward(self, images: Tensor) -> Tensor:
        for conv in self.convs:
            images = self.pool(F.relu(conv(images)))
        return self.out(self.dropout(images.flatten(1)))


def resnet18(image_shape: Shape, num_classes: int, norm: Literal["batch", "group"] = "batch") -> nn.Module:
    """torchvision's ResNet-18 (He et al. 2016) with the stem for small pictures: 3x3, stride 1, no pooling.

    Args:
        image_shape: channels, height and width
        num_classes: number of logits
        norm: group is GroupNorm of 32 groups, the same in training and testing
    """
    layer = nn.BatchNorm2d if norm == "batch" else partial(nn.GroupNorm, 32)
    model = torchvision.models.resnet18(num_classes=num_classes, norm_layer=layer)
    model.conv1 = nn.Conv2d(image_shape[0], 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "linear": linear,
    "mlp": MLP,
    "cnn": CNN,
    "resnet18": resnet18,
}


# ---- networks of one's own ---------------------------------------------------------------------------------


def _import_module(path: str) -> type[nn.Module]:
    """The class at ``package.Class``, where the package may lie in the current folder."""
    package, _, name = path.rpartition(".")
    if not package or not name:
        raise ConfigError(
            f"model.module: got {path!r}, expected package.Class, such as my_net.MyNet for my_net.py."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as of a script that is run there
    try:
        imported = importlib.import_module(package)
    except Exception as error:  # whatever the user's code raises
        remedy = (
            f" Run where {package} can be imported, or install it."
            if isinstance(error, ModuleNotFoundError)
            else ""
        )
        message = f"importing {package} failed ({type(error).__name__}: {one_line(error)})."
        raise ConfigError(f"model.module: {message}{remedy}") from error
    if not hasattr(imported, name):
        near = get_close_matches(name, dir(imported), n=1)
        raise ConfigError(
            f"model.module: {package} has no {name}.{f' Did you mean {near[0]}?' if near else ''}"
        )
    found = getattr(imported, name)
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        raise ConfigError(
            f"model.module: {path} is no class of networks. Make it a subclass of torch.nn.Module."
        )
    return found


@torch.no_grad()
def _checked(model: nn.Module, path: str, image_shape: Shape, num_classes: int) -> nn.Module:
    """Tries the network on two black images, which also gives lazy layers their shapes."""
    shape, training = (2, *image_shape), model.training
    try:
        out = model.eval()(torch.zeros(shape))
    except Exception as error:  # whatever the user's code raises
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(f"model.module: {path} fails on images of shape {shape} ({reason}).") from error
    found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
    if found != (2, num_classes):
        raise ConfigError(
            f"model.module: {path} gives {found} for images of shape {shape}, expected {(2, num_classes)}, "
            "one logit for each class. See model.options."
        )
    return model.train(training)


# ---- changes to images -------------------------------------------------------------------------------------


class Augmenter(nn.Module):
    """A network that changes images at random, to be tuned (after Lorraine, Vicol and Duvenaud 2020, section
    5.3).

    It sees the image, a channel of noise in each pixel and one of noise in each image, both drawn anew in
    every call, and adds its output to the image. It starts as the identity, with a last layer of zeros. Its
    activation is smooth, since hypergradients through it are second derivatives.

    Args:
        channels: of the images
        width: channels inside
    """

    def __init__(self, channels: int, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels + 2, width, 3, padding=1)
        self.hidden = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, height, width) to the same."""
        of_pixels = torch.randn_like(images[:, :1])
        of_images = torch.randn_like(images[:, :1, :1, :1]).expand_as(of_pixels)
        units = F.silu(self.first(torch.cat([images, of_pixels, of_images], dim=1)))
        return images + self.last(F.silu(self.hidden(units)))


def random_flip(images: Tensor) -> Tensor:
    """Each image of (n, channels, height, width) as it is or mirrored left to right, with equal chance."""
    flipped = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(flipped, images.flip(-1), images)


def random_crop_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Each image shifted at random by up to ``padding`` pixels either way, zeros moving in, and perhaps
    flipped."""
    n, channels, height, width = images.shape
    shifts = torch.randint(2 * padding + 1, (2, n, 1), device=images.device)
    rows = (shifts[0] + torch.arange(height, device=images.device)).view(n, 1, height, 1)
    columns = (shifts[1] + torch.arange(width, device=images.device)).view(n, 1, 1, width)
    padded = F.pad(images, [padding] * 4)
    of_rows = padded.gather(2, rows.expand(n, channels, height, padded.shape[3]))
    return random_flip(of_rows.gather(3, columns.expand(n, channels, height, width)))
