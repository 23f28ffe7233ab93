"""The models, and data made from seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
NUM_CLASSES = 10
VOCABULARY = 64
WIDTHS = (16, 64, 256, 1024)


def mlp(hidden: int = 256) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, NUM_CLASSES))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, NUM_CLASSES),
    )  # fmt: skip


def cnn_strided() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 49, NUM_CLASSES),
    )  # fmt: skip


def resnet18() -> nn.Module:
    """With the stem for small pictures: a 3 x 3 convolution, and no pooling."""
    model = torchvision.models.resnet18(num_classes=NUM_CLASSES)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


class Transformer(nn.Module):
    """Two layers over tokens; the class is read off the mean."""

    def __init__(self, width: int, num_tokens: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(0.02 * torch.randn(num_tokens, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


@dataclass(frozen=True)
class Model:
    """How to make a model, and what a batch for it looks like: pictures of a shape, or tokens."""

    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    batch_size: int
    tokens: bool = False


MODELS = {
    "mlp": Model(mlp, (1, 28, 28), 128),
    "cnn": Model(cnn, (1, 28, 28), 128),
    "cnn_strided": Model(cnn_strided, (1, 28, 28), 128),
    "resnet18": Model(resnet18, (3, 32, 32), 8),
    "transformer": Model(partial(Transformer, 64, 32), (32,), 32, tokens=True),
    "transformer256": Model(partial(Transformer, 256, 256), (256,), 32, tokens=True),
    **{f"mlp{hidden}": Model(partial(mlp, hidden), (1, 28, 28), 128) for hidden in (*WIDTHS, 4096)},
}


def make_model(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name].make().to(dtype)


def make_batch(name: str, seed: int, dtype: torch.dtype, batch_size: int | None = None) -> Batch:
    """Inputs at random, with the classes that a fixed linear function of them gives;
    as many as the model is measured with, if no other number is asked for."""
    model, generator = MODELS[name], torch.Generator().manual_seed(seed)
    shape = (batch_size or model.batch_size, *model.input_shape)
    if model.tokens:
        inputs = torch.randint(VOCABULARY, shape, generator=generator)
        features = F.one_hot(inputs, VOCABULARY).sum(1).float()
    else:
        inputs = torch.randn(shape, generator=generator)
        features = inputs.flatten(1)
        inputs = inputs.to(dtype)
    teacher = torch.randn(features.shape[1], NUM_CLASSES, generator=torch.Generator().manual_seed(0))
    return inputs, (features @ teacher).argmax(1)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])
