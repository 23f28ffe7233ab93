"""The module battery: trajectories against the plain torch loop,
hypergradients against finite differences."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from problems import FROZEN, REPLAY, mse, random_batch
from torch_hypergrad import HyperOptimizer, Hyperparameter
from torch_hypergrad.testing import check_hypergradient, derivative

BATCHES = [random_batch(8, 4, seed) for seed in range(6)]
VAL = random_batch(8, 4, seed=100)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
ADAM = partial(torch.optim.Adam, lr=0.02, eps=1e-3, weight_decay=0.01)


class Recurrent(nn.Module):
    """An LSTM over the features as a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x[..., None])[0][:, -1])


class Attention(nn.Module):
    """A Transformer layer, which calls fused attention."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(1, 8), nn.Linear(8, 1)
        self.layer = nn.TransformerEncoderLayer(
            8, 2, 16, dropout=dropout, activation=torch.tanh, batch_first=True
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x[..., None])).mean(1))


class Tied(nn.Module):
    """Two layers with the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Sometimes(nn.Module):
    """A branch that only batches with a positive first entry take."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.branch = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.trunk(x) + self.branch(x)) if x[0, 0] > 0 else torch.tanh(self.trunk(x))


class Rebinding(nn.Module):
    """A buffer that is replaced, not written to, at every step, and that the output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 0.1
        return torch.tanh(self.linear(x)) * (1 + self.count)


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 1))


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    model[0].weight.requires_grad_(False)
    return model


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)),
        nn.Conv2d(1, 3, 2, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(3, 1),
    )


def with_spectral_norm() -> nn.Module:
    return nn.Sequential(spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "batch_norm": batch_norm,
    "dropout": dropout,
    "lstm": Recurrent,
    "attention": Attention,
    "attention_dropout": partial(Attention, 0.3),
    "tied": Tied,
    "frozen": frozen,
    "sometimes": Sometimes,
    "convolution": convolution,
    "rebinding": Rebinding,
    "spectral_norm": with_spectral_norm,
}


def build(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind]().to(dtype)


def hyper_optimizer(
    model: nn.Module, optimizer: Any, tune: Any = None, method: Any = None, **options: Any
) -> HyperOptimizer:
    tune = tune or [Hyperparameter("weight_decay", per="tensor")]
    loss = options.pop("train_loss", mse)
    return HyperOptimizer(
        model, optimizer(model.parameters()), loss, tune, method or REPLAY, FROZEN, **options
    )


def plain_loop(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Any) -> None:
    for batch in batches:
        optimizer.zero_grad()
        mse(model, batch).backward()
        optimizer.step()


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("kind", MODELS)
def test_trajectory_is_that_of_the_plain_loop(kind: str, optimizer: Any) -> None:
    model = build(kind)
    plain = copy.deepcopy(model)
    hyper = hyper_optimizer(model, optimizer)
    torch.manual_seed(1)
    for i, batch in enumerate(BATCHES):
        hyper.step(batch)
        if i in (2, 3):
            hyper.hyper_step(VAL)  # replays must leave no trace in weights, buffers or random numbers
    after = torch.rand(())
    torch.manual_seed(1)
    plain_loop(plain, optimizer(plain.parameters()), BATCHES)
    assert torch.equal(after, torch.rand(()))
    for (name, ours), theirs in zip(model.state_dict().items(), plain.state_dict().values()):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-12, atol=1e-14, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "spectral_norm"])
def test_hypergradient_is_that_of_finite_differences(kind: str, optimizer: Any) -> None:
    entries = check_hypergradient(lambda: hyper_optimizer(build(kind), optimizer), BATCHES, VAL)
    assert any(abs(entry.computed) > 1e-6 for entry in entries)


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_spectral_norm_with_its_vectors_as_constants(name: str) -> None:
    """Training takes a power iteration at each step. Its vectors are buffers, constants to autograd:
    the reference trains with the recorded ones and no iteration."""
    hyper = hyper_optimizer(build("spectral_norm"), SGD, [Hyperparameter(name)])  # type: ignore[arg-type]
    recorded = []
    for batch in BATCHES:
        hyper.step(batch)
        recorded.append([b.clone() for b in hyper.model.buffers()])
    computed = hyper.hypergradient(VAL)[f"{name}/group0"].item()

    def loss_at(shift: float) -> float:
        model = build("spectral_norm")
        optimizer = SGD(model.parameters())
        optimizer.param_groups[0][name] += shift
        for batch, vectors in zip(BATCHES, recorded):
            with_vectors(model, vectors)
            plain_loop(model, optimizer, [batch])
        hyper_vectors = list(hyper.model.buffers())
        with_vectors(model, next_iteration(hyper_vectors, hyper))
        return mse(model, VAL).item()

    def with_vectors(model: nn.Module, vectors: list[Tensor]) -> None:
        model.eval()  # the parametrization then uses its vectors as they are
        for buffer, vector in zip(model.buffers(), vectors):
            buffer.copy_(vector)

    reference, _ = derivative(loss_at, 0.01)
    assert computed == pytest.approx(reference, rel=1e-5)
    assert abs(computed) > 1e-4


def next_iteration(vectors: list[Tensor], hyper: HyperOptimizer) -> list[Tensor]:
    """The vectors that a forward pass in train mode, as validation takes it here, iterates to."""
    model = copy.deepcopy(hyper.model)
    model(VAL[0])
    return list(model.buffers())


def test_validation_in_eval_mode_uses_running_statistics() -> None:
    def val_loss(model: nn.Module, batch: Any) -> Tensor:
        model.eval()
        loss = mse(model, batch)
        model.train()
        return loss

    check_hypergradient(lambda: hyper_optimizer(build("batch_norm"), SGD, val_loss=val_loss), BATCHES, VAL)


def test_train_and_eval_mode_are_replayed_as_recorded() -> None:
    """A model left in eval mode for validation must not switch dropout off in the replay of training."""

    def train_loss(model: nn.Module, batch: Any) -> Tensor:
        assert model.training
        return mse(model, batch)

    def val_loss(model: nn.Module, batch: Any) -> Tensor:
        model.eval()
        return mse(model, batch)

    def make() -> HyperOptimizer:
        return hyper_optimizer(build("dropout"), SGD, train_loss=train_loss, val_loss=val_loss)

    hyper = make()
    for batch in BATCHES:
        hyper.step(batch)
    hyper.model.eval()
    hyper.hypergradient(VAL)
    assert not hyper.model.training  # and modes are left as they were
    check_hypergradient(make, BATCHES, VAL)


def test_a_layer_unfrozen_during_the_trajectory() -> None:
    def make() -> HyperOptimizer:
        return hyper_optimizer(build("frozen"), SGD)

    hyper, plain = make(), build("frozen")
    optimizer = SGD(plain.parameters())
    for i, batch in enumerate(BATCHES):
        if i == 3:
            hyper.model[0].weight.requires_grad_(True)
            plain[0].weight.requires_grad_(True)
        hyper.step(batch)
        plain_loop(plain, optimizer, [batch])
    for ours, theirs in zip(hyper.model.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    computed = hyper.hypergradient(VAL)["weight_decay/2.weight"].item()

    def loss_at(shift: float) -> float:
        again = make()
        value = again.values()["weight_decay/2.weight"]
        again.set_values({"weight_decay/2.weight": value + shift})
        for i, batch in enumerate(BATCHES):
            if i == 3:
                again.model[0].weight.requires_grad_(True)
            again.step(batch)
        return again.validation_loss(VAL).item()

    assert computed == pytest.approx(derivative(loss_at, 0.01)[0], rel=1e-5)


@pytest.mark.parametrize("tuned", ["lr", "betas.0", "weight_decay"])
def test_dead_relu_units_under_adam_at_default_eps(tuned: str) -> None:
    """A unit that never fires has zero second moments, where the derivative
    of the square root is infinite."""

    def build_dead() -> nn.Module:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)).double()
        with torch.no_grad():
            model[0].bias[:2] = -100.0
        return model

    optimizer = partial(torch.optim.Adam, lr=0.01)  # weight decay 0: a dead unit's gradient is exactly 0
    tune = [Hyperparameter(tuned, per="group")]  # type: ignore[arg-type]
    hyper = hyper_optimizer(build_dead(), optimizer, tune)
    for batch in BATCHES:
        hyper.step(batch)
    assert (hyper.optimizer.state[hyper.model[0].weight]["exp_avg_sq"][:2] == 0).all()
    computed = hyper.hypergradient(VAL)
    assert all(g.isfinite().all() for g in computed.values())
    # At decay 0 a dead unit's step jumps by lr at the least decay: no derivative to compare.
    if tuned != "weight_decay":
        check_hypergradient(lambda: hyper_optimizer(build_dead(), optimizer, tune), BATCHES, VAL, rtol=1e-5)


def test_autocast_in_bfloat16() -> None:
    """bf16 rounds in steps, which finite differences see and derivatives do not:
    the reference is the float32 answer."""

    def autocast_loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.mse_loss(model(batch[0]).float(), batch[1])

    batches = [(x.float(), y.float()) for x, y in (random_batch(64, 4, seed) for seed in range(6))]
    answers = []
    for loss in (autocast_loss, F_mse):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
        hyper = hyper_optimizer(model, SGD, [Hyperparameter("lr")], train_loss=loss)
        for batch in batches:
            hyper.step(batch)
        answers.append(hyper.hypergradient(batches[0])["lr/group0"].item())
        if loss is autocast_loss:
            torch.manual_seed(0)
            plain = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
            optimizer = SGD(plain.parameters())
            for batch in batches:
                optimizer.zero_grad()
                autocast_loss(plain, batch).backward()
                optimizer.step()
            for ours, theirs in zip(model.parameters(), plain.parameters()):
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert answers[0] == pytest.approx(answers[1], rel=0.05)


def F_mse(model: nn.Module, batch: Any) -> Tensor:  # noqa: N802
    return F.mse_loss(model(batch[0]), batch[1])


@pytest.mark.parametrize("kind", ["lstm", "attention", "batch_norm", "convolution"])
def test_float32_models_can_be_differentiated_twice(kind: str) -> None:
    """Other kernels are chosen in float32 than in float64; the float64 answer is the reference."""
    answers = []
    for dtype in (torch.float32, torch.float64):
        hyper = hyper_optimizer(build(kind).to(dtype), SGD, [Hyperparameter("lr")])
        for x, y in BATCHES:
            hyper.step((x.to(dtype), y.to(dtype)))
        answers.append(hyper.hypergradient((VAL[0].to(dtype), VAL[1].to(dtype)))["lr/group0"].item())
    assert answers[0] == pytest.approx(answers[1], rel=1e-3)
