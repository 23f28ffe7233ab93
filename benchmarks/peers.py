"""The peers, each in the way its documentation shows.

The common task is the hypergradient of weight decay. Where a peer cannot take a weight decay
as a tensor in its optimizer, the same decay stands in the loss as a penalty, ``0.5 * decay * p ** 2``,
whose gradient is the decay's: same training, same hypergradient. Both ways are tried, and what a way cannot
do is reported with the peer's own error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import sdpa_kernel

from .cases import NEUMANN_DAMPING, OPTIMIZERS, Problem, joined, neumann_scale, penalty
from .models import loss_of
from .yardsticks import TWICE_DIFFERENTIABLE


def higher_overrides(problem: Problem) -> Iterator[dict[str, list[float]] | None]:
    """What makes higher's Adam that of torch:
    it adds epsilon before the bias correction, as torch once did."""
    settings = OPTIMIZERS[problem.case.optimizer].keywords
    for number in range(1, problem.case.num_steps + 1):
        yield {"eps": [settings["eps"] * math.sqrt(1 - 0.999**number)]} if "eps" in settings else None


def higher_setting(problem: Problem, meter: AbstractContextManager) -> Tensor:
    """higher, weight decay in the optimizer."""
    import higher

    decays, params = problem.decays(), list(problem.model.parameters())
    groups = [{"params": params}] if len(decays) == 1 else [{"params": [p]} for p in params]
    optimizer = problem.optimizer(groups)
    context = higher.innerloop_ctx(problem.model, optimizer, override={"weight_decay": decays})
    with meter, sdpa_kernel(TWICE_DIFFERENTIABLE), context as (fast, differentiable):
        for override, batch in zip(higher_overrides(problem), problem.batches):
            differentiable.step(loss_of(fast, batch), override=override)
        return joined(torch.autograd.grad(loss_of(fast, problem.val), decays))


def higher_penalty(problem: Problem, meter: AbstractContextManager) -> Tensor:
    """higher, weight decay as a penalty in the loss."""
    import higher

    decays = problem.decays()
    optimizer = problem.optimizer(problem.model.parameters(), weight_decay=0.0)
    context = higher.innerloop_ctx(problem.model, optimizer)
    with meter, sdpa_kernel(TWICE_DIFFERENTIABLE), context as (fast, differentiable):
        for override, batch in zip(higher_overrides(problem), problem.batches):
            differentiable.step(loss_of(fast, batch) + penalty(fast.parameters(), decays), override=override)
        return joined(torch.autograd.grad(loss_of(fast, problem.val), decays))


def torchopt_optimizer(problem: Problem, **settings: Any) -> Any:
    """The differentiable optimizer with the settings of the case."""
    import torchopt

    kind = {"sgd": torchopt.MetaSGD, "adam": torchopt.MetaAdam}[problem.case.optimizer]
    own = {k: v for k, v in OPTIMIZERS[problem.case.optimizer].keywords.items() if k != "foreach"}
    if kind is torchopt.MetaAdam:
        own["eps_root"] = 1e-20  # else its derivative is NaN wherever a gradient is 0
    return kind(problem.model, **own, **settings)


def torchopt_setting(problem: Problem, meter: AbstractContextManager) -> Tensor:
    """TorchOpt, weight decay in the optimizer."""
    decays = problem.decays()
    optimizer = torchopt_optimizer(problem, weight_decay=decays[0])
    with meter, sdpa_kernel(TWICE_DIFFERENTIABLE):
        for batch in problem.batches:
            optimizer.step(loss_of(problem.model, batch))
        return joined(torch.autograd.grad(loss_of(problem.model, problem.val), decays))


def torchopt_penalty(problem: Problem, meter: AbstractContextManager) -> Tensor:
    """TorchOpt, weight decay as a penalty in the loss."""
    decays = problem.decays()
    optimizer = torchopt_optimizer(problem)
    with meter, sdpa_kernel(TWICE_DIFFERENTIABLE):
        for batch in problem.batches:
            optimizer.step(loss_of(problem.model, batch) + penalty(problem.model.parameters(), decays))
        return joined(torch.autograd.grad(loss_of(problem.model, problem.val), decays))


def torchopt_implicit(problem: Problem, meter: AbstractContextManager) -> Tensor:
    """TorchOpt, ``custom_root`` with a Neumann series; damping stands in the stationarity."""
    from torchopt.diff.implicit import custom_root
    from torchopt.linear_solve import solve_inv

    names = [name for name, _ in problem.model.named_parameters()]
    begin, decays = tuple(p.detach() for p in problem.model.parameters()), problem.decays()

    def objective(params: tuple[Tensor, ...], decays: list[Tensor]) -> Tensor:
        inputs, labels = problem.batches[0]
        output = functional_call(problem.model, dict(zip(names, params)), inputs)
        return torch.nn.functional.cross_entropy(output, labels) + penalty(params, decays)

    def stationarity(params: tuple[Tensor, ...], *decays: Tensor) -> tuple[Tensor, ...]:
        grads = torch.func.grad(objective)(params, list(decays))
        return tuple(g + NEUMANN_DAMPING * (p - p0) for g, p, p0 in zip(grads, params, begin))

    num_products = problem.case.size - 1  # TorchOpt does not count the first term
    solve = solve_inv(ns=True, maxiter=num_products, alpha=neumann_scale(problem.case))

    @custom_root(stationarity, argnums=tuple(range(1, 1 + len(decays))), solve=solve)
    def solution(params: tuple[Tensor, ...], *decays: Tensor) -> tuple[Tensor, ...]:
        return params

    with meter, sdpa_kernel(TWICE_DIFFERENTIABLE):
        params = solution(begin, *decays)
        output = functional_call(problem.model, dict(zip(names, params)), problem.val[0])
        loss = torch.nn.functional.cross_entropy(output, problem.val[1])
        return joined(torch.autograd.grad(loss, decays))
