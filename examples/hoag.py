"""HOAG (Pedregosa 2016): the decay of logistic regression by rough hypergradients, from 1 to its optimum.

    python examples/hoag.py

Tolerances tighten from hyper step to hyper step; every search trains on from its last weights. A minute.
"""

from collections.abc import Iterable, Sequence
from itertools import repeat
from pathlib import Path

import jsonargparse
import numpy as np
import scipy.optimize
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn

from command_line import saved, table
from torch_hypergrad import CG, AdaptiveStep, HyperOptimizer, Hyperparameter, Implicit
from torch_hypergrad.bilevel import cubic, exponential, fit, quadratic

DECAY, ACCURATE, BUDGETS = "weight_decay/group0", 1e-8, {"breast_cancer": 200, "digits": 500}


def load(name: str) -> list[tuple[Tensor, Tensor]]:
    """Thirds for training and validation: breast cancer standardized by the first, digits odd or even."""
    rows, labels = (load_digits if name == "digits" else load_breast_cancer)(return_X_y=True)
    parts = np.random.RandomState(0).permutation(len(rows))[: len(rows) // 3 * 2].reshape(2, -1)
    train = rows[parts[0]]
    rows = rows / 16 if name == "digits" else (rows - train.mean(0)) / train.std(0)
    return [(torch.tensor(rows[part]), torch.tensor(labels[part] % 2).double()) for part in parts]


class Search:
    """Of the decay; ``path`` holds the gradients and products so far, and the decay that they led to."""

    def __init__(self, name: str) -> None:
        (self.train, self.val), self.path, self.cost, self.best = load(name), [], 0, (np.inf, 1.0)
        model = nn.Linear(self.train[0].shape[1], 1, dtype=torch.float64)
        nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
        sgd, implicit = torch.optim.SGD(model.parameters()), Implicit(CG(200, warm_start=True))
        tune = Hyperparameter("weight_decay", init=1.0, log=True)
        self.hyper = HyperOptimizer(model, sgd, self.loss, [tune], implicit, AdaptiveStep)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1])

    def hoag(self, tolerances: Iterable[float], budget: int) -> None:
        products = 0
        for tolerance in tolerances:
            self.cost += fit(self.hyper, self.train, tol=tolerance).num_gradients
            if self.cost > budget:
                return
            self.path.append((self.cost, products, self.hyper.values()[DECAY].item()))
            products += self.hyper.hyper_step(self.val, rtol=tolerance).num_matvecs

    def loss_at(self, log_decay: float) -> float:
        """After accurate training. The path is that of the best."""
        self.hyper.set_values({DECAY: torch.tensor(np.exp(log_decay)).double()})
        self.cost += fit(self.hyper, self.train, tol=ACCURATE).num_gradients
        loss = self.hyper.validation_loss(self.val).item()
        self.best = min(self.best, (loss, np.exp(log_decay)))
        self.path.append((self.cost, 0, self.best[1]))
        return loss


def main(argv: Sequence[str] | None = None) -> None:
    parser = jsonargparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datasets", nargs="+", choices=BUDGETS, default=[*BUDGETS])
    parser.add_argument("--out", type=Path, default=Path("runs/hoag"), help="folder for the picture")
    args, lines, figure = parser.parse_args(argv), [], Figure(figsize=(9, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(args.datasets), squeeze=False)[0], args.datasets):
        ways = {"exact": repeat(ACCURATE), "exponential": exponential(0.01, 0.8, ACCURATE)}
        ways |= {"quadratic": quadratic(0.01, ACCURATE), "cubic": cubic(0.01, ACCURATE)}
        searches = {way: Search(name) for way in ("Brent", "grid of 20", *ways)}
        scipy.optimize.minimize_scalar(searches["Brent"].loss_at)
        for log_decay in np.linspace(0, np.log(1e-5), 20):
            searches["grid of 20"].loss_at(log_decay)
        for way, tolerances in ways.items():
            searches[way].hoag(tolerances, BUDGETS[name])
        least, best = searches["Brent"].best
        for way, search in searches.items():
            costs, products, decays = np.array(search.path).T
            above = np.array([*map(Search(name).loss_at, np.log(decays))]) - least
            axes.semilogy(costs, above.clip(1e-8), ".-", label=way)
            near = np.flatnonzero(abs(decays / best - 1) > 0.01)[-1] + 1
            to = f"{costs[near]:.0f} + {products[near]:.0f}" if near < len(costs) else "never"
            lines.append([f"{name}: {way}", to, f"{costs[-1]:.0f}", f"{decays[-1]:.5g}", f"{above[-1]:.0e}"])
        axes.set(title=name, xlabel="training gradients", ylabel="validation loss above the least")
        axes.legend()
    print(table(["", "to 1 % (+ products)", "gradients", "decay", "above the least"], lines))
    print(saved(figure, args.out / "hoag.png"))


if __name__ == "__main__":
    main()
