"""T1-T2: weight decay and the noise on the inputs are tuned while the network trains, one step at a time.

As in Luketina et al. 2016. Every tenth training step is differentiated, and it alone: how does the validation
loss after it change with the decay, and with the standard deviation of the noise, that it was taken with?
One run from a bad start (decay 0.01, noise 1) is compared with the best of a grid of twelve runs, and with a
run that starts at that best: the step is greedy, and may leave a good place again.

    python examples/t1t2.py
    python examples/t1t2.py --train-size 200                                       # where it does so
    python examples/t1t2.py --dataset mnist --data-root data --download

It draws how decay and noise move. A minute or two on scikit-learn's digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from command_line import option_parser, parse, saved, table
from common import Batch, Data, load_data, loss_of, loss_value, make_mlp, random_batches
from torch_hypergrad import HyperOptimizer, Hyperparameter, t1t2

SIZES, NUM_HIDDEN, LR, BATCH_SIZE, HYPER_EVERY = (
    {"digits": (500, 500), "mnist": (5000, 5000)},
    256,
    0.1,
    100,
    10,
)
GRID = [(decay, noise) for decay in (1e-4, 1e-3, 1e-2) for noise in (0.0, 0.1, 0.3, 1.0)]
BAD = (1e-2, 1.0)

Pair = tuple[float, float]


def noisy_loss(model: nn.Module, batch: Batch, noise: Tensor | float) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images + noise * torch.randn_like(images)), labels)


def train(data: Data, seed: int, num_steps: int, decay: float, noise: float) -> nn.Module:
    """With fixed values: plain PyTorch."""
    model = make_mlp(data.train[0].shape[1], NUM_HIDDEN, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=decay)
    for batch in random_batches(data.train, num_steps, BATCH_SIZE, seed):
        optimizer.zero_grad()
        noisy_loss(model, batch, noise).backward()
        optimizer.step()
    return model


def tune(data: Data, seed: int, num_steps: int, decay: float, noise: float) -> tuple[nn.Module, list[Pair]]:
    """The trained network, and the values after each hyper step."""
    model = make_mlp(data.train[0].shape[1], NUM_HIDDEN, seed)
    std = torch.tensor(max(noise, 0.01), requires_grad=True)
    hyper = HyperOptimizer(
        model,
        torch.optim.SGD(model.parameters(), lr=LR),
        lambda model, batch: noisy_loss(model, batch, std),
        tune=[
            Hyperparameter("weight_decay", init=decay, log=True),
            Hyperparameter.of(std, "noise", low=1e-3, log=True),
        ],
        method=t1t2(),
        hyper_optimizer=partial(torch.optim.Adam, lr=0.2, betas=(0.5, 0.9)),
        val_loss=loss_of,
    )
    path = [(decay, std.item())]
    val_batches = random_batches(data.val, num_steps, BATCH_SIZE, seed + 1)
    for step, batch in enumerate(random_batches(data.train, num_steps, BATCH_SIZE, seed), start=1):
        hyper.step(batch)
        if step % HYPER_EVERY == 0:
            hyper.hyper_step(next(val_batches))
            path.append(tuple(value.item() for value in hyper.values().values()))
    return model, path


def row(name: str, model: nn.Module, values: Pair, best: nn.Module, data: Data) -> list[object]:
    val, least, test = (loss_value(*of) for of in ((model, data.val), (best, data.val), (model, data.test)))
    return [name, f"{values[0]:.1e}", f"{values[1]:.3f}", f"{val:.3f}", f"{val / least:.3f}", f"{test:.3f}"]


def draw(paths: dict[str, list[Pair]]) -> Figure:
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    for panel, place, title in zip(figure.subplots(1, 2), (0, 1), ("weight decay", "noise on the inputs")):
        for (name, path), color in zip(paths.items(), ("#D55E00", "#0072B2")):
            steps = [HYPER_EVERY * number for number in range(len(path))]
            panel.plot(steps, [values[place] for values in path], color=color, label=name)
        panel.set(title=title, xlabel="training step", yscale="log")
        panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(option_parser(__doc__, "t1t2", steps=1000, seeds=3), argv, SIZES, min_steps=HYPER_EVERY)
    rows = []
    for seed, data in enumerate(tqdm(load_data(args), unit="split")):
        grid = {pair: train(data, seed, args.steps, *pair) for pair in GRID}
        good = min(GRID, key=lambda pair: loss_value(grid[pair], data.val))
        rows.append(row(f"split {seed}: best of the grid", grid[good], good, grid[good], data))
        paths = {}
        for name, start in (("bad start", BAD), ("start at the best", good)):
            model, paths[name] = tune(data, seed, args.steps, *start)
            rows.append(row(f"split {seed}: T1-T2, {name}", model, paths[name][-1], grid[good], data))
    print(f"\n{args.dataset}: {args.train_size} training images, {args.steps} training steps\n")
    print(table(["", "decay", "noise", "validation loss", "to the grid's", "test loss"], rows))
    print(f"\nPicture of the last split: {saved(draw(paths), args.out / 'values.png')}")


if __name__ == "__main__":
    main()
