"""The same on a GPU: plain torch's trajectory, the CPU's hypergradient, replays of device random numbers, offload."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from problems import FROZEN, mse, random_batch
from torch_hypergrad import CG, Cholesky, ForwardMode, HyperOptimizer, Hyperparameter, Implicit, Neumann, Unrolled
from torch_hypergrad.methods import Method
from torch_hypergrad.testing import check_hypergradient

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BATCHES = [random_batch(8, 4, seed) for seed in range(6)]
VAL = random_batch(8, 4, seed=100)
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.02, eps=1e-3),
    "nadam": partial(torch.optim.NAdam, lr=0.02, eps=1e-3),
    "asgd": partial(torch.optim.ASGD, lr=0.1),
    "rprop": partial(torch.optim.Rprop, lr=0.01),
}


def to(device: str, batch: Any) -> Any:
    return tuple(part.to(device) for part in batch)


def network(device: str, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 1)
    return nn.Sequential(*layers).double().to(device)


def trained(device: str, optimizer: str, method: Method, dropout: float = 0.0, name: str = "weight_decay") -> HyperOptimizer:
    model = network(device, dropout)
    made = OPTIMIZERS[optimizer](model.parameters())
    hyper = HyperOptimizer(model, made, mse, [Hyperparameter(name, per="tensor")], method, FROZEN)  # type: ignore[arg-type]
    torch.manual_seed(1)
    for batch in BATCHES:
        hyper.step(to(device, batch))
    return hyper


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_is_that_of_plain_torch(optimizer: str) -> None:
    hyper = trained("cuda", optimizer, Unrolled(), name="lr")
    plain = network("cuda")
    made = OPTIMIZERS[optimizer](plain.parameters())
    for batch in BATCHES:
        made.zero_grad()
        mse(plain, to("cuda", batch)).backward()
        made.step()
    for ours, theirs in zip(hyper.model.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", [Unrolled(), ForwardMode()], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_hypergradient_is_that_of_the_cpu(optimizer: str, method: Method) -> None:
    found = trained("cuda", optimizer, method, name="lr").hypergradient(to("cuda", VAL))
    expected = trained("cpu", optimizer, method, name="lr").hypergradient(VAL)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("solver", [Neumann(20, damping=1.0), CG(damping=5.0), Cholesky(damping=5.0)], ids=str)
def test_implicit_hypergradient_is_that_of_the_cpu(solver: Any) -> None:
    found = trained("cuda", "sgd", Implicit(solver)).hypergradient(to("cuda", VAL))
    expected = trained("cpu", "sgd", Implicit(solver)).hypergradient(VAL)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-5, atol=1e-9)


def test_dropout_is_replayed() -> None:
    def make() -> HyperOptimizer:
        model = network("cuda", dropout=0.5)
        made = OPTIMIZERS["sgd"](model.parameters())
        return HyperOptimizer(model, made, mse, [Hyperparameter("lr")], Unrolled(), FROZEN)

    check_hypergradient(make, [to("cuda", batch) for batch in BATCHES], to("cuda", VAL))


@pytest.mark.parametrize(
    "method", [Unrolled(max_snapshots=2), Unrolled(offload="cpu"), Unrolled(max_snapshots=3, offload="cpu")]
)
def test_snapshots_and_offload_give_the_same_bits(method: Unrolled) -> None:
    found = trained("cuda", "adamw", method, dropout=0.5).hypergradient(to("cuda", VAL))
    expected = trained("cuda", "adamw", Unrolled(), dropout=0.5).hypergradient(to("cuda", VAL))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_lstm_and_attention_can_be_differentiated_twice() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(1, 8, batch_first=True)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
            self.head = nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.layer(self.lstm(x[..., None])[0]).mean(1))

    torch.manual_seed(0)
    model = Both().cuda()
    made = torch.optim.SGD(model.parameters(), lr=0.1)
    hyper = HyperOptimizer(model, made, mse, [Hyperparameter("lr")], Unrolled(), FROZEN)
    for x, y in BATCHES:
        hyper.step((x.float().cuda(), y.float().cuda()))
    x, y = VAL
    assert hyper.hypergradient((x.float().cuda(), y.float().cuda()))["lr/group0"].isfinite()


def test_writes_through_data_are_found_at_the_hyper_step() -> None:
    from torch_hypergrad import TrajectoryError

    hyper = trained("cuda", "sgd", Unrolled())
    hyper.model[0].weight.data.add_(0.1)
    hyper.step(to("cuda", BATCHES[0]))
    with pytest.raises(TrajectoryError, match="wrote to a parameter before training step 7"):
        hyper.hyper_step(to("cuda", VAL))


def test_a_run_is_resumed_on_the_device() -> None:
    hyper = trained("cuda", "adamw", Unrolled(), dropout=0.5)
    saved = copy.deepcopy(hyper.state_dict())
    other = trained("cuda", "adamw", Unrolled(), dropout=0.5)
    other.load_state_dict(saved)
    for run in (hyper, other):
        torch.cuda.manual_seed(5)
        run.step(to("cuda", BATCHES[0]))
    expected = hyper.hypergradient(to("cuda", VAL))
    for name, value in other.hypergradient(to("cuda", VAL)).items():
        assert torch.equal(value, expected[name])
