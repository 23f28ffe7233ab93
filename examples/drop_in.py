"""The same training loop twice: plain PyTorch, and with torch_hypergrad tuning its weight decay on the way.

    python examples/drop_in.py
    python examples/drop_in.py --dataset mnist --data-root data --download

The table shows where the plain loop ends with the decay that the tuned one starts with,
with none, and with what was learned.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from command_line import option_parser, parse, spread, table
from common import Data, accuracy_of, load_data, loss_of, make_mlp
from torch_hypergrad import HyperOptimizer, Hyperparameter, Implicit, Neumann

SIZES, NUM_HIDDEN, START = {"digits": (200, 500), "mnist": (5000, 5000)}, 256, 1e-2


def train_plainly(data: Data, num_steps: int, seed: int, weight_decay: float) -> nn.Module:
    model = make_mlp(data.train[0].shape[1], NUM_HIDDEN, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=weight_decay)
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = loss_of(model, data.train)
        loss.backward()
        optimizer.step()
    return model


def train_and_tune(data: Data, num_steps: int, seed: int) -> tuple[nn.Module, float]:
    model = make_mlp(data.train[0].shape[1], NUM_HIDDEN, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    hyper = HyperOptimizer(
        model,
        optimizer,
        loss_of,
        tune=[Hyperparameter("weight_decay", init=START, log=True)],
        method=Implicit(Neumann(num_terms=20, damping=0.1)),
        hyper_optimizer=partial(torch.optim.Adam, lr=0.1, betas=(0.5, 0.9)),
    )
    for step in range(1, num_steps + 1):
        hyper.step(data.train)  # zero_grad, backward and step in one
        if step >= 100 and step % 20 == 0:
            report = hyper.hyper_step(data.val)
            if step % 100 == 0:
                decay = hyper.values()["weight_decay/group0"]
                print(f"step {step}: validation loss {report.val_loss:.4f}, weight decay {decay:.5f}")
    return model, hyper.values()["weight_decay/group0"].item()


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(option_parser(__doc__, "drop_in", steps=1000, seeds=1), argv, SIZES, min_steps=100)
    rows: dict[str, list[tuple[float, ...]]] = {}
    for seed, data in enumerate(load_data(args)):
        model, learned = train_and_tune(data, args.steps, seed)
        models = {"tuned while training": (model, learned)}
        for name, decay in (
            ("fixed at the start", START),
            ("none", 0.0),
            ("fixed at what was learned", learned),
        ):
            models[name] = train_plainly(data, args.steps, seed, decay), decay
        for name, (model, decay) in models.items():
            rows.setdefault(name, []).append(
                (decay, accuracy_of(model, data.test), loss_of(model, data.test).item())
            )
    columns = [
        [name, *(spread(values, digits) for values, digits in zip(zip(*of), (5, 1, 4)))]
        for name, of in rows.items()
    ]
    print("\n" + table(["weight decay", "value", "test accuracy (%)", "test loss"], columns))


if __name__ == "__main__":
    main()
