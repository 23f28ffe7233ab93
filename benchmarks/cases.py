"""What is measured: a case names it, a problem holds it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .models import Batch, make_batch, make_model

DECAY = 1e-3
NEUMANN_DAMPING = 5.0  # enough that the series converges at the start of training
NUM_DISTINCT_BATCHES = 50  # taken in turn, so that a long window needs no more data than a short one

# Small steps, and an epsilon well above rounding, so that training is the same in whatever order numbers
# are added up, and hypergradients can be compared.
OPTIMIZERS: dict[str, partial[Any]] = {
    "sgd": partial(torch.optim.SGD, lr=0.003, momentum=0.9, foreach=True),
    "adam": partial(torch.optim.Adam, lr=3e-4, eps=1e-2, foreach=True),
}


@dataclass(frozen=True)
class Case:
    """One table.

    Args:
        task: ``unrolled``, a window of training steps and the hypergradient of the weight decay;
            ``implicit``, the same hypergradient at the current weights with a Neumann series;
            ``steps``, training steps alone.
        model: a key of ``MODELS``.
        size: T, the number of training steps, or K, the number of terms.
        optimizer: a key of ``OPTIMIZERS``.
        per: one weight decay for all weights, or one for each.
        only: the contestants that take part. None stands for all.
    """

    task: Literal["unrolled", "implicit", "steps"]
    model: str
    size: int
    optimizer: str = "sgd"
    per: Literal["group", "element"] = "group"
    only: tuple[str, ...] | None = None

    @property
    def num_steps(self) -> int:
        return 1 if self.task == "implicit" else self.size

    @property
    def title(self) -> str:
        letter = "K" if self.task == "implicit" else "T"
        decay = "" if self.task == "steps" else f", weight decay per {self.per}"
        return f"{self.task}, {self.model}, {self.optimizer}, {letter} = {self.size:,}{decay}"


@dataclass
class Problem:
    """A case made ready: a fresh model and its data."""

    case: Case
    model: nn.Module
    batches: list[Batch]
    val: Batch

    @property
    def device(self) -> torch.device:
        return self.val[1].device

    def optimizer(self, params: Iterable[Any], weight_decay: float = DECAY) -> Optimizer:
        return OPTIMIZERS[self.case.optimizer](params, weight_decay=weight_decay)

    def decays(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Leaves to differentiate by: one for each parameter, or a single one."""
        if self.case.per == "group":
            return [torch.tensor(DECAY, dtype=dtype, device=self.device, requires_grad=True)]
        return [torch.full_like(p, DECAY, requires_grad=True) for p in self.model.parameters()]


def make_problem(
    case: Case,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
) -> Problem:
    """The same model and data whenever it is called."""

    def batch(seed: int) -> Batch:
        inputs, labels = make_batch(case.model, seed, dtype, batch_size)
        return inputs.to(device), labels.to(device)

    distinct = [batch(seed) for seed in range(1, 1 + min(case.num_steps, NUM_DISTINCT_BATCHES))]
    batches = [distinct[t % len(distinct)] for t in range(case.num_steps)]
    return Problem(case, make_model(case.model, dtype).to(device), batches, batch(1000))


def penalty(params: Iterable[Tensor], decays: list[Tensor]) -> Tensor:
    """What weight decay is the gradient of, for optimizers that add it to the gradient."""
    params = list(params)
    each = decays * len(params) if len(decays) == 1 else decays
    return 0.5 * torch.stack([(decay * p * p).sum() for p, decay in zip(params, each)]).sum()


def neumann_scale(case: Case) -> float:
    """As large as the curvature at the start of training allows."""
    return {"resnet18": 2e-3, "transformer": 0.02}.get(case.model, 0.05)


def joined(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def direction(size: int, device: torch.device | str = "cpu") -> Tensor:
    """A fixed direction of signs, along which references give the derivative; a single number's own."""
    if size == 1:
        return torch.ones(1, dtype=torch.float64, device=device)
    signs = torch.randint(2, (size,), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    return signs.to(device)
