"""Losses that once gave a wrong number in silence, or somebody else's error.

Each is now right, or refused by name. Right means equal to differences of a plain torch loop, or to the
hypergradient of the loss in the proper way of writing it.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from problems import REPLAY, mse, tanh_mlp
from refusals import frozen_bytes
from test_silent_errors import BATCHES, DECAY, VAL, differences, hyper_of, right_or_refused, trained
from test_snapshots import live_bytes
from torch_hypergrad import (
    ForwardMode,
    HyperOptimizer,
    Hyperparameter,
    Identity,
    Implicit,
    Neumann,
    NotTwiceDifferentiableError,
    TrajectoryError,
    Unrolled,
)
from torch_hypergrad.methods import Method

Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]
Source: TypeAlias = Callable[[], tuple[nn.Module, Loss]]

FORWARD, DIFFERENCES = Unrolled(second_order="forward"), Unrolled(second_order="finite_difference")
WAYS: list[Any] = ["reverse", "forward", "finite_difference"]
REPLAYING = [
    Unrolled(memory=0, second_order=way, max_snapshots=budget) for way in WAYS for budget in (None, 2)
]
UNROLLING = [
    REPLAY,
    Unrolled(max_snapshots=2),
    Unrolled(max_graphs=3),
    DIFFERENCES,
    ForwardMode(),
]

# ---- autocast around the calls -----------------------------------------------------------------------------


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def autocast_mse(model: nn.Module, batch: Any) -> Tensor:
    """Autocast in its proper place."""
    with autocast():
        return mse(model, batch)


def two_windows(method: Method, train_loss: Loss, val_loss: Loss, around: Callable[[str], Any]) -> Any:
    """All that comes out of two windows, each call inside ``around(name)``, as bytes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    hyper = hyper_of(model, train_loss, DECAY, method, val_loss=val_loss, hyper_lr=0.01)
    val, found = single(VAL), list[Any]()
    for _ in range(2):
        for batch in map(single, BATCHES):
            with around("step"):
                found.append(hyper.step(batch))
        with around("hyper_step"):
            found += [hyper.validation_loss(val), hyper.hypergradient(val), hyper.hyper_step(val).val_loss]
    return frozen_bytes([found, hyper.values(), list(model.parameters())])


def single(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    x, y = batch
    return x.float(), y.float()


IN_AUTOCAST = [*UNROLLING, Implicit(Identity(0.1))]


@pytest.mark.parametrize("where", ["step", "hyper_step", "step hyper_step"])
@pytest.mark.parametrize("method", IN_AUTOCAST, ids=str)
def test_autocast_around_a_call_is_autocast_inside_its_loss(method: Method, where: str) -> None:
    """A replay in another precision than the step would be another trajectory, and a backward pass too."""
    train_loss, val_loss = (autocast_mse if call in where.split() else mse for call in ("step", "hyper_step"))
    expected = two_windows(method, train_loss, val_loss, around=lambda call: nullcontext())
    around = lambda call: autocast() if call in where.split() else nullcontext()  # noqa: E731
    assert two_windows(method, mse, mse, around) == expected


@pytest.mark.parametrize("method", IN_AUTOCAST, ids=str)
def test_autocast_around_the_whole_loop(method: Method) -> None:
    """Autocast keeps the weights that it has cast until the outermost block ends: from before the step."""
    expected = two_windows(method, autocast_mse, autocast_mse, around=lambda call: nullcontext())
    with autocast():
        assert two_windows(method, mse, mse, around=lambda call: nullcontext()) == expected


# ---- losses that are not a function of what is recorded ----------------------------------------------------


class Drifting(nn.Module):
    """Its output depends on a number that no state_dict holds, and that every call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 1), 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.scale *= 1.2
        return torch.tanh(self.linear(x)) * self.scale


def python_random() -> tuple[nn.Module, Loss]:
    random.seed(3)
    return tanh_mlp(), lambda model, batch: mse(model, batch) * (1 + random.random())


def numpy_random() -> tuple[nn.Module, Loss]:
    np.random.seed(3)
    return tanh_mlp(), lambda model, batch: mse(model, batch) * (1 + np.random.rand())


def own_generator() -> tuple[nn.Module, Loss]:
    generator = torch.Generator().manual_seed(3)
    return tanh_mlp(), lambda model, batch: mse(model, batch) * (1 + torch.rand((), generator=generator))


def counter() -> tuple[nn.Module, Loss]:
    count = itertools.count(1)
    return tanh_mlp(), lambda model, batch: mse(model, batch) / next(count)


def python_attribute() -> tuple[nn.Module, Loss]:
    torch.manual_seed(0)
    return Drifting().double(), mse


SOURCES = [
    python_random,
    numpy_random,
    own_generator,
    counter,
    python_attribute,
]  # each begins its stream anew


@pytest.mark.parametrize("method", REPLAYING, ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_a_loss_that_is_another_one_when_replayed(source: Source, method: Method) -> None:
    model, loss = source()
    hyper = hyper_of(model, loss, [Hyperparameter("lr")], method, val_loss=mse)
    recorded = [hyper.step(batch).item() for batch in BATCHES]
    for call in (hyper.hypergradient, hyper.hyper_step):
        with pytest.raises(TrajectoryError, match="loss") as caught:
            call(VAL)
        number = re.search(r"training step (\d)", str(caught.value))
        assert number is not None
        told = [float(n) for n in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", str(caught.value))]
        assert len(told) >= 2, f"both losses are told: {caught.value}"
        assert any(n == pytest.approx(recorded[int(number[1]) - 1], rel=1e-2) for n in told)


@pytest.mark.parametrize("method", [Unrolled(), Unrolled(max_graphs=100), ForwardMode()], ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_a_loss_that_is_never_replayed_may_read_anything(source: Source, method: Method) -> None:
    """It is called once for each step, as in a plain loop."""
    model, loss = source()
    hyper = hyper_of(model, loss, [Hyperparameter("lr")], method, val_loss=mse)
    found = trained(hyper, BATCHES).hypergradient(VAL)["lr/group0"].item()
    assert found == pytest.approx(differences(source, BATCHES, VAL, val_loss=mse), rel=1e-5)


# ---- random numbers ----------------------------------------------------------------------------------------


def noisy(grads: list[Tensor]) -> list[Tensor]:
    """Noise as large as the gradient itself."""
    return [g + 0.5 * g.square().mean().sqrt() * torch.randn(g.shape, dtype=g.dtype) for g in grads]


def thinned(grads: list[Tensor]) -> list[Tensor]:
    return [g * torch.rand(g.shape, dtype=g.dtype) for g in grads]


EVERY_METHOD = [*REPLAYING, Unrolled(max_graphs=2), Unrolled(max_graphs=100), ForwardMode()]


def with_dropout(p: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(p), nn.Linear(6, 1)).double()


@pytest.mark.parametrize("transform", [noisy, thinned])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("method", EVERY_METHOD, ids=str)
def test_a_random_grad_transform_draws_the_same_numbers_again(
    method: Method, p: float, transform: Callable[[list[Tensor]], list[Tensor]]
) -> None:
    """Its numbers come after those of the loss, which a way that keeps gradients does not call again."""
    hyper = hyper_of(with_dropout(p), mse, [Hyperparameter("lr")], method, grad_transform=transform)
    found = trained(hyper, BATCHES).hypergradient(VAL)["lr/group0"].item()
    reference = differences(lambda: (with_dropout(p), mse), BATCHES, VAL, transform=transform)
    assert found == pytest.approx(reference, rel=1e-5)


def drawing(method: Method, num_steps: int, seeded_at: int | None = None) -> HyperOptimizer:
    """A loop that draws random numbers of its own between steps."""
    hyper = hyper_of(with_dropout(), mse, DECAY, method)
    torch.manual_seed(1)
    for t in range(num_steps):
        if t == seeded_at:
            torch.manual_seed(7)
        torch.rand(100), torch.randn(7), torch.randperm(10)
        hyper.step(BATCHES[0])
    return hyper


@pytest.mark.filterwarnings("ignore")  # gc finds objects whose mere inspection warns
@pytest.mark.slow
def test_random_numbers_of_a_long_window_take_little_memory() -> None:
    """A generator's state is 5 kB: kept for each step, it is more than the snapshots."""
    grown = []
    for num_steps in (500, 3000):
        before = live_bytes()
        hyper = drawing(Unrolled(max_snapshots=10), num_steps)
        grown.append(live_bytes() - before)
        del hyper
    assert (grown[1] - grown[0]) / 2500 < 600


@pytest.mark.parametrize("seeded_at", [None, 20])
def test_random_numbers_between_steps_are_drawn_again_to_the_bit(seeded_at: int | None) -> None:
    expected = drawing(REPLAY, 40, seeded_at).hypergradient(VAL)
    hyper = drawing(Unrolled(max_snapshots=10), 40, seeded_at)
    assert frozen_bytes(hyper.hypergradient(VAL)) == frozen_bytes(expected)


# ---- activation checkpointing ------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Forgets what is inside ``body`` and computes it again in the backward pass, if ``on``."""

    def __init__(self, body: nn.Module, on: bool) -> None:
        super().__init__()
        self.embed, self.body, self.head, self.on = nn.Linear(4, 6), body, nn.Linear(6, 1), on

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        return self.head(checkpoint(self.body, x, use_reentrant=False) if self.on else self.body(x))


class Attention(nn.Module):
    """Self-attention over the batch, with torch's choice of kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(6, 18)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)[None, None].chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v)[0, 0]


class Loud(nn.Module):
    """Twice as loud in train mode, with the same tensors saved, so that checkpointing finds nothing amiss."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * (2.0 if self.training else 1.0))


BODIES: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.4), nn.Tanh()),
    # Its running statistics stay as they are: checkpointing writes them twice a step, in plain torch as well.
    "batch_norm": lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, momentum=0.0), nn.Tanh()),
    "mode": lambda: nn.Sequential(nn.Linear(6, 6), Loud()),
    "attention": Attention,
}


def checkpointed(body: str, on: bool, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Checkpointed(BODIES[body](), on).to(dtype)


@pytest.mark.parametrize("body", ["dropout", "batch_norm", "mode"])
@pytest.mark.parametrize(
    "method", [Unrolled(max_graphs=50), Unrolled(max_graphs=2), REPLAY, ForwardMode()], ids=str
)
def test_what_is_checkpointed_is_computed_again_in_its_own_mode(method: Method, body: str) -> None:
    """A kept graph calls the checkpointed part when it is gone back through, with the model in eval mode."""
    answers = []
    for on, way in ((False, REPLAY), (True, method)):
        hyper = trained(hyper_of(checkpointed(body, on), mse, [Hyperparameter("lr")], way), BATCHES)
        hyper.model.eval()
        answers.append(hyper.hypergradient(VAL)["lr/group0"].item())
        assert not any(module.training for module in hyper.model.modules())
    assert answers[1] == pytest.approx(answers[0], rel=1e-10)


CHECKPOINTED_ATTENTION = [
    REPLAY,
    Unrolled(max_graphs=5),
    ForwardMode(),
    FORWARD,
    Implicit(Neumann(5, 0.05)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", CHECKPOINTED_ATTENTION, ids=str)
def test_checkpointed_attention_is_computed_again_by_the_same_kernel(
    method: Method, dtype: torch.dtype
) -> None:
    """torch chooses another one outside of the step, and checkpointing then finds other tensors saved."""
    batches = [(x.to(dtype), y.to(dtype)) for x, y in (*BATCHES, VAL)]
    answers = []
    for on in (False, True):
        model = checkpointed("attention", on, dtype)
        hyper = hyper_of(model, mse, DECAY, method)
        answers.append(trained(hyper, batches[:-1]).hypergradient(batches[-1])["weight_decay/group0"].item())
    assert answers[1] == pytest.approx(answers[0], rel=1e-5)


# ---- an embedding's padding --------------------------------------------------------------------------------

TOKENS = [torch.randint(5, (6, 3), generator=torch.Generator().manual_seed(seed)) for seed in range(5)]


class Language(nn.Module):
    """Token 0 is padding. With a tied head, its row moves by what the head does."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(tokens).sum(1)))


def language(tied: bool) -> nn.Module:
    torch.manual_seed(0)
    return Language(tied).double()


def next_token(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens), tokens[:, 0])


def of_language(method: Method, *, tied: bool) -> float:
    hyper = hyper_of(language(tied), next_token, [Hyperparameter("lr")], method)
    return trained(hyper, TOKENS[:4]).hypergradient(TOKENS[4])["lr/group0"].item()


ON_TOKENS = [REPLAY, Unrolled(max_graphs=3), ForwardMode(), FORWARD, DIFFERENCES]


@pytest.mark.parametrize("method", ON_TOKENS, ids=str)
def test_padding_whose_row_moves_because_the_head_is_tied_to_it(method: Method) -> None:
    """Autograd takes the row for a constant, and it is none."""
    reference = differences(lambda: (language(True), next_token), TOKENS[:4], TOKENS[4])
    right_or_refused(
        lambda: of_language(method, tied=True), reference, NotTwiceDifferentiableError, "padding_idx"
    )


@pytest.mark.parametrize("method", ON_TOKENS, ids=str)
def test_padding_whose_row_stays_is_not_refused(method: Method) -> None:
    reference = differences(lambda: (language(False), next_token), TOKENS[:4], TOKENS[4])
    assert of_language(method, tied=False) == pytest.approx(reference, rel=1e-5)


# ---- gradient penalties ------------------------------------------------------------------------------------

NORMS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "LayerNorm": (lambda: nn.LayerNorm(8), "(?i)layer_?norm"),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(8), "(?i)batch_?norm"),
    "InstanceNorm1d": (
        lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, affine=True), nn.Flatten()),
        "(?i)(instance|batch)_?norm",  # to torch they are the same function
    ),
}
"""Layers, and the names that a refusal may give them."""


def critic(norm: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), NORMS[norm][0](), nn.Tanh(), nn.Linear(8, 1)).double()


def penalty(model: nn.Module, batch: Any) -> Tensor:
    """How far the model's slope in its input is from 1, as WGAN-GP has it."""
    x = batch[0].detach().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return mse(model, batch) + 0.1 * (slope.square().sum(1) - 1).square().mean()


def penalty_in_every_third_step(model: nn.Module, batch: Any) -> Tensor:
    """Known by the batch, so that a replay has it in the same steps."""
    return penalty(model, batch) if torch.equal(batch[0], BATCHES[2][0]) else mse(model, batch)


PENALIZED = [*UNROLLING, FORWARD]


@pytest.mark.parametrize("loss", [penalty, penalty_in_every_third_step])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", PENALIZED, ids=str)
def test_a_gradient_penalty_through_normalization(method: Method, norm: str, loss: Loss) -> None:
    """Its hypergradient needs third derivatives, and torch's formulas for second ones take means and
    deviations for constants. A look at the first step alone does not see what comes later."""

    def run() -> float:
        hyper = hyper_of(critic(norm), loss, [Hyperparameter("lr")], method, val_loss=mse)
        return trained(hyper, BATCHES).hypergradient(VAL)["lr/group0"].item()

    reference = differences(lambda: (critic(norm), loss), BATCHES, VAL, val_loss=mse)
    if method == DIFFERENCES:  # the remedy that the refusal names
        assert run() == pytest.approx(reference, rel=1e-5)
    else:
        right_or_refused(run, reference, NotTwiceDifferentiableError, "finite_difference", NORMS[norm][1])


@pytest.mark.parametrize("second_order", ["reverse", "forward"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_gradient_penalty_at_the_optimum(norm: str, second_order: Any) -> None:
    def run(second_order: Any) -> float:
        method = Implicit(Neumann(5, 0.005), second_order=second_order)
        hyper = hyper_of(critic(norm), penalty, DECAY, method, val_loss=mse)
        return trained(hyper, BATCHES).hypergradient(VAL)["weight_decay/group0"].item()

    words = "finite_difference", NORMS[norm][1]
    right_or_refused(lambda: run(second_order), run("finite_difference"), NotTwiceDifferentiableError, *words)
