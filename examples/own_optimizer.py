"""An optimizer of your own: AdaBelief, registered, checked against finite differences, and tuned.

AdaBelief (Zhuang et al. 2020) divides by how far gradients are from their average, not by their size. Its
update is one pure function, which the optimizer's ``step`` calls too, so that the formula is written once.

    python examples/own_optimizer.py
    python examples/own_optimizer.py --dataset mnist --data-root data --download

The first table compares hypergradients with finite differences of re-run training. Then lr and weight decay
are tuned through whole training runs of 100 steps, each with new initial weights and batches. The rivals are
the usual lr, and a grid over both that trains about as many networks, by the same validation images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from tqdm import tqdm

from command_line import option_parser, parse, scores, table
from common import Data, load_data, loss_of, loss_value, make_mlp, plain_step, random_batches, tuning_seeds
from torch_hypergrad import HyperOptimizer, Hyperparameter, Unrolled, register_update
from torch_hypergrad.testing import check_hypergradient

SIZES = {"digits": (500, 500), "mnist": (5000, 5000)}
NUM_HIDDEN, BATCH_SIZE, NUM_GRID_SEEDS = 64, 100, 3
START = {"lr": 1e-3, "weight_decay": 1e-3}
LRS, DECAYS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), (0.0, 1e-4, 1e-3, 1e-2)


class AdaBelief(torch.optim.Optimizer):
    """Steps scaled by how well the last gradients foretold this one; weight decay added to the gradient."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    new_param, self.state[param] = ada_belief(param, param.grad, self.state[param], group)
                    param.copy_(new_param)


RATE, BELOW_ONE = (0.0, math.inf), (0.0, 1 - 1e-6)
RANGES = {"lr": RATE, "betas.0": BELOW_ONE, "betas.1": BELOW_ONE, "eps": RATE, "weight_decay": RATE}


@register_update(AdaBelief, RANGES)
def ada_belief(param: Tensor, grad: Tensor, state: dict, settings: dict) -> tuple[Tensor, dict]:
    """One step as a pure function: tuned settings come as tensors, and everything can be differentiated."""
    beta1, beta2 = settings["betas"]
    grad = grad + settings["weight_decay"] * param
    step = state.get("step", 0) + 1
    zeros = torch.zeros_like(param)
    mean = beta1 * state.get("mean", zeros) + (1 - beta1) * grad
    surprise = beta2 * state.get("surprise", zeros) + (1 - beta2) * (grad - mean) ** 2 + settings["eps"]
    scale = (surprise / (1 - beta2**step)).sqrt() + settings["eps"]
    param = param - settings["lr"] * mean / (1 - beta1**step) / scale
    return param, {"step": step, "mean": mean, "surprise": surprise}


def check() -> list[list[str]]:
    """Every setting on a small problem in float64; raises if one is wrong."""

    def make() -> HyperOptimizer:
        model = make_mlp(5, 8, seed=0).double()
        tune = [Hyperparameter(name) for name in RANGES]
        optimizer = AdaBelief(model.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.01)
        return HyperOptimizer(model, optimizer, loss_of, tune, Unrolled(), partial(torch.optim.SGD, lr=0.1))

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(9, 20, 5, dtype=torch.float64, generator=generator)
    *train, val = [(batch, torch.randint(10, (20,), generator=generator)) for batch in images]
    entries = check_hypergradient(make, train, val, num_entries=1)
    return [[entry.name, f"{entry.computed:.9g}", f"{entry.reference:.9g}"] for entry in entries]


def train(data: Data, settings: dict[str, float], num_steps: int, seed: int) -> nn.Module:
    """Plain PyTorch, with the optimizer's own ``step``."""
    model = make_mlp(data.train[0].shape[1], NUM_HIDDEN, seed)
    optimizer = AdaBelief(model.parameters(), **settings)
    for batch in random_batches(data.train, num_steps, BATCH_SIZE, seed):
        plain_step(model, optimizer, batch)
    return model


def tune(data: Data, num_steps: int, num_episodes: int) -> dict[str, float]:
    """One training run for each hyper step."""
    make = partial(make_mlp, data.train[0].shape[1], NUM_HIDDEN)
    model = make(0)
    tuned = [Hyperparameter(name, init=start, log=True) for name, start in START.items()]
    adam = partial(torch.optim.Adam, lr=0.2)
    hyper = HyperOptimizer(model, AdaBelief(model.parameters()), loss_of, tuned, Unrolled(), adam)
    for seed in tqdm(tuning_seeds(num_episodes), unit="episode"):
        hyper.restart()
        model.load_state_dict(make(seed).state_dict())
        for batch in random_batches(data.train, num_steps, BATCH_SIZE, seed):
            hyper.step(batch)
        hyper.hyper_step(data.val)
    return {name.removesuffix("/group0"): value.item() for name, value in hyper.values().items()}


def best_of_grid(data: Data, num_steps: int) -> dict[str, float]:
    def val_loss(settings: dict[str, float]) -> float:
        models = [train(data, settings, num_steps, seed) for seed in tuning_seeds(NUM_GRID_SEEDS)]
        return sum(loss_value(model, data.val) for model in models)

    return min(({"lr": lr, "weight_decay": decay} for lr, decay in product(LRS, DECAYS)), key=val_loss)


def main(argv: Sequence[str] | None = None) -> None:
    parser = option_parser(__doc__, "own_optimizer", steps=100, seeds=10)
    parser.add_argument("--episodes", type=int, default=60, help="training runs to tune with (%(default)s)")
    args = parse(parser, argv, SIZES)
    data = load_data(args)[0]
    print(table(["setting", "hypergradient", "finite differences"], check()))
    chosen = {
        "usual lr": {"lr": 1e-3, "weight_decay": 0.0},
        "best of a grid": best_of_grid(data, args.steps),
        "tuned": tune(data, args.steps, args.episodes),
    }
    rows = []
    for name, settings in chosen.items():
        models = [train(data, settings, args.steps, seed) for seed in range(args.seeds)]
        values = [f"{value:.2g}" for value in settings.values()]
        rows.append([name, *values, *scores(models, [data.test] * args.seeds)])
    fresh = f"{args.seeds} runs with fresh initial weights and batches"
    print(f"\n{args.dataset}: {args.steps} training steps, {fresh}\n")
    print(table(["AdaBelief", "lr", "weight decay", "test accuracy (%)", "test loss"], rows))


if __name__ == "__main__":
    main()
