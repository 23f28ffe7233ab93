"""Training and the sweep written out once more, for many runs at once and with a dtype
for each part. See precision.py.

A run is a row: parameters, state and settings have the shapes (rows, parameters) or (rows, 1). The update
rules are the library's own, which are elementwise; `check_against_library` holds the rest against it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from torch_hypergrad import HyperOptimizer, Hyperparameter, Unrolled, register_update
from torch_hypergrad.ground.autodiff import gradients, leaf, sqrt
from torch_hypergrad.updates import UpdateRule, rule_of
from torch_hypergrad.updates.adam import TUNABLE, decay, moments

TUNED = ("lr", "weight_decay")
F32, F64 = torch.float32, torch.float64


class AdamRoot(torch.optim.Adam):
    """Adam whose step is ``m / (sqrt(v + eps_root) + eps)``, as in optax."""

    def __init__(self, params: Any, eps_root: float = 0.0, **options: Any) -> None:
        super().__init__(params, **options)
        self.param_groups[0]["eps_root"] = eps_root


@register_update(AdamRoot, TUNABLE)
def adam_root(
    param: Tensor, grad: Tensor, state: dict[str, Any], settings: Mapping[str, Any]
) -> tuple[Tensor, dict]:
    param, grad = decay(param, grad, settings)
    step, exp_avg, exp_avg_sq = moments(grad, state, settings)
    beta1, beta2 = settings["betas"]
    denom = sqrt(exp_avg_sq / (1 - beta2**step) + settings["eps_root"]) + settings["eps"]
    param = param - settings["lr"] / (1 - beta1**step) * exp_avg / denom
    return param, {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


@dataclass(frozen=True)
class Problem:
    """One architecture, and for each row a start and batches. Everything is given in float32.

    Args:
        model: only its architecture counts.
        starts: shape (rows, parameters).
        x, y: training data; ``picks`` are the numbers of the examples in each batch,
            of shape (steps, rows, batch size).
        val: validation data.
    """

    model: nn.Module
    starts: Tensor
    x: Tensor
    y: Tensor
    picks: Tensor
    val: tuple[Tensor, Tensor]

    def losses(
        self, params: Tensor, x: Tensor, y: Tensor, dims: tuple[int | None, ...] = (0, 0, 0)
    ) -> Tensor:
        """The loss of each row, in the dtype of ``params``."""
        return vmap(self._loss, in_dims=dims)(params, x.to(params.dtype), y)

    def train_losses(self, params: Tensor, t: int) -> Tensor:
        return self.losses(params, self.x[self.picks[t]], self.y[self.picks[t]])

    def val_losses(self, params: Tensor) -> Tensor:
        return self.losses(params, *self.val, dims=(0, None, None))

    def _loss(self, params: Tensor, x: Tensor, y: Tensor) -> Tensor:
        named = dict(self.model.named_parameters())
        pieces = params.split([p.numel() for p in named.values()])
        weights = {name: piece.view(p.shape) for (name, p), piece in zip(named.items(), pieces)}
        return F.cross_entropy(functional_call(self.model, weights, (x,)), y)


@dataclass(frozen=True)
class Optimizer:
    """An update rule, with settings that may differ from row to row."""

    make: type[torch.optim.Optimizer]
    rows: Mapping[str, Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)

    def rule(self) -> UpdateRule:
        return rule_of(self.make([nn.Parameter(torch.zeros(1))], **self.options))

    def settings(self, dtype: torch.dtype) -> dict[str, Any]:
        """Numbers are rounded to float32 first, so that runs in both dtypes have the same."""
        group = self.make([nn.Parameter(torch.zeros(1))], **self.options).param_groups[0]
        return {**group, **{name: value.float().to(dtype)[:, None] for name, value in self.rows.items()}}


@dataclass(frozen=True)
class State:
    params: Tensor
    rule_state: dict[str, Any]

    def to(self, dtype: torch.dtype) -> State:
        return State(
            self.params.to(dtype),
            {k: v.to(dtype) if torch.is_tensor(v) else v for k, v in self.rule_state.items()},
        )


def train(
    problem: Problem, optimizer: Optimizer, dtype: torch.dtype, keep: Sequence[int] | None = None
) -> list[State]:
    """The states before each step and after the last, or only those after ``keep`` steps and the last."""
    update, settings = optimizer.rule().update, optimizer.settings(dtype)
    state, states = State(problem.starts.to(dtype), {}), []
    for t in range(len(problem.picks)):
        if keep is None or t in keep:
            states.append(state)
        params = leaf(state.params)
        (grad,) = gradients([problem.train_losses(params, t).sum()], [params])
        with torch.no_grad():
            state = State(*update(params.detach(), grad, state.rule_state, settings))
    return [*states, state]


@dataclass
class Sweep:
    """What one sweep found; every tensor has one entry for each row.

    Args:
        hypergradient: by name of the setting.
        terms: sum of the absolute values of the steps' contributions, by name.
        growth: largest size of the adjoint over that at the end, for each notion of size.
        truncated: hypergradient of the last so many steps alone, by number of steps and name.
    """

    hypergradient: dict[str, Tensor]
    terms: dict[str, Tensor]
    growth: dict[str, Tensor] = field(default_factory=dict)
    truncated: dict[int, dict[str, Tensor]] = field(default_factory=dict)


def sweep(
    problem: Problem, optimizer: Optimizer, states: list[State], network: torch.dtype, update: torch.dtype
) -> Sweep:
    """Back through ``states``, with losses and Hessian-vector products in the dtype ``network``, and update
    rule, adjoints and sums in the dtype ``update``. With float64 for both: the exact derivative along
    these states."""
    rule, settings = optimizer.rule(), optimizer.settings(update)
    params = leaf(states[-1].params.to(network))
    adj_param = gradients([problem.val_losses(params).sum()], [params])[0].to(update)
    adj_state: dict[str, Tensor] = {}
    zeros = torch.zeros(len(adj_param), dtype=F64)
    result = Sweep({name: zeros.clone() for name in TUNED}, {name: zeros.clone() for name in TUNED})
    first = sizes(adj_param, adj_state, states[-1])
    largest = dict(first)
    for t in reversed(range(len(states) - 1)):
        state, params = states[t].to(update), leaf(states[t].params.to(network))
        (grad,) = gradients([problem.train_losses(params, t).sum()], [params], create_graph=True)
        found, held = through_update(rule, settings, state, grad.detach().to(update), adj_param, adj_state)
        (product,) = gradients([grad], [params], [found[1].to(network)])
        adj_param = found[0] + product.to(update)
        adj_state = {k: adj for k, adj in zip(held, found[4:]) if adj is not None}
        for name, part in zip(TUNED, found[2:4]):
            result.hypergradient[name] += part[:, 0]
            result.terms[name] += part[:, 0].abs()
        largest = {k: torch.maximum(largest[k], v) for k, v in sizes(adj_param, adj_state, state).items()}
        if len(states) - 1 - t in (10, 20, 50, 100, 200, 500):
            result.truncated[len(states) - 1 - t] = {k: v.clone() for k, v in result.hypergradient.items()}
    result.growth = {k: largest[k] / first[k] for k in largest}
    return result


def through_update(
    rule: UpdateRule,
    settings: dict,
    state: State,
    grad: Tensor,
    adj_param: Tensor,
    adj_state: dict[str, Tensor],
) -> tuple[list[Any], list[str]]:
    """Adjoints of parameters, gradient, tuned settings and state; and the names of the state's."""
    param, grad = leaf(state.params), leaf(grad)
    held = {k: leaf(v) for k, v in state.rule_state.items() if torch.is_tensor(v)}
    tuned = {name: leaf(settings[name]) for name in TUNED}
    with torch.enable_grad():
        new_param, new_state = rule.update(param, grad, {**state.rule_state, **held}, {**settings, **tuned})
    outputs, inputs = (
        [new_param, *(new_state[k] for k in adj_state)],
        [param, grad, *tuned.values(), *held.values()],
    )
    return gradients(outputs, inputs, [adj_param, *adj_state.values()]), list(held)


def sizes(adj_param: Tensor, adj_state: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    """The adjoint's norm in four ways; "relative" is with respect to relative changes of each entry."""
    held = [(adj.double(), state.rule_state[k].double()) for k, adj in adj_state.items()]
    raw, relative = adj_param.double(), (adj_param * state.params).double()
    return {
        "params": raw.norm(dim=1),
        "params and state": torch.cat([raw, *(adj for adj, _ in held)], 1).norm(dim=1),
        "params, relative": relative.norm(dim=1),
        "params and state, relative": torch.cat([relative, *(adj * s for adj, s in held)], 1).norm(dim=1),
    }


def check_against_library(problem: Problem, optimizer: Optimizer, row: int = 0) -> None:
    """The sweep above is the library's, to nine digits in float64:
    else the study would be about something else."""
    model = copy.deepcopy(problem.model).double()
    nn.utils.vector_to_parameters(problem.starts[row].double(), model.parameters())
    options = {**optimizer.options, **{k: v[row].float().item() for k, v in optimizer.rows.items()}}
    wrapped = optimizer.make(model.parameters(), **options)
    tune, frozen = [Hyperparameter(name) for name in TUNED], partial(torch.optim.SGD, lr=0.0)
    hyper = HyperOptimizer(
        model,
        wrapped,
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        tune,
        Unrolled(),
        frozen,
    )
    for picks in problem.picks:
        hyper.step((problem.x[picks[row]].double(), problem.y[picks[row]]))
    library = hyper.hypergradient((problem.val[0].double(), problem.val[1]))
    own = sweep(problem, optimizer, train(problem, optimizer, F64), F64, F64)
    for name, values in own.hypergradient.items():
        expected = library[f"{name}/group0"].item()
        if not math.isclose(values[row].item(), expected, rel_tol=1e-9):
            raise SystemExit(f"{name}: the study's sweep gives {values[row].item()}, the library {expected}.")
