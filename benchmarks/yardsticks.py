"""What contestants are held against: the plain loop, the floor, and references in float64 by other means."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import vector_to_parameters

from .cases import NEUMANN_DAMPING, OPTIMIZERS, Problem, direction, joined, neumann_scale, penalty
from .models import Batch, loss_of

TWICE_DIFFERENTIABLE = SDPBackend.MATH  # the fused kernels of attention have no second derivative


def plain_step(problem: Problem) -> Callable[[Batch], None]:
    """A step of the plain torch loop."""
    optimizer = problem.optimizer(problem.model.parameters())

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        loss_of(problem.model, batch).backward()
        optimizer.step()

    return step


def train_plainly(problem: Problem) -> None:
    step = plain_step(problem)
    for batch in problem.batches:
        step(batch)


def plain(problem: Problem, meter: AbstractContextManager) -> None:
    """The plain torch loop, without a hypergradient."""
    with meter:
        train_plainly(problem)


def plain_steps(problem: Problem, meter: AbstractContextManager) -> Tensor:
    """The plain torch loop (foreach)."""
    before = joined(problem.model.parameters())
    with meter:
        train_plainly(problem)
    return joined(problem.model.parameters()) - before


def floor(problem: Problem, meter: AbstractContextManager) -> None:
    """T gradients, then T gradients with graph and one double backward each: what the cost model allows."""
    params = list(problem.model.parameters())
    with meter, sdpa_kernel(TWICE_DIFFERENTIABLE):
        for batch in problem.batches:
            torch.autograd.grad(loss_of(problem.model, batch), params)
        for batch in problem.batches:
            grads = torch.autograd.grad(loss_of(problem.model, batch), params, create_graph=True)
            torch.autograd.grad(grads, params, [torch.ones_like(g) for g in grads], materialize_grads=True)


def double_backwards(problem: Problem, meter: AbstractContextManager) -> None:
    """K + 3 double backward passes on one graph: what the cost model allows."""
    params = list(problem.model.parameters())
    with sdpa_kernel(TWICE_DIFFERENTIABLE):
        grads = torch.autograd.grad(loss_of(problem.model, problem.batches[0]), params, create_graph=True)
    v = [torch.ones_like(g) for g in grads]
    with meter:
        for _ in range(problem.case.size + 3):
            torch.autograd.grad(grads, params, v, retain_graph=True, materialize_grads=True)


# ---- references --------------------------------------------------------------------------------------------


class SGD:
    """The textbook's, with its tangent. Settings are those of ``OPTIMIZERS``."""

    def __init__(self, like: Tensor) -> None:
        self._buffer = self._tan_buffer = torch.zeros_like(like)

    def step(self, g: Tensor, tan_g: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to the parameters, and its tangent."""
        self._buffer, self._tan_buffer = 0.9 * self._buffer + g, 0.9 * self._tan_buffer + tan_g
        lr = OPTIMIZERS["sgd"].keywords["lr"]
        return -lr * self._buffer, -lr * self._tan_buffer


class Adam:
    """The same for Adam."""

    def __init__(self, like: Tensor) -> None:
        self._mean = self._tan_mean = self._square = self._tan_square = torch.zeros_like(like)
        self._number = 0

    def step(self, g: Tensor, tan_g: Tensor) -> tuple[Tensor, Tensor]:
        self._number += 1
        bias1, bias2 = 1 - 0.9**self._number, 1 - 0.999**self._number
        self._mean, self._tan_mean = 0.9 * self._mean + 0.1 * g, 0.9 * self._tan_mean + 0.1 * tan_g
        self._square = 0.999 * self._square + 0.001 * g * g
        self._tan_square = 0.999 * self._tan_square + 0.002 * g * tan_g
        root = (self._square / bias2).sqrt()
        tan_root = torch.where(root > 0, self._tan_square / bias2 / (2 * root), 0.0)
        lr, eps = (OPTIMIZERS["adam"].keywords[name] for name in ("lr", "eps"))
        direction, below = self._mean / bias1, root + eps
        return -lr * direction / below, -lr * (self._tan_mean / bias1 - direction * tan_root / below) / below


RULES: dict[str, type[SGD] | type[Adam]] = {"sgd": SGD, "adam": Adam}


def unrolled_reference(problem: Problem) -> float:
    """Tangents carried along training: forward mode, where all others go backwards.

    Finite differences would not do: wherever an input of a ReLU changes its sign
    between two runs, the gradient jumps.
    """
    params, decay = list(problem.model.parameters()), joined(problem.decays(torch.float64))
    tan_decay, p = direction(decay.numel(), problem.device), joined(params)
    tan_p, rule = torch.zeros_like(p), RULES[problem.case.optimizer](p)
    for batch in problem.batches:
        vector_to_parameters(p, params)
        with sdpa_kernel(TWICE_DIFFERENTIABLE):
            grads = torch.autograd.grad(loss_of(problem.model, batch), params, create_graph=True)
        parts = [part.view_as(p) for part, p in zip(tan_p.split([p.numel() for p in params]), params)]
        tan_grads = torch.autograd.grad(grads, params, parts, materialize_grads=True)
        g, tan_g = joined(grads) + decay * p, joined(tan_grads) + decay * tan_p + tan_decay * p
        change, tan_change = rule.step(g, tan_g)
        p, tan_p = p + change, tan_p + tan_change
    vector_to_parameters(p, params)
    return (joined(torch.autograd.grad(loss_of(problem.model, problem.val), params)) @ tan_p).item()


def steps_reference(problem: Problem) -> float:
    """How far the plain loop moves the weights."""
    before = joined(problem.model.parameters())
    train_plainly(problem)
    moved = joined(problem.model.parameters()) - before
    return (moved @ direction(moved.numel(), problem.device)).item()


def implicit_reference(problem: Problem) -> float:
    """Truncated Neumann series, written out."""
    params, decays = list(problem.model.parameters()), problem.decays(torch.float64)
    with sdpa_kernel(TWICE_DIFFERENTIABLE):
        rhs = joined(torch.autograd.grad(loss_of(problem.model, problem.val), params, materialize_grads=True))
        loss = loss_of(problem.model, problem.batches[0]) + penalty(params, decays)
        grads = torch.autograd.grad(loss, params, create_graph=True)
    stationarity = torch.cat([g.reshape(-1) for g in grads])
    term, total, scale = rhs, torch.zeros_like(rhs), neumann_scale(problem.case)
    for _ in range(problem.case.size):
        total = total + scale * term
        product = joined(
            torch.autograd.grad(stationarity, params, term, retain_graph=True, materialize_grads=True)
        )
        term = term - scale * (product + NEUMANN_DAMPING * term)
    mixed = -joined(torch.autograd.grad(stationarity, decays, total))
    return (mixed @ direction(mixed.numel(), problem.device)).item()
