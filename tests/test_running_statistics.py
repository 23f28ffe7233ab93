"""Hypergradients through the running statistics of normalizations, against differences of plain training.

The reference uses no code of torch_hypergrad's training: a plain loop (``backward``, ``optimizer.step()``),
then ``model.eval()`` and the validation loss, run again for each perturbed value. A second reference puts the
statistics of the unperturbed run back before each step and before validation: what a hypergradient would be
that takes them for constants. Each case says whether the two differ, so that no test can pass by being blind
to the statistics.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from problems import FROZEN, REPLAY, random_batch
from torch_hypergrad import ForwardMode, HyperOptimizer, Hyperparameter, Unrolled
from torch_hypergrad.methods import Method
from torch_hypergrad.testing import derivative

RTOL = 2e-6
VISIBLE = 0.01
"""Taking the statistics for constants must be off by more than this, relatively, in some entry of a case."""

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
ADAM = partial(torch.optim.Adam, lr=0.02, eps=1e-3, weight_decay=0.01)
ADAMW = partial(torch.optim.AdamW, lr=0.02, eps=1e-3, weight_decay=0.1)
BATCHES = [random_batch(8, 8, seed) for seed in range(6)]
VAL = random_batch(12, 8, seed=100)


def squares(model: nn.Module, batch: Any, scale: Tensor | None = None) -> Tensor:
    x, y = batch
    return (model(x if scale is None else x * scale) - y).square().mean()


def in_parts(model: nn.Module, batch: Any, scale: Tensor | None = None) -> Tensor:
    """Each layer is called twice, on parts of different sizes."""
    x, y = batch
    return squares(model, (x[:3], y[:3]), scale) + squares(model, (x[3:], y[3:]), scale)


def evaluated(model: nn.Module, batch: Any) -> Tensor:
    model.eval()
    return squares(model, batch)


def one_group(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters())}]


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    first, *others = model.parameters()
    return [{"params": [first], "lr": 0.05}, {"params": others, "weight_decay": 0.03}]


@dataclass(frozen=True, eq=False)
class Case:
    """A training and its validation.

    Args:
        make_model: the model, which begins with seed 0 and statistics of its own.
        optimizer: makes the optimizer of ``groups(model)``.
        train_loss: of the model, a batch and ``scale``, a tensor that may be tuned.
        before_step: what is done to the model before the step of a number.
        sensitive: whether constant statistics would give another hypergradient.
    """

    make_model: Callable[[], nn.Module]
    optimizer: Callable[..., torch.optim.Optimizer] = SGD
    batches: Sequence[Any] = tuple(BATCHES)
    val: Any = VAL
    train_loss: Callable[[nn.Module, Any, Tensor | None], Tensor] = squares
    val_loss: Callable[[nn.Module, Any], Tensor] = evaluated
    groups: Callable[[nn.Module], list[dict[str, Any]]] = one_group
    before_step: Callable[[nn.Module, int], None] = lambda model, number: None
    scale: Tensor | None = None
    sensitive: bool = True

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make_model().double()
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running")):
                buffer.normal_(std=0.3)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
        return model


# ---- the reference -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One number of what is tuned: ``"lr"`` or ``"weight_decay"`` of ``"group0"`` or of a parameter (one
    entry of it for ``per="element"``), at one step for ``per="step"``; or an entry of ``"scale"``."""

    name: str
    where: str
    per: str
    index: int
    value: float

    def in_group(self, group: dict[str, Any], number: int, named: dict[str, nn.Parameter]) -> bool:
        """Whether a param group of plain torch has this value; per tensor, each has a group of its own."""
        if self.per == "tensor":
            return group["params"][0] is named[self.where]
        return self.per in ("group", "step") and self.where == f"group{number}"


@dataclass(frozen=True)
class Run:
    """How a plain training ended, and the buffers before each step and at the end."""

    loss: float
    buffers: list[list[Tensor]]


def plain_run(
    case: Case, entry: Entry | None = None, shift: float = 0.0, since: int = 0, held: Run | None = None
) -> Run:
    """Plain torch training and validation, with an entry shifted from the step ``since`` on, and with the
    statistics of another run if they are to be held."""
    model, found = case.build(), []
    named, groups = dict(model.named_parameters()), case.groups(model)
    if entry is not None and entry.per == "tensor":
        groups = [{**group, "params": [p]} for group in groups for p in group["params"]]
    optimizer, scale = case.optimizer(groups), None if case.scale is None else case.scale.clone()

    def with_buffers(number: int) -> None:
        for i, buffer in enumerate(model.buffers()):
            if held is not None:
                buffer.copy_(held.buffers[number][i])
        found.append([buffer.clone() for buffer in model.buffers()])

    for t, batch in enumerate(case.batches):
        case.before_step(model, t)
        with_buffers(t)
        begins = entry is not None and t == (entry.index if entry.per == "step" else since)
        ends = entry is not None and entry.per == "step" and t == entry.index + 1
        if entry is not None and (begins or ends):
            for number, group in enumerate(optimizer.param_groups):
                if entry.in_group(group, number, named):
                    group[entry.name] += shift if begins else -shift
            if scale is not None and entry.name == "scale":
                scale[entry.index] += shift
        optimizer.zero_grad()
        case.train_loss(model, batch, scale).backward()
        if entry is not None and entry.per == "element" and t >= since:
            step_with_one_entry_shifted(optimizer, named[entry.where], entry, shift)
        else:
            optimizer.step()
    with_buffers(len(case.batches))
    return Run(case.val_loss(model, case.val).item(), found)


@torch.no_grad()
def step_with_one_entry_shifted(
    optimizer: torch.optim.Optimizer, p: nn.Parameter, entry: Entry, shift: float
) -> None:
    """Plain torch has no value for one entry. Steps are linear in ``lr``, added decay is a part of the
    gradient, and AdamW's decay a factor."""
    at = p.view(-1)[entry.index]
    (group,) = (group for group in optimizer.param_groups if any(q is p for q in group["params"]))
    before = at.clone()
    if entry.name == "weight_decay" and isinstance(optimizer, torch.optim.AdamW):
        at *= (1 - group["lr"] * (group["weight_decay"] + shift)) / (1 - group["lr"] * group["weight_decay"])
    elif entry.name == "weight_decay":
        p.grad.view(-1)[entry.index] += shift * at
    optimizer.step()
    if entry.name == "lr":
        at += shift / group["lr"] * (at - before)


@cache
def unperturbed(case: Case) -> Run:
    return plain_run(case)


@cache
def differences(case: Case, entry: Entry, since: int = 0) -> float:
    """The derivative of the validation loss of plain training."""
    return derivative(lambda h: plain_run(case, entry, h, since).loss, 0.02 * abs(entry.value))[0]


@cache
def differences_with_statistics_held(case: Case, entry: Entry, since: int = 0) -> float:
    """The same with the statistics as constants, to far better than ``VISIBLE``."""
    h = 0.002 * abs(entry.value)
    above, below = (plain_run(case, entry, shift, since, unperturbed(case)).loss for shift in (h, -h))
    return (above - below) / (2 * h)


# ---- hypergradients ----------------------------------------------------------------------------------------


def make_hyper(case: Case, tune: Sequence[Any], method: Method) -> HyperOptimizer:
    model = case.build()
    scale = None if case.scale is None else case.scale.clone().requires_grad_()
    tuned = [*tune, ("scale", scale)] if scale is not None else tune
    return HyperOptimizer(
        model,
        case.optimizer(case.groups(model)),
        lambda model, batch: case.train_loss(model, batch, scale),
        tuned,
        method,
        FROZEN,
        val_loss=case.val_loss,
    )


def train(case: Case, hyper: HyperOptimizer, steps: range | None = None) -> HyperOptimizer:
    for t in range(len(case.batches)) if steps is None else steps:
        case.before_step(hyper.model, t)
        hyper.step(case.batches[t])
    return hyper


def entries(
    tune: Sequence[Hyperparameter], hyper: HyperOptimizer, at_most: int = 2
) -> list[tuple[str, Entry]]:
    """For each value its first entries, evenly spread, with the key of ``hyper.values()``."""
    granularity = {setting.name: setting.per for setting in tune} | {"scale": "loss"}
    found = []
    for key, value in hyper.values().items():
        name, _, where = key.partition("/")
        for index in range(0, value.numel(), -(-value.numel() // at_most)):
            entry = Entry(name, where, granularity[name], index, value.view(-1)[index].item())
            found.append((key, entry))
    return found


def check(
    case: Case,
    tune: Sequence[Hyperparameter],
    method: Method | None = None,
    *,
    rtol: float = RTOL,
    since: int = 0,
    hyper: HyperOptimizer | None = None,
) -> None:
    """A hypergradient against plain training. Entries near zero need be right to a thousandth of the largest.

    Raises:
        AssertionError: if they differ; or if a case that is sensitive to the statistics is not, or the
            reverse.
    """
    hyper = hyper or train(case, make_hyper(case, tune, method or REPLAY))
    assert hyper.validation_loss(case.val).item() == pytest.approx(unperturbed(case).loss, rel=1e-12)
    found, chosen = hyper.hypergradient(case.val), entries(tune, hyper)
    computed = torch.stack([found[key].reshape(-1)[entry.index] for key, entry in chosen])
    plain = [differences(case, entry, since) for _, entry in chosen]
    expected, largest = computed.new_tensor(plain), max(map(abs, plain))
    reads = any(
        abs(differences_with_statistics_held(case, entry, since) - value) > VISIBLE * max(abs(value), 1e-6)
        for (_, entry), value in zip(chosen, plain)
    )
    assert reads == case.sensitive, "how the case says that it reads statistics is not how it does"
    assert largest > 1e-5
    torch.testing.assert_close(computed, expected, rtol=rtol, atol=1e-3 * rtol * largest + 1e-11)


# ---- modules -----------------------------------------------------------------------------------------------

DECAYS = [Hyperparameter("weight_decay", per="tensor"), Hyperparameter("lr")]


def vectors(norm: Callable[..., nn.Module] = nn.BatchNorm1d, **options: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 5), norm(5, **options), nn.Tanh(), nn.Linear(5, 1))


def signals(norm: Callable[..., nn.Module], **options: Any) -> nn.Module:
    conv = nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 2)
    return nn.Sequential(*conv, norm(3, **options), nn.Tanh(), nn.Flatten(), nn.Linear(9, 1))


def images(norm: Callable[..., nn.Module], **options: Any) -> nn.Module:
    conv = nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 2, padding=1)
    return nn.Sequential(*conv, norm(3, **options), nn.Tanh(), nn.Flatten(), nn.Linear(27, 1))


def volumes(norm: Callable[..., nn.Module], **options: Any) -> nn.Module:
    conv = nn.Unflatten(1, (1, 2, 2, 2)), nn.Conv3d(1, 2, 2, padding=1)
    return nn.Sequential(*conv, norm(2, **options), nn.Tanh(), nn.AvgPool3d(3), nn.Flatten(), nn.Linear(2, 1))


class OwnBatchNorm(nn.BatchNorm1d):
    """A class that changes nothing."""


class Residual(nn.Module):
    """A block as in a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(2, 2, 3, padding=1, bias=False),
            nn.Conv2d(2, 2, 3, padding=1, bias=False),
        )
        self.norms, self.head = nn.ModuleList([nn.BatchNorm2d(2), nn.BatchNorm2d(2)]), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 2, 2, 2)
        hidden = self.norms[1](self.second(torch.tanh(self.norms[0](self.first(x)))))
        return self.head(torch.tanh(hidden + x).flatten(1))


class Shared(nn.Module):
    """One layer at two depths: its second call of a forward pass sees what its first has made."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.second(torch.tanh(self.norm(self.first(x)))))))


class Singly(nn.Module):
    """Examples one by one, without a batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(2, 3, 2), nn.Linear(9, 1)
        self.norm = nn.InstanceNorm1d(3, track_running_stats=True, affine=True, momentum=0.2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.stack([self.norm(example) for example in self.conv(x.view(-1, 2, 4))])
        return self.head(torch.tanh(hidden).flatten(1))


class Recomputed(nn.Module):
    """A part whose backward pass calls it again, which moves the statistics once more."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Tanh()), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.part, x, use_reentrant=False))


class Aside(nn.Module):
    """Statistics that training keeps and does not use: no gradient of the training loss goes through them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(8, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        normalized = self.norm(hidden)
        return self.head(torch.tanh(hidden if self.training else normalized))


def behind_a_frozen_layer() -> nn.Module:
    """Statistics of what no tuned value moves, before others."""
    frozen, norm = nn.Linear(8, 6).requires_grad_(False), nn.BatchNorm1d(6)
    return nn.Sequential(
        nn.BatchNorm1d(8), frozen, norm, nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)
    )


def untracked_later() -> nn.Module:
    """Statistics that are there and that training leaves alone."""
    model = vectors()
    model[1].track_running_stats = False
    return model


def always_frozen(model: nn.Module, number: int) -> None:
    model[1].eval()


def frozen_since_step_4(model: nn.Module, number: int) -> None:
    if number == 4:
        model[1].eval()


def frozen_before_step_3(model: nn.Module, number: int) -> None:
    model[1].train(number >= 3)


CASES = {
    "batch_norm_1d": Case(vectors),
    "batch_norm_1d_of_signals": Case(partial(signals, nn.BatchNorm1d)),
    "batch_norm_2d": Case(partial(images, nn.BatchNorm2d)),
    "batch_norm_3d": Case(partial(volumes, nn.BatchNorm3d)),
    "sync_batch_norm": Case(partial(images, nn.SyncBatchNorm)),
    "instance_norm_1d": Case(partial(signals, nn.InstanceNorm1d, track_running_stats=True)),
    "instance_norm_1d_affine": Case(
        partial(signals, nn.InstanceNorm1d, track_running_stats=True, affine=True)
    ),
    "instance_norm_2d": Case(partial(images, nn.InstanceNorm2d, track_running_stats=True)),
    "instance_norm_momentum_0.5": Case(
        partial(signals, nn.InstanceNorm1d, track_running_stats=True, momentum=0.5)
    ),
    "instance_norm_momentum_none": Case(
        partial(signals, nn.InstanceNorm1d, track_running_stats=True, momentum=None), sensitive=False
    ),  # torch then leaves the statistics of InstanceNorm where they are
    "not_affine": Case(partial(vectors, affine=False)),
    "momentum_none": Case(partial(vectors, momentum=None)),
    "momentum_0.5": Case(partial(vectors, momentum=0.5)),
    "momentum_1": Case(partial(vectors, momentum=1.0)),
    "momentum_0": Case(partial(vectors, momentum=0.0), sensitive=False),
    "without_statistics": Case(partial(vectors, track_running_stats=False), sensitive=False),
    "untracked_later": Case(untracked_later, sensitive=False),
    "called_twice": Case(vectors, train_loss=in_parts),
    "called_twice_momentum_none": Case(partial(vectors, momentum=None), train_loss=in_parts),
    "instance_norm_called_twice": Case(
        partial(images, nn.InstanceNorm2d, track_running_stats=True), train_loss=in_parts
    ),
    "shared": Case(Shared),
    "shared_and_called_twice": Case(Shared, train_loss=in_parts),
    "residual": Case(Residual),
    "subclass": Case(partial(vectors, OwnBatchNorm)),
    "singly": Case(Singly),
    "recomputed": Case(Recomputed),
    "aside": Case(Aside),
    "behind_a_frozen_layer": Case(behind_a_frozen_layer),
    "frozen": Case(vectors, before_step=always_frozen, sensitive=False),
    "frozen_since_step_4": Case(partial(vectors, momentum=0.5), before_step=frozen_since_step_4),
    "frozen_before_step_3": Case(vectors, before_step=frozen_before_step_3),
}
SOME = ("momentum_none", "called_twice", "residual", "frozen_since_step_4", "instance_norm_2d")
some_cases = pytest.mark.parametrize("kind", SOME)


@pytest.mark.parametrize("kind", CASES)
def test_modules(kind: str) -> None:
    if kind == "sync_batch_norm":
        skip_without_sync_batch_norm()
    check(CASES[kind], DECAYS)


def skip_without_sync_batch_norm() -> None:
    try:
        nn.SyncBatchNorm(2)(torch.randn(4, 2))
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"SyncBatchNorm does not run here: {error}")


# ---- digits ------------------------------------------------------------------------------------------------


def convolutions() -> nn.Module:
    first = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh()
    second = nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.Tanh()
    return nn.Sequential(*first, *second, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 10))


def conv_weights_apart(model: nn.Module) -> list[dict[str, Any]]:
    weights = [model[0].weight, model[3].weight]
    others = [p for p in model.parameters() if all(p is not w for w in weights)]
    return [{"params": weights, "weight_decay": 0.01}, {"params": others}]


def entropy(model: nn.Module, batch: Any, scale: Tensor | None = None) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def evaluated_entropy(model: nn.Module, batch: Any) -> Tensor:
    model.eval()
    return entropy(model, batch)


@cache
def digits(num_steps: int, lr: float) -> Case:
    x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    x = x.double().view(-1, 1, 8, 8) / 16
    generator = torch.Generator().manual_seed(0)
    picks = [torch.randperm(1000, generator=generator)[:32] for _ in range(num_steps)]
    return Case(
        convolutions,
        partial(torch.optim.SGD, lr=lr, momentum=0.9),
        [(x[rows], y[rows]) for rows in picks],
        (x[1000:1100], y[1000:1100]),
        entropy,
        evaluated_entropy,
        conv_weights_apart,
    )


@pytest.mark.parametrize(
    ("num_steps", "lr", "per"), [(20, 0.05, "tensor"), (100, 0.05, "group"), (100, 0.2, "group")]
)
def test_weight_decay_of_convolutions_on_digits(num_steps: int, lr: float, per: str) -> None:
    tune = [Hyperparameter("weight_decay", per=per, groups=[0])]  # type: ignore[arg-type]
    check(digits(num_steps, lr), tune, rtol=1e-5)


# ---- optimizers, granularities and groups ------------------------------------------------------------------

OPTIMIZERS = {"sgd": SGD, "adam": ADAM, "adamw": ADAMW}


@pytest.mark.parametrize("groups", [one_group, two_groups])
@pytest.mark.parametrize("per", ["group", "tensor", "element"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_granularities(optimizer: str, per: str, groups: Callable[[nn.Module], list[dict[str, Any]]]) -> None:
    tune = [Hyperparameter("lr", per=per), Hyperparameter("weight_decay", per=per)]  # type: ignore[arg-type]
    check(granularity_case(optimizer, groups), tune)


@cache
def granularity_case(optimizer: str, groups: Callable[[nn.Module], list[dict[str, Any]]]) -> Case:
    return Case(vectors, OPTIMIZERS[optimizer], groups=groups)


def test_momentum_and_a_schedule() -> None:
    check(CASES["residual"], [Hyperparameter("momentum")])
    tune = [Hyperparameter("lr", per="step", num_steps=len(BATCHES))]
    check(CASES["residual"], tune)
    check(CASES["residual"], tune, ForwardMode())


# ---- methods -----------------------------------------------------------------------------------------------

NUMBERS = [Hyperparameter("weight_decay"), Hyperparameter("lr")]
WINDOW = 4
SAME = [
    Unrolled(max_snapshots=1),
    Unrolled(max_snapshots=2),
    Unrolled(offload="cpu"),
    Unrolled(max_snapshots=3, offload="cpu"),
    Unrolled(max_graphs=3),
    Unrolled(max_graphs=100),
    Unrolled(max_graphs=2, max_snapshots=2),
    Unrolled(second_order="forward"),
    Unrolled(second_order="forward", max_snapshots=2),
    Unrolled(truncation=len(BATCHES)),
]
TRUNCATED = [
    Unrolled(truncation=WINDOW),
    Unrolled(truncation=WINDOW, max_snapshots=2),
    Unrolled(truncation=WINDOW, offload="cpu"),
    Unrolled(truncation=WINDOW, max_graphs=2),
    Unrolled(truncation=WINDOW, max_graphs=9),
    Unrolled(truncation=WINDOW, second_order="forward"),
]


@pytest.mark.parametrize("kind", SOME)
def test_methods(kind: str) -> None:
    """All ways to the derivative of the same training, each against plain training, and snapshots without a
    difference in any bit."""
    case = CASES[kind]
    unrolled = train(case, make_hyper(case, NUMBERS, REPLAY))
    check(case, NUMBERS, hyper=unrolled)
    check(case, NUMBERS, ForwardMode())
    check(case, NUMBERS, Unrolled(second_order="finite_difference"), rtol=1e-5)
    expected = unrolled.hypergradient(case.val)
    for method in SAME:
        hyper = train(case, make_hyper(case, NUMBERS, method))
        check(case, NUMBERS, hyper=hyper)
        for key, value in hyper.hypergradient(case.val).items():
            exactly = method.second_order == "reverse" and method.max_graphs is None
            torch.testing.assert_close(
                value, expected[key], rtol=0 if exactly else 1e-10, atol=0 if exactly else 1e-13
            )


@pytest.mark.parametrize("kind", SOME)
def test_truncation(kind: str) -> None:
    """The last steps alone count, from the weights, momentum and statistics that training had reached."""
    since = len(BATCHES) - WINDOW
    for method in TRUNCATED:
        check(CASES[kind], NUMBERS, method, since=since)
    method = Unrolled(truncation=WINDOW, second_order="finite_difference")
    check(CASES[kind], NUMBERS, method, since=since, rtol=1e-5)


# ---- validation --------------------------------------------------------------------------------------------


def weights_alone(model: nn.Module, batch: Any) -> Tensor:
    model.eval()
    return torch.stack([p.square().sum() for p in model.parameters()]).sum()


def recalibrated(model: nn.Module, batch: Any) -> Tensor:
    """The statistics are moved on by a pass over the first half of the batch before they are read."""
    x, y = batch
    model(x[:6])
    return evaluated(model, (x[6:], y[6:]))


@pytest.mark.parametrize("method", [REPLAY, ForwardMode(), Unrolled(max_graphs=3)], ids=str)
@pytest.mark.parametrize("kind", ["momentum_none", "called_twice", "residual", "instance_norm_2d"])
def test_validation_that_reads_no_statistics(kind: str, method: Method) -> None:
    """In train mode, or of the weights alone, nothing flows through the statistics."""
    for val_loss in (squares, weights_alone):
        check(validated(kind, val_loss), NUMBERS, method)


@pytest.mark.parametrize("method", [REPLAY, ForwardMode()], ids=str)
@pytest.mark.parametrize("kind", ["batch_norm_1d", "momentum_none", "instance_norm_2d"])
def test_validation_that_moves_the_statistics_and_reads_them(kind: str, method: Method) -> None:
    check(validated(kind, recalibrated), NUMBERS, method)


@cache
def validated(kind: str, val_loss: Callable[[nn.Module, Any], Tensor]) -> Case:
    return replace(CASES[kind], val_loss=val_loss, sensitive=val_loss is recalibrated)


# ---- tensors that the training loss reads before a normalization -------------------------------------------

SCALE = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
SCALED = {
    kind: replace(CASES[kind], scale=SCALE)
    for kind in ("batch_norm_1d", "residual", "aside", "instance_norm_momentum_0.5")
} | {
    "called_twice": replace(CASES["called_twice"], make_model=partial(vectors, momentum=0.5), scale=SCALE),
    "one step": replace(CASES["batch_norm_1d"], scale=SCALE, batches=BATCHES[:1]),
    "adam": replace(CASES["batch_norm_1d"], scale=SCALE, optimizer=ADAM),
    "on the inputs": Case(behind_a_frozen_layer, scale=SCALE),
}


@pytest.mark.parametrize("kind", SCALED)
def test_a_tuned_scale_of_the_inputs(kind: str) -> None:
    """The statistics depend on it directly, and by the weights."""
    for method in (
        REPLAY,
        ForwardMode(),
        Unrolled(max_graphs=3),
        Unrolled(second_order="forward"),
    ):
        check(SCALED[kind], [], method)
    check(SCALED[kind], [], Unrolled(second_order="finite_difference"), rtol=1e-5)


@pytest.mark.parametrize("method", TRUNCATED, ids=str)
def test_a_tuned_scale_with_truncation(method: Method) -> None:
    check(SCALED["called_twice"], [Hyperparameter("lr")], method, since=len(BATCHES) - WINDOW)


# ---- windows, restarts and checkpoints ---------------------------------------------------------------------

KEPT = [
    Unrolled(),
    REPLAY,
    Unrolled(max_snapshots=2),
    Unrolled(truncation=WINDOW),
    Unrolled(offload="cpu"),
    ForwardMode(),
]
every_kept = pytest.mark.parametrize("method", KEPT, ids=str)


@pytest.mark.parametrize(
    "method", [REPLAY, Unrolled(max_graphs=2), Unrolled(max_snapshots=2), ForwardMode()], ids=str
)
@some_cases
def test_a_second_window_begins_with_the_statistics_of_the_first(kind: str, method: Method) -> None:
    case = CASES[kind]
    hyper = train(case, make_hyper(case, NUMBERS, method), range(2))
    hyper.hyper_step(case.val)
    train(case, hyper, range(2, len(BATCHES)))
    check(case, NUMBERS, since=2, hyper=hyper)


@every_kept
@some_cases
def test_hypergradients_on_the_way_change_nothing(kind: str, method: Method) -> None:
    """Statistics are those of plain training, the last hypergradient bitwise that of a run without the
    others, and restart() goes back."""
    case = CASES[kind]
    asked, quiet = make_hyper(case, NUMBERS, method), make_hyper(case, NUMBERS, method)
    start = [buffer.clone() for buffer in asked.model.buffers()]
    for t in range(len(BATCHES)):
        train(case, asked, range(t, t + 1))
        before = [buffer.clone() for buffer in asked.model.buffers()]
        asked.hypergradient(case.val)
        assert all(map(torch.equal, before, asked.model.buffers()))
    train(case, quiet)
    for ours, theirs in zip(asked.model.buffers(), unperturbed(case).buffers[-1]):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    expected = quiet.hypergradient(case.val)
    assert_equal(asked.hypergradient(case.val), expected)
    asked.restart()
    asked.model.train()
    assert all(map(torch.equal, start, asked.model.buffers()))
    assert_equal(train(case, asked).hypergradient(case.val), expected)


@every_kept
@some_cases
def test_a_run_that_is_resumed_in_mid_window(kind: str, method: Method) -> None:
    case = CASES[kind]
    whole, resumed = make_hyper(case, NUMBERS, method), make_hyper(case, NUMBERS, method)
    file = io.BytesIO()
    torch.save(train(case, whole, range(3)).state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for hyper in (whole, resumed):
        train(case, hyper, range(3, len(BATCHES)))
    assert all(map(torch.equal, whole.model.buffers(), resumed.model.buffers()))
    assert_equal(resumed.hypergradient(case.val), whole.hypergradient(case.val))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
