"""An augmentation network, tuned so that training on its images does well on those of another camera.

As in Lorraine, Vicol and Duvenaud 2020: a small convolutional network takes an image and a channel of noise
and gives another image; it begins as the identity. Training images are clean. Validation and test images
come from another camera, of half the contrast, with grey for black and with noise. Every 20 training steps
the implicit hypergradient of the validation loss moves the augmentation network's weights. The rivals train
without augmentation, with Gaussian noise (the best strength of a grid, by validation loss), and on training
and validation images together, without and with that noise.

    python examples/augmentation.py
    python examples/augmentation.py --dataset mnist --data-root data --download

It prints a table and draws what has been learned; a minute on scikit-learn's digits. Expect more than from
no augmentation or noise, less than from both sets with noise. Much longer tuning makes images worse again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from command_line import option_parser, parse, saved, scores, table
from common import Batch, Data, joined, load_data, loss_of, loss_value, make_mlp, plain_step
from torch_hypergrad import HyperOptimizer, Implicit, Neumann

SIZES = {"digits": (500, 200), "mnist": (1000, 500)}
NUM_HIDDEN, DECAY = 128, 1e-3
STRENGTHS = (0.1, 0.2, 0.4, 0.6)  # standard deviations of the rival's noise
WARMUP, HYPER_EVERY = 100, 20
NUM_SHOWN = 8


class Augmentation(nn.Module):
    """The image plus what a network of the image and noise makes of it, within 0 and 1."""

    def __init__(self, num_channels: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, num_channels, 3, padding=1)
        self.last = nn.Conv2d(num_channels, 1, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, images: Tensor) -> Tensor:
        side = int(images.shape[1] ** 0.5)
        squares = images.view(-1, 1, side, side)
        change = self.last(torch.tanh(self.first(torch.cat([squares, torch.randn_like(squares)], dim=1))))
        return (squares + change).clamp(0, 1).flatten(1)


def with_other_camera(data: Data, seed: int) -> Data:
    """The same training images, validation and test images of the other camera."""
    generator = torch.Generator().manual_seed(seed)

    def taken(images: Tensor) -> Tensor:
        return (0.25 + 0.5 * images + 0.15 * torch.randn(images.shape, generator=generator)).clamp(0, 1)

    return Data(data.train, *((taken(images), labels) for images, labels in (data.val, data.test)))


def make(batch: Batch, seed: int) -> tuple[nn.Module, torch.optim.SGD]:
    model = make_mlp(batch[0].shape[1], NUM_HIDDEN, seed)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=DECAY)


def learn_augmentation(data: Data, num_steps: int, seed: int) -> tuple[nn.Module, nn.Module]:
    """All of the tuning: the trained and the augmentation network, whose noise the engine replays."""
    model, optimizer = make(data.train, seed)
    augmentation = Augmentation()

    def train_loss(model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        return loss_of(model, (augmentation(images), labels))

    hyper = HyperOptimizer(
        model,
        optimizer,
        train_loss,
        tune=[("augmentation", augmentation)],
        method=Implicit(Neumann(num_terms=10, damping=0.1), num_batches=5),
        hyper_optimizer=partial(torch.optim.Adam, lr=3e-3, betas=(0.5, 0.9)),
        val_loss=loss_of,
    )
    for step in range(1, num_steps + 1):
        hyper.step(data.train)
        if step >= WARMUP and step % HYPER_EVERY == 0:
            hyper.hyper_step(data.val)
    return model, augmentation


def train(batch: Batch, num_steps: int, seed: int, noise: float = 0.0) -> nn.Module:
    """Plain training, with Gaussian noise on the images."""
    model, optimizer = make(batch, seed)
    images, labels = batch
    for _ in range(num_steps):
        plain_step(model, optimizer, (images + noise * torch.randn_like(images), labels))
    return model


def compare(data: Data, num_steps: int, seed: int) -> tuple[dict[str, nn.Module], nn.Module]:
    noisy = {strength: train(data.train, num_steps, seed, strength) for strength in STRENGTHS}
    best = min(noisy, key=lambda strength: loss_value(noisy[strength], data.val))
    both = joined(data.train, data.val)
    learned, augmentation = learn_augmentation(data, num_steps, seed)
    models = {
        "none": train(data.train, num_steps, seed),
        "Gaussian noise, best of a grid": noisy[best],
        "none, training on both sets": train(both, num_steps, seed),
        "same noise, training on both sets": train(both, num_steps, seed, best),
        "learned": learned,
    }
    return models, augmentation


@torch.no_grad()
def draw(data: Data, augmentation: nn.Module) -> Figure:
    images = data.train[0][:NUM_SHOWN]
    names = ("training", "augmented", "again", "validation")
    rows = (images, augmentation(images), augmentation(images), data.val[0])
    figure = Figure(figsize=(10, 5), layout="constrained")
    for name, row, panels in zip(names, rows, figure.subplots(len(rows), NUM_SHOWN)):
        for image, panel in zip(row, panels):
            panel.imshow(image.view(int(len(image) ** 0.5), -1).numpy(), cmap="gray", vmin=0, vmax=1)
            panel.set(xticks=[], yticks=[])
        panels[0].set_ylabel(name)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(option_parser(__doc__, "augmentation", steps=400, seeds=3), argv, SIZES, min_steps=WARMUP)
    of_seeds = [with_other_camera(data, seed) for seed, data in enumerate(load_data(args))]
    runs = [compare(data, args.steps, seed) for seed, data in enumerate(tqdm(of_seeds, unit="seed"))]
    clean, other = f"{args.train_size} clean training images", f"{args.val_size} validation images"
    print(f"\n{args.dataset}: {clean}, {other} of another camera\n")
    tests = [data.test for data in of_seeds]
    rows = [[name, *scores([models[name] for models, _ in runs], tests)] for name in runs[0][0]]
    print(table(["augmentation", "test accuracy (%)", "test loss"], rows))
    picture = draw(of_seeds[0], runs[0][1])
    print(f"\nPicture of the first seed: {saved(picture, args.out / 'augmented.png')}")


if __name__ == "__main__":
    main()
