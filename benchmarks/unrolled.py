"""Unrolled hypergradients beside the plain loop, the floor, and higher: time and growth of peak memory.

    python benchmarks/unrolled.py [--steps 100] [--repeats 3] [--models mlp cnn]

Every measurement is a process of its own; contestants take turns. The hypergradient is that of one weight decay for each
group after T steps of SGD with momentum, batch 128. The floor is what the cost model allows: T gradients, and T
gradients with graph with one double backward each. A hypergradient that differs from the others' fails the run.
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from torch_hypergrad import HyperOptimizer, Hyperparameter, Unrolled

CONTESTANTS = ["plain", "floor", "all_snapshots", "few_snapshots", "higher"]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 10),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "cnn": cnn}
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=1e-3)  # small: the same trajectory whatever the rounding


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batch_number(t: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t)
    return torch.randn(128, 1, 28, 28, generator=generator), torch.randint(10, (128,), generator=generator)


def run_plain(model: nn.Module, batches: list, val: tuple) -> float:
    optimizer = SGD(model.parameters())
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return math.nan


def run_floor(model: nn.Module, batches: list, val: tuple) -> float:
    params = list(model.parameters())
    for batch in batches:
        torch.autograd.grad(loss_of(model, batch), params)
    for batch in batches:
        grads = torch.autograd.grad(loss_of(model, batch), params, create_graph=True)
        torch.autograd.grad(grads, params, [torch.ones_like(g) for g in grads])
    return math.nan


def run_ours(model: nn.Module, batches: list, val: tuple, method: Unrolled) -> float:
    sgd = partial(torch.optim.SGD, lr=0.0)
    hyper = HyperOptimizer(model, SGD(model.parameters()), loss_of, [Hyperparameter("weight_decay")], method, sgd)
    for batch in batches:
        hyper.step(batch)
    return hyper.hypergradient(val)["weight_decay/group0"].item()


def run_higher(model: nn.Module, batches: list, val: tuple) -> float:
    warnings.simplefilter("ignore")
    import higher

    decay = torch.tensor(1e-3, requires_grad=True)
    with higher.innerloop_ctx(model, SGD(model.parameters()), override={"weight_decay": [decay]}) as (fast, optimizer):
        for batch in batches:
            optimizer.step(loss_of(fast, batch))
        return torch.autograd.grad(loss_of(fast, val), decay)[0].item()


def measure(contestant: str, kind: str, num_steps: int) -> None:
    """One measurement, printed as seconds, bytes and the hypergradient."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    batches, val = [batch_number(t) for t in range(num_steps)], batch_number(-1)
    few = Unrolled(max_snapshots=2 * math.isqrt(num_steps))
    run = {
        "plain": run_plain,
        "floor": run_floor,
        "all_snapshots": partial(run_ours, method=Unrolled()),
        "few_snapshots": partial(run_ours, method=few),
        "higher": run_higher,
    }[contestant]
    run(MODELS[kind](), batches[:2], val)  # warm up: imports, thread pools, kernels
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    answer = run(model, batches, val)
    seconds = time.perf_counter() - start
    print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, answer)


def compare(kind: str, num_steps: int, repeats: int) -> None:
    """The table of one model."""
    found: dict[str, list[list[float]]] = {contestant: [] for contestant in CONTESTANTS}
    for _ in range(repeats):
        for contestant in CONTESTANTS:
            command = [sys.executable, __file__, "--measure", contestant, "--models", kind, "--steps", str(num_steps)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[contestant].append([float(word) for word in output.split()])
    answers = {c: rows[0][2] for c, rows in found.items() if not math.isnan(rows[0][2])}
    reference = answers["higher"]
    for contestant, answer in answers.items():
        if not math.isclose(answer, reference, rel_tol=2e-2):
            raise SystemExit(f"{contestant} gives the hypergradient {answer}, higher gives {reference}.")
    higher_seconds, higher_bytes = (statistics.median(row[i] for row in found["higher"]) for i in (0, 1))
    table = []
    for contestant, rows in found.items():
        seconds, size = (statistics.median(row[i] for row in rows) for i in (0, 1))
        spread = max(row[0] for row in rows) - min(row[0] for row in rows)
        table.append([contestant, seconds, spread, seconds / higher_seconds, size / 1e6, size / higher_bytes])
    print(f"\n{kind}, T = {num_steps}, median of {repeats}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(tabulate(table, ["", "s", "spread", "/ higher", "MB", "/ higher"], floatfmt=".2f"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="T, the length of the window")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--measure", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for kind in options.models:
        if options.measure:
            measure(options.measure, kind, options.steps)
        else:
            compare(kind, options.steps, options.repeats)


if __name__ == "__main__":
    main()
