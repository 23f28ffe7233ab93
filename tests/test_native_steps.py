"""Training steps that the wrapped optimizer takes itself, with Implicit and settings per group:
torch's, bit for bit."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from problems import mse, random_batch
from torch_hypergrad import CG, HyperOptimizer, Hyperparameter, Implicit

BATCHES = [random_batch(8, 4, seed) for seed in range(5)]
VAL = random_batch(8, 4, seed=100)
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=0.02),
    "adamw": partial(torch.optim.AdamW, lr=0.02, foreach=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).double()


def wrapped(optimizer: Any, per: str = "group", tune: Any = None) -> HyperOptimizer:
    model = network()
    tune = [Hyperparameter("weight_decay", per=per)] if tune is None else tune  # type: ignore[arg-type]
    made = optimizer(model.parameters(), weight_decay=0.01)
    return HyperOptimizer(model, made, mse, tune, Implicit(CG(damping=5.0)), partial(torch.optim.SGD, lr=0.1))


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    optimizer.zero_grad()
    mse(model, batch).backward()
    optimizer.step()


def same_state(hyper: HyperOptimizer, model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    ours, theirs = hyper.optimizer.state_dict()["state"], optimizer.state_dict()["state"]
    states = all(
        torch.equal(ours[i][key], value) for i, entry in theirs.items() for key, value in entry.items()
    )
    return states and all(
        torch.equal(a, b) for a, b in zip(hyper.model.state_dict().values(), model.state_dict().values())
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_torchs_before_and_after_a_hyper_step(name: str) -> None:
    hyper, model = wrapped(OPTIMIZERS[name]), network()
    optimizer = OPTIMIZERS[name](model.parameters(), weight_decay=0.01)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (hyper.optimizer, optimizer)]
    for t, batch in enumerate(BATCHES * 2):
        hyper.step(batch)
        plain_step(model, optimizer, batch)
        for scheduler in schedulers:
            scheduler.step()
        if t == 4:
            hyper.hyper_step(VAL)
            decay = hyper.values()["weight_decay/group0"].item()
            assert decay != 0.01
            optimizer.param_groups[0]["weight_decay"] = decay
        assert same_state(hyper, model, optimizer), t


def test_settings_and_gradients_of_the_user_stay() -> None:
    hyper = wrapped(OPTIMIZERS["sgd"])
    first = next(hyper.model.parameters())
    first.grad = torch.full_like(first, 7.0)
    hyper.step(BATCHES[0])
    hyper.hyper_step(VAL)
    hyper.step(BATCHES[1])
    assert hyper.optimizer.param_groups[0]["weight_decay"] == 0.01
    assert torch.equal(first.grad, torch.full_like(first, 7.0))
    assert all(p.grad is None for p in list(hyper.model.parameters())[1:])


def test_a_failing_optimizer_leaves_settings_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    hyper = wrapped(OPTIMIZERS["sgd"])
    hyper.set_values({"weight_decay/group0": torch.tensor(0.5, dtype=torch.float64)})
    with monkeypatch.context() as patch:
        patch.setattr(hyper.optimizer, "step", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            hyper.step(BATCHES[0])
    assert hyper.optimizer.param_groups[0]["weight_decay"] == 0.01
    assert all(p.grad is None for p in hyper.model.parameters())
    assert hyper.model[1].num_batches_tracked == 0


@pytest.mark.parametrize(("per", "native"), [("group", True), ("tensor", False), ("element", False)])
def test_only_numbers_can_be_given_to_torch(per: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hyper, calls = wrapped(OPTIMIZERS["sgd"], per), []
    step = hyper.optimizer.step
    monkeypatch.setattr(hyper.optimizer, "step", lambda: calls.append(step()))
    hyper.step(BATCHES[0])
    assert len(calls) == native


def test_frozen_parameters_are_skipped() -> None:
    hyper = wrapped(OPTIMIZERS["adam"])
    frozen = next(hyper.model.parameters()).requires_grad_(False)
    before = frozen.clone()
    hyper.step(BATCHES[0])
    assert torch.equal(frozen, before)
    assert frozen not in hyper.optimizer.state
