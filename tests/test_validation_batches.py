"""A validation set in several batches: one hypergradient of the weighted mean of their losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from problems import FROZEN, mse, random_batch
from torch_hypergrad import Cholesky, ForwardMode, HyperOptimizer, Hyperparameter, Implicit, Unrolled
from torch_hypergrad.methods import Method
from torch_hypergrad.testing import derivative

BATCHES = [random_batch(8, 4, seed) for seed in range(6)]
PARTS = [random_batch(num, 4, seed=100 + num) for num in (9, 5, 2)]
SIZES = [9, 5, 2]
WHOLE = tuple(torch.cat(tensors) for tensors in zip(*PARTS))
METHODS: list[Method] = [
    Unrolled(),
    Unrolled(max_snapshots=2),
    Unrolled(max_graphs=3),
    Unrolled(second_order="forward"),
    Unrolled(truncation=6),
    ForwardMode(),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=str)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)).double()


def in_eval_mode(model: nn.Module, batch: Any) -> Tensor:
    model.eval()
    loss = mse(model, batch)
    model.train()
    return loss


def sgd(model: nn.Module, weight_decay: float = 0.02) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=weight_decay)


def trained(method: Method, number: int = len(BATCHES)) -> HyperOptimizer:
    model, tune = network(), [Hyperparameter("weight_decay")]
    hyper = HyperOptimizer(model, sgd(model), mse, tune, method, FROZEN, val_loss=in_eval_mode)
    for batch in BATCHES[:number]:
        hyper.step(batch)
    return hyper


def mean_loss(weights: list[float], weight_decay: float = 0.02) -> float:
    """Of plain training."""
    model = network()
    optimizer = sgd(model, weight_decay)
    for batch in BATCHES:
        optimizer.zero_grad()
        mse(model, batch).backward()
        optimizer.step()
    losses = [in_eval_mode(model, part).item() for part in PARTS]
    return sum(w * loss for w, loss in zip(weights, losses)) / sum(weights)


@every_method
@pytest.mark.parametrize("sizes", [None, SIZES], ids=["one each", "sizes"])
def test_the_mean_against_plain_training(method: Method, sizes: list[int] | None) -> None:
    weights: list[float] = [1.0, 1.0, 1.0] if sizes is None else list(map(float, sizes))
    expected = derivative(lambda shift: mean_loss(weights, 0.02 + shift), 0.005)[0]
    assert abs(expected) > 1e-3
    found = trained(method).hypergradient(batches=PARTS, sizes=sizes)
    assert found["weight_decay/group0"].item() == pytest.approx(expected, rel=1e-6)
    report = trained(method).hyper_step(batches=PARTS, sizes=sizes)
    assert float(report.val_loss) == pytest.approx(mean_loss(weights), rel=1e-12)
    assert trained(method).validation_loss(batches=PARTS, sizes=sizes) == pytest.approx(
        mean_loss(weights), rel=1e-12
    )


@pytest.mark.parametrize("method", [*METHODS, Implicit(Cholesky(damping=30.0))], ids=str)
def test_by_their_sizes_they_are_one_batch(method: Method) -> None:
    whole = trained(method).hypergradient(WHOLE)["weight_decay/group0"].item()
    parts = trained(method).hypergradient(batches=PARTS, sizes=SIZES)["weight_decay/group0"].item()
    assert parts == pytest.approx(whole, rel=1e-9)
    equal = trained(method).hypergradient(batches=PARTS)["weight_decay/group0"].item()
    assert equal != pytest.approx(whole, rel=1e-3)


def test_a_loader_and_a_generator() -> None:
    loader = DataLoader(TensorDataset(*WHOLE), batch_size=4)
    whole = trained(Unrolled()).hypergradient(WHOLE)["weight_decay/group0"].item()
    for batches in (loader, (batch for batch in loader)):
        found = trained(Unrolled()).hypergradient(batches=batches)["weight_decay/group0"].item()
        assert found == pytest.approx(whole, rel=1e-9)


REFUSED = {
    "neither": ({}, TypeError, "got neither"),
    "both": ({"val_batch": WHOLE, "batches": PARTS}, TypeError, "got both"),
    "sizes alone": ({"val_batch": WHOLE, "sizes": [1]}, TypeError, "one validation batch has none"),
    "a tensor": ({"batches": WHOLE[0]}, TypeError, "got Tensor"),
    "a number": ({"batches": 3}, TypeError, "got int"),
    "none": ({"batches": []}, ValueError, "batches is empty"),
    "too few sizes": ({"batches": PARTS, "sizes": [1, 2]}, ValueError, "has 2 entries, and batches has more"),
    "too many sizes": ({"batches": PARTS, "sizes": [1] * 4}, ValueError, "has 4 entries, and batches has 3"),
    "a size of 0": ({"batches": PARTS, "sizes": [1, 0, 1]}, ValueError, "must be positive numbers"),
    "NaN": ({"batches": PARTS, "sizes": [1, float("nan"), 1]}, ValueError, "must be positive numbers"),
    "a word": ({"batches": PARTS, "sizes": ["a", 1, 1]}, ValueError, "must be positive numbers"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("call", ["hypergradient", "hyper_step", "validation_loss"])
def test_refused(case: str, call: str) -> None:
    """And nothing is lost by it."""
    arguments, error, message = REFUSED[case]
    hyper = trained(Unrolled())
    with pytest.raises(error, match=message):
        getattr(hyper, call)(**arguments)
    expected = trained(Unrolled()).hypergradient(WHOLE)["weight_decay/group0"]
    assert torch.equal(hyper.hypergradient(WHOLE)["weight_decay/group0"], expected)
