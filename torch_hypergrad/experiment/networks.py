"""Networks by name or import path, an augmentation network, and random changes to images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ConfigError, Named
from .messages import one_line
from .options import make

Shape = tuple[int, ...]


def make_network(
    model: Named, input_shape: Sequence[int], num_outputs: int, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The network of the configuration, with initial weights from torch's global random numbers.

    >>> model = make_network({"name": "MLP", "hidden": [64]}, (1, 8, 8), 10)
    >>> [(name, tuple(param.shape)) for name, param in model.named_parameters() if param.ndim > 1]
    [('hidden.0.weight', (64, 64)), ('out.weight', (10, 64))]

    Args:
        model: its name, or the import path of an ``nn.Module``, and its options.
        input_shape: of one input.
        num_outputs: numbers that it gives for one input.
        dtype: of inputs.
    Raises:
        ConfigError: options that the network does not have or refuses; a module that cannot be imported, is
            no ``nn.Module``, or does not map such inputs to ``num_outputs`` numbers. One line.
    """
    shape = tuple(input_shape)
    if model.get("name") in NETWORKS:
        skip = ("input_shape", "num_outputs")
        return make(model, NETWORKS, nn.Module, "model", shape, num_outputs, skip=skip)
    return _checked(make(model, NETWORKS, nn.Module, "model"), str(model["name"]), shape, num_outputs, dtype)


# ---- networks ----------------------------------------------------------------------------------------------


def linear(input_shape: Shape, num_outputs: int) -> nn.Module:
    """One linear layer on the numbers of an input."""
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), out=nn.Linear(prod(input_shape), num_outputs)))


class MLP(nn.Module):
    """Fully connected layers with ReLU.

    Args:
        input_shape: of one input, which is flattened
        num_outputs: number of outputs
        hidden: units of each hidden layer
        dropout: this share of the units of each hidden layer is dropped in training
    """

    def __init__(
        self, input_shape: Shape, num_outputs: int, hidden: Sequence[int] = (256,), dropout: float = 0.0
    ) -> None:
        super().__init__()
        if not all(units >= 1 for units in hidden):
            raise ValueError("hidden layers need at least 1 unit")
        sizes = [prod(input_shape), *hidden]
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(sizes[-1], num_outputs)

    def forward(self, images: Tensor) -> Tensor:
        units = images.flatten(1)
        for layer in self.hidden:
            units = self.dropout(F.relu(layer(units)))
        return self.out(units)


class CNN(nn.Module):
    """Three 3x3 convolutions with ReLU, each followed by a pooling that halves the image, and a linear layer.

    Args:
        input_shape: channels, height and width
        num_outputs: number of logits
        width: channels of the first convolution; the others have twice as many
        dropout: this share of the inputs of the linear layer is dropped in training
    """

    def __init__(self, input_shape: Shape, num_outputs: int, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        if width < 1:
            raise ValueError("width must be at least 1")
        channels, height, breadth = _image(input_shape)
        sizes = [channels, width, 2 * width, 2 * width]
        self.convs = nn.ModuleList(nn.Conv2d(*pair, 3, padding=1) for pair in pairwise(sizes))
        self.pool = nn.MaxPool2d(2, ceil_mode=True)  # rounding up, small images never vanish
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(sizes[-1] * -(-height // 8) * -(-breadth // 8), num_outputs)

    def forward(self, images: Tensor) -> Tensor:
        for conv in self.convs:
            images = self.pool(F.relu(conv(images)))
        return self.out(self.dropout(images.flatten(1)))


def resnet18(input_shape: Shape, num_outputs: int, norm: Literal["batch", "group"] = "batch") -> nn.Module:
    """torchvision's ResNet-18 (He et al. 2016) with the stem for small pictures: 3x3, stride 1, no pooling.

    Args:
        input_shape: channels, height and width
        num_outputs: number of logits
        norm: group is GroupNorm of 32 groups, the same in training and testing
    """
    from torchvision.models import resnet18 as made  # slow to import

    channels, _, _ = _image(input_shape)
    layer = nn.BatchNorm2d if norm == "batch" else partial(nn.GroupNorm, 32)
    model = made(num_classes=num_outputs, norm_layer=layer)
    model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


class ByteMLP(nn.Module):
    """A neural language model after Bengio et al. 2003: the last bytes as vectors, one hidden layer, and the
    next byte.

    Args:
        input_shape: how many bytes it looks back on
        num_outputs: 256
        embedding: numbers that stand for a byte
        hidden: units of the hidden layer
        dropout: this share of the hidden units is dropped in training
    """

    def __init__(
        self,
        input_shape: Shape,
        num_outputs: int,
        embedding: int = 24,
        hidden: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if len(input_shape) != 1:
            raise ValueError(f"it takes a row of bytes, got inputs of shape {tuple(input_shape)}")
        if min(embedding, hidden) < 1:
            raise ValueError("embedding and hidden must be at least 1")
        self.embedding = nn.Embedding(256, embedding)
        self.hidden = nn.Linear(input_shape[0] * embedding, hidden)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, num_outputs)

    def forward(self, context: Tensor) -> Tensor:
        units = torch.tanh(self.hidden(self.embedding(context).flatten(1)))
        return self.out(self.dropout(units))


def _image(input_shape: Shape) -> Shape:
    if len(input_shape) != 3:
        raise ValueError(
            f"it takes images (channels, height, width), got inputs of shape {tuple(input_shape)}"
        )
    return input_shape


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "Linear": linear,
    "MLP": MLP,
    "CNN": CNN,
    "ResNet18": resnet18,
    "ByteMLP": ByteMLP,
}


@torch.no_grad()
def _checked(
    model: nn.Module, path: str, input_shape: tuple[int, ...], num_outputs: int, dtype: torch.dtype
) -> nn.Module:
    """Tries the network on two inputs of zeros, which also gives lazy layers their shapes."""
    shape, training = (2, *input_shape), model.training
    try:
        out = model.eval()(torch.zeros(shape, dtype=dtype))
    except Exception as error:  # whatever the user's code raises
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(f"model: {path} fails on inputs of shape {shape} ({reason}).") from error
    found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
    if found != (2, num_outputs):
        raise ConfigError(
            f"model: {path} gives {found} for inputs of shape {shape}, expected {(2, num_outputs)}. See the "
            "arguments of model."
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
