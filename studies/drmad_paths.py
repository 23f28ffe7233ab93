"""The sweep of DrMAD in plain PyTorch, along any path: what studies/drmad.py compares.

Training is SGD with momentum on a network 64-32-10 with tanh, as one vector, on 200 of scikit-learn's digits
in batches of 100, with a weight decay for each weight; float64. Here all states of training are kept, so that
paths through some of them can be compared with the path that training took.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

SIZES = (64 * 32, 32, 32 * 10, 10)
NUM_TRAIN, BATCH_SIZE, DECAY = 200, 100, 1e-3
Path = Callable[[int], Tensor]
"""From the number of a training step to the weights before it."""


def logits(weights: Tensor, images: Tensor) -> Tensor:
    """Of the network with these weights."""
    first, bias, second, last = weights.split(SIZES)
    return torch.tanh(images @ first.view(32, 64).T + bias) @ second.view(10, 32).T + last


@dataclass(frozen=True)
class Training:
    """One training run, all of it.

    Args:
        states: weights before each step, and the last ones: (T + 1, 2410).
        losses: the training loss at each step.
        batches: image numbers of each step.
    """

    images: Tensor
    labels: Tensor
    lr: float
    momentum: float
    states: Tensor
    losses: Tensor
    batches: list[Tensor]

    @property
    def num_steps(self) -> int:
        return len(self.batches)

    def loss(self, weights: Tensor, rows: Tensor) -> Tensor:
        return F.cross_entropy(logits(weights, self.images[rows]), self.labels[rows])


def data(seed: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """Images and labels in random order, and what went on drawing."""
    images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    return images[order].double() / 16, labels[order], generator


def trained(num_steps: int, lr: float, momentum: float, seed: int) -> Training:
    """Trains from random weights."""
    images, labels, generator = data(seed)
    bounds = [bound for bound, size in zip((64, 64, 32, 32), SIZES) for _ in range(size)]
    start = (torch.rand(sum(SIZES), generator=generator).double() * 2 - 1) / torch.tensor(bounds).sqrt()
    states, losses, batches = [start], [], []
    buffer = torch.zeros_like(start)
    for _ in range(num_steps):
        rows = torch.randint(NUM_TRAIN, (BATCH_SIZE,), generator=generator)
        weights = states[-1].clone().requires_grad_()
        loss = F.cross_entropy(logits(weights, images[rows]), labels[rows])
        (grad,) = torch.autograd.grad(loss, weights)
        buffer = momentum * buffer + grad + DECAY * states[-1]
        states.append(states[-1] - lr * buffer)
        losses.append(loss.detach())
        batches.append(rows)
    return Training(images, labels, lr, momentum, torch.stack(states), torch.stack(losses), batches)


def visited(num_steps: int, num_points: int) -> list[int]:
    """Evenly spaced steps, the last one among them, last one first."""
    return [num_steps - 1 - point * num_steps // num_points for point in range(num_points)]


@dataclass(frozen=True)
class Sweep:
    """How the visited steps are gone back over.

    Args:
        per_point: how often each is pulled through.
        lr_factor: what its learning rate is multiplied by.
        factor: what the sum is multiplied by.
        momentum: in the place of training's; None for that.
    """

    per_point: int = 1
    lr_factor: float = 1.0
    factor: float = 1.0
    momentum: float | None = None


def hypergradient(run: Training, path: Path, points: Sequence[int], how: Sweep) -> Tensor:
    """Of the loss on 500 other images in the decays, as the path has it."""
    momentum = run.momentum if how.momentum is None else how.momentum
    lr = run.lr * how.lr_factor
    val = torch.arange(NUM_TRAIN, NUM_TRAIN + 500)
    end = run.states[-1].clone().requires_grad_()
    (adjoint,) = torch.autograd.grad(run.loss(end, val), end)
    adj_buffer, total = torch.zeros_like(adjoint), torch.zeros_like(adjoint)
    for t in points:
        weights = path(t).clone().requires_grad_()
        (grad,) = torch.autograd.grad(run.loss(weights, run.batches[t]), weights, create_graph=True)
        for _ in range(how.per_point):
            adj_grad = adj_buffer - lr * adjoint
            (product,) = torch.autograd.grad(grad, weights, adj_grad, retain_graph=True)
            total += adj_grad * weights.detach()
            adjoint = adjoint + product + DECAY * adj_grad
            adj_buffer = momentum * adj_grad
    return total * how.factor


# ---- paths -------------------------------------------------------------------------------------------------


def along(run: Training, share: Callable[[int], float | Tensor]) -> Path:
    """Between the first weights and the last; ``share`` says how far step t is."""
    first, last = run.states[0], run.states[-1]
    return lambda t: first + (last - first) * share(t)


def through(run: Training, num_between: int) -> Path:
    """Straight from state to state, through so many of training besides the first and the last."""
    stride = run.num_steps / (num_between + 1)

    def path(t: int) -> Tensor:
        piece = min(int(t / stride), num_between)
        start, end = round(piece * stride), round((piece + 1) * stride)
        return torch.lerp(run.states[start], run.states[end], (t - start) / (end - start))

    return path


def paths(run: Training) -> dict[str, Path]:
    """By name. Distances from the start cost one number a step to note."""
    moved = run.states - run.states[0]
    distances = moved.norm(dim=1)
    by_tensor = [part.norm(dim=1, keepdim=True) for part in moved.split(SIZES, dim=1)]
    of_tensors = torch.cat([(d / d[-1]).expand(-1, n) for d, n in zip(by_tensor, SIZES)], dim=1)
    fallen = (run.losses[0] - run.losses.cummin(0).values) / (run.losses[0] - run.losses.min())
    length = run.num_steps
    return {
        "straight line": along(run, lambda t: t / length),
        "line, t/T squared": along(run, lambda t: (t / length) ** 2),
        "line, root of t/T": along(run, lambda t: (t / length) ** 0.5),
        "line, by the distance from the start": along(run, lambda t: distances[t] / distances[-1]),
        "the same for each tensor": along(run, lambda t: of_tensors[t]),
        "line, by how far the loss fell": along(run, lambda t: fallen[t]),
        "last state only": along(run, lambda t: 1.0),
        "first state only": along(run, lambda t: 0.0),
        "through one state between": through(run, 1),
        "through three states between": through(run, 3),
        "states of training": lambda t: run.states[t],
    }
