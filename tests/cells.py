"""The table of update rules, options, continuous settings, starts and granularities,
and a reference for each cell.

The reference uses no code of torch_hypergrad's training: central differences of the validation loss after
training with plain ``torch.optim``, extrapolated to step size 0. All perturbed trainings of a row run side by
side, as rows of one matrix of weights. An elementwise optimizer does not care which tensor an entry belongs
to, so all entries that have the same value of the setting form one parameter, in a param group of its own:
that gives a value to each group, each tensor or each single weight. Where torch cannot run such a training
the reference is re-run training by the wrapper (``check_hypergradient``), and the row says why.

A new rule is one file in ``updates/`` and one row here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import accumulate
from types import FunctionType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from torch_hypergrad import ForwardMode, HyperOptimizer, Hyperparameter, Method, Unrolled
from torch_hypergrad.testing import NUM_LEVELS, check_hypergradient, derivative
from torch_hypergrad.updates import muon

GRANULARITIES = ("group", "tensor", "element")
RTOL = 1e-5
SMALLEST = 1e-4
"""A cell must hold a derivative of at least this size, so that it cannot pass by being zero on both sides."""

ROUNDING = 1e-10
"""References are known no better than this: what is zero is a little beside it in differences."""


@dataclass(frozen=True, eq=False)
class Row:
    """One optimizer with one choice of options.

    Args:
        optimizer: its name in ``torch.optim``.
        label: what tells this row from the optimizer's others.
        options: the arguments of the optimizer. Every tunable setting is started from its value here.
        zeros: the settings that are started from 0 too.
        flat: the settings whose hypergradient is zero, and why; ``"momentum=0"`` for a start alone.
        not_in_torch: the settings that torch cannot train with around 0, and why.
        num_steps: the length of training.
        seed: of the weights and batches.
    """

    optimizer: str
    label: str
    options: dict[str, Any]
    zeros: tuple[str, ...] = ()
    flat: dict[str, str] = field(default_factory=dict)
    not_in_torch: dict[str, str] = field(default_factory=dict)
    num_steps: int = 5
    seed: int = 10

    @property
    def name(self) -> str:
        return f"{self.optimizer} {self.label}".strip()

    @property
    def kind(self) -> type[torch.optim.Optimizer]:
        return getattr(torch.optim, self.optimizer)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters. Muon takes matrices only."""
        all_shapes = {"hidden": (3, 2), "bias": (3,), "output": (1, 3)}
        return {k: s for k, s in all_shapes.items() if len(s) == 2 or self.optimizer != "Muon"}

    def value(self, setting: str) -> float:
        """Of a setting such as ``"lr"`` or ``"betas.0"``, in the options."""
        key, _, entry = setting.partition(".")
        return self.options[key][int(entry)] if entry else self.options[key]


# In torch 2.7 and later.
ADAM_DECOUPLES = "decoupled_weight_decay" in inspect.signature(torch.optim.Adam).parameters
ADAM = {"lr": 0.1, "betas": (0.6, 0.8), "eps": 0.05, "weight_decay": 0.1}
ADAM_ZEROS = ("lr", "betas.0", "eps", "weight_decay")
# Rectified from the sixth step on: rho is 4.5 after five steps and 5.4 after six,
# and moves by 0.1 in the differences.
RADAM = {**ADAM, "betas": (0.6, 0.9)}
RMSPROP = {"lr": 0.1, "alpha": 0.8, "eps": 0.05, "weight_decay": 0.1, "momentum": 0.0, "centered": False}
ADAGRAD = {"lr": 0.1, "lr_decay": 0.2, "weight_decay": 0.1, "initial_accumulator_value": 0.3, "eps": 0.05}
SGD = {"lr": 0.1, "momentum": 0.8, "dampening": 0.0, "weight_decay": 0.1}
MUON = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.7, "eps": 1e-3, "ns_steps": 3}
MUON_ZEROS = ("lr", "weight_decay", "momentum")

NEGATIVE_MOMENTUM = "torch leaves a momentum below 0 out"
JUMP = "torch dampens no gradient at momentum 0 and each one at any other, so its training jumps there"
NO_BUFFER = "without momentum there is no buffer to dampen"
ABOVE_EPS = "eps is a floor under the norm of the momentum, which is higher"
TO_SECOND_ORDER = "Nesterov's average is the gradient itself, but for terms of second order in the momentum"
UNCLAMPED = "no step size reaches a bound"
CLAMPED = "every step size that shrinks or grows ends up at a bound"

ROWS = [
    Row("SGD", "", {**SGD, "momentum": 0.0}, ("lr", "weight_decay"), {"dampening": NO_BUFFER}),
    Row("SGD", "momentum", SGD, ("lr", "momentum", "weight_decay")),
    Row("SGD", "dampening", {**SGD, "dampening": 0.3}, ("dampening", "momentum", "weight_decay"),
        not_in_torch={"momentum": JUMP}),
    Row("SGD", "nesterov", {**SGD, "nesterov": True}, ("lr", "momentum", "weight_decay"), {}),
    Row("SGD", "maximize", {**SGD, "lr": 0.05, "dampening": 0.3, "maximize": True}, ("weight_decay",)),
    Row("ASGD", "", {"lr": 0.2, "lambd": 0.3, "alpha": 0.75, "weight_decay": 0.1},
        ("lr", "lambd", "alpha", "weight_decay")),
    Row("ASGD", "maximize",
        {"lr": 0.1, "lambd": 0.5, "alpha": 0.75, "weight_decay": 0.1, "t0": 2, "maximize": True}),
    Row("Adam", "", ADAM, ADAM_ZEROS),
    Row("Adam", "amsgrad", {**ADAM, "amsgrad": True}, ADAM_ZEROS),
    Row("Adam", "maximize", {**ADAM, "maximize": True}, ("weight_decay",)),
    *([Row("Adam", "decoupled", {**ADAM, "decoupled_weight_decay": True}, ADAM_ZEROS)]
      if ADAM_DECOUPLES else []),
    Row("AdamW", "", ADAM, ADAM_ZEROS),
    Row("AdamW", "amsgrad", {**ADAM, "amsgrad": True}, ADAM_ZEROS),
    Row("AdamW", "maximize", {**ADAM, "maximize": True}, ("weight_decay",)),
    Row("NAdam", "", {**ADAM, "momentum_decay": 0.4}, (*ADAM_ZEROS, "momentum_decay")),
    Row("NAdam", "decoupled", {**ADAM, "momentum_decay": 0.4, "decoupled_weight_decay": True},
        ("lr", "weight_decay")),
    Row("NAdam", "maximize", {**ADAM, "momentum_decay": 0.4, "maximize": True}, ("weight_decay",)),
    Row("RAdam", "", RADAM, ADAM_ZEROS, num_steps=8),
    Row("RAdam", "unrectified", {**ADAM, "betas": (0.6, 0.5)}, ("lr", "weight_decay"),
        {"betas.1": "never rectified", "eps": "never rectified"}),
    Row("RAdam", "decoupled", {**RADAM, "decoupled_weight_decay": True}, ("lr", "weight_decay"), num_steps=7),
    Row("RAdam", "maximize", {**RADAM, "lr": 0.05, "maximize": True}, ("weight_decay",), num_steps=7),
    Row("Adamax", "", ADAM, ADAM_ZEROS),
    Row("Adamax", "maximize", {**ADAM, "maximize": True}, ("weight_decay",)),
    Row("Adagrad", "", ADAGRAD, tuple(ADAGRAD)),
    Row("Adagrad", "maximize", {**ADAGRAD, "maximize": True}, ("weight_decay",)),
    Row("Adadelta", "", {"lr": 0.5, "rho": 0.8, "eps": 0.02, "weight_decay": 0.1}, ("lr", "weight_decay")),
    Row("Adadelta", "maximize", {"lr": 0.5, "rho": 0.8, "eps": 0.02, "weight_decay": 0.1, "maximize": True}),
    Row("RMSprop", "", RMSPROP, ("lr", "eps", "weight_decay"), not_in_torch={"momentum": NEGATIVE_MOMENTUM}),
    Row("RMSprop", "centered", {**RMSPROP, "centered": True}, ("weight_decay",),
        not_in_torch={"momentum": NEGATIVE_MOMENTUM}),
    Row("RMSprop", "momentum", {**RMSPROP, "lr": 0.05, "momentum": 0.6}, ("lr", "eps", "weight_decay")),
    Row("RMSprop", "centered momentum", {**RMSPROP, "lr": 0.05, "centered": True, "momentum": 0.6},
        ("weight_decay",)),
    Row("RMSprop", "maximize", {**RMSPROP, "momentum": 0.6, "maximize": True}, ("weight_decay",)),
    Row("Rprop", "", {"lr": 0.2, "etas": (0.5, 1.2), "step_sizes": (1e-3, 10.0)}, (),
        {"step_sizes.0": UNCLAMPED, "step_sizes.1": UNCLAMPED}),
    Row("Rprop", "clamped", {"lr": 0.2, "etas": (0.5, 1.6), "step_sizes": (0.15, 0.22)}, (),
        {"etas.0": CLAMPED, "etas.1": CLAMPED}),
    Row("Rprop", "maximize", {"lr": 0.2, "etas": (0.5, 1.2), "step_sizes": (1e-3, 10.0), "maximize": True},
        (), {"step_sizes.0": UNCLAMPED, "step_sizes.1": UNCLAMPED}),
]  # fmt: skip
if hasattr(torch.optim, "Muon"):
    COEFFICIENTS = {"ns_coefficients": (3.4445, -4.775, 2.0315)}
    ROWS += [
        Row("Muon", "", {**MUON, **COEFFICIENTS, "nesterov": False}, MUON_ZEROS, {"eps": ABOVE_EPS}),
        Row("Muon", "nesterov", {**MUON, **COEFFICIENTS, "adjust_lr_fn": "match_rms_adamw"}, MUON_ZEROS,
            {"eps": ABOVE_EPS, "momentum=0": TO_SECOND_ORDER}),
        Row("Muon", "below eps", {**MUON, **COEFFICIENTS, "eps": 5.0}, MUON_ZEROS,
            {"momentum=0": TO_SECOND_ORDER}),
    ]  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One setting of a row, with a start and a granularity."""

    row: Row
    setting: str
    start: float
    per: str

    def __str__(self) -> str:
        return f"{self.row.name}, {self.setting}={self.start:g} per {self.per}"

    @property
    def in_torch(self) -> bool:
        """Whether plain torch can run the perturbed trainings of the reference."""
        if self.row.optimizer == "Muon" and self.per == "element":
            return False
        return self.start != 0 or self.setting not in self.row.not_in_torch

    def hyperparameter(self) -> Hyperparameter:
        own = self.start == self.row.value(self.setting)
        return Hyperparameter(self.setting, per=self.per, init=None if own else self.start)  # type: ignore[arg-type]


def settings_of(row: Row) -> list[str]:
    """The continuous settings among the options, as the names that ``Hyperparameter`` takes."""
    names = []
    for key, value in row.options.items():
        if isinstance(value, tuple):
            names += [f"{key}.{i}" for i in range(len(value))]
        elif isinstance(value, float):
            names.append(key)
    return names


def starts(row: Row) -> list[tuple[str, float]]:
    """All settings with all their starts."""
    own = [(setting, row.value(setting)) for setting in settings_of(row)]
    return own + [(setting, 0.0) for setting in row.zeros]


WHOLE_MATRIX = ("eps", "ns_coefficients.0", "ns_coefficients.1", "ns_coefficients.2")
"""Settings of Muon that are one number for a matrix, and have no value for each element."""


def granularities(row: Row, setting: str) -> Sequence[str]:
    return GRANULARITIES[:2] if row.optimizer == "Muon" and setting in WHOLE_MATRIX else GRANULARITIES


CELLS = [
    Cell(row, setting, start, per)
    for row in ROWS
    for setting, start in starts(row)
    for per in granularities(row, setting)
]


# ---- the problem: a small network with tanh, in float64 ----------------------------------------------------


class Net(nn.Module):
    """One hidden layer, with weights that the row's seed gives."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        flat = start_weights(row).split([numel(shape) for shape in row.shapes.values()])
        for (name, shape), part in zip(row.shapes.items(), flat):
            self.register_parameter(name, nn.Parameter(part.reshape(shape).clone()))

    def forward(self, x: Tensor) -> Tensor:
        hidden = x @ self.hidden.T
        hidden = hidden + self.bias if "bias" in self._parameters else hidden
        return (hidden.tanh() @ self.output.T).squeeze(-1)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


def numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


@cache
def start_weights(row: Row) -> Tensor:
    generator = torch.Generator().manual_seed(row.seed)
    size = sum(numel(shape) for shape in row.shapes.values())
    return torch.randn(size, generator=generator, dtype=torch.float64)


@cache
def batches(row: Row) -> list[tuple[Tensor, Tensor]]:
    """One for each training step, and one for validation."""
    generator = torch.Generator().manual_seed(100 + row.seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    return [(draw(4, 2), draw(4)) for _ in range(row.num_steps + 1)]


def build(row: Row, tune: Sequence[Hyperparameter], method: Method) -> HyperOptimizer:
    model = Net(row)
    optimizer = row.kind(model.parameters(), **row.options)
    return HyperOptimizer(model, optimizer, loss, tune, method, partial(torch.optim.SGD, lr=0.0))


def hypergradient(
    row: Row, tune: Sequence[Hyperparameter], method: Method
) -> tuple[dict[str, list[float]], float]:
    """For each setting its entries in the order of the weights; and the validation loss."""
    *train, val = batches(row)
    hyper = build(row, tune, method)
    for batch in train:
        hyper.step(batch)
    found: dict[str, list[float]] = {}
    for name, value in hyper.hypergradient(val).items():
        found.setdefault(name.partition("/")[0], []).extend(value.reshape(-1).tolist())
    return found, hyper.validation_loss(val).item()


@contextmanager
def exact() -> Iterator[None]:
    """Double precision throughout: the numbers that torch.optim keeps in the default dtype (``mu_product``
    of NAdam, ``eta`` of ASGD), and the matrices that Muon, here and in torch, orthogonalizes in bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(muon, "NEWTON_SCHULZ_DTYPE", torch.float64):
            if not hasattr(torch.optim, "Muon"):
                yield
                return
            with mock.patch.object(
                torch.optim._muon, "_zeropower_via_newtonschulz", _float64_newton_schulz()
            ):
                yield
    finally:
        torch.set_default_dtype(before)


def _float64_newton_schulz() -> FunctionType:
    """torch's own function with the one dtype in it replaced, which it writes in either way, by version. It
    works in place, so that what is in float64 already has to be copied."""
    scope = dict(vars(torch.optim._muon))
    source = inspect.getsource(torch.optim._muon._zeropower_via_newtonschulz)
    assert source.count("bfloat16") == 1
    exec(source.replace("torch.bfloat16", "torch.float64").replace(".bfloat16()", ".double().clone()"), scope)
    return scope["_zeropower_via_newtonschulz"]


# ---- the reference: many plain torch trainings side by side ------------------------------------------------


def entry_sets(row: Row) -> dict[str, list[range]]:
    """For each granularity, which entries of the flat weights each value belongs to."""
    ends = list(accumulate(numel(shape) for shape in row.shapes.values()))
    tensors = [range(start, end) for start, end in zip([0, *ends], ends)]
    elements = [range(i, i + 1) for i in range(ends[-1])] if row.optimizer != "Muon" else []
    return {"group": [range(ends[-1])], "tensor": tensors, "element": elements}


def width(start: float) -> float:
    """Of the differences: small enough that no maximum, bound or sign in a rule changes over; the smallest
    of the extrapolated steps is a 16th of it, where rounding errors are still below :data:`ROUNDING`."""
    return 0.02 * abs(start) if start else 5e-4


@dataclass(frozen=True)
class Reference:
    """Derivatives for each granularity, in the order of the weights,
    and the validation loss without perturbation."""

    derivatives: dict[str, list[float]]
    val_loss: float


@cache
def references(row: Row) -> dict[tuple[str, float], Reference]:
    """The references of all cells of a row that torch can run, by setting and start."""
    sets = [entries for of_granularity in entry_sets(row).values() for entries in of_granularity]
    wanted = [(s, v) for s, v in starts(row) if v != 0 or s not in row.not_in_torch]
    runs: list[tuple[str, float, range, float]] = []
    for setting, start in wanted:
        shifts = [sign * width(start) / 2**level for level in range(NUM_LEVELS) for sign in (1, -1)]
        runs.append((setting, start, range(0), 0.0))
        runs += [(setting, start, entries, shift) for entries in sets for shift in shifts]
    losses = dict(zip(runs, plain_training(row, runs).tolist()))
    found = {}
    for setting, start in wanted:
        by_granularity = {
            per: [
                derivative(lambda h, e=entries: losses[setting, start, e, h], width(start))[0]  # noqa: B023
                for entries in of_granularity
            ]
            for per, of_granularity in entry_sets(row).items()
        }
        found[setting, start] = Reference(by_granularity, losses[setting, start, range(0), 0.0])
    return found


def plain_training(row: Row, runs: Sequence[tuple[str, float, range, float]]) -> Tensor:
    """The validation losses after training with plain ``torch.optim``, one for each run. A run is a setting,
    its start, and the entries of the weights for which it is shifted by so much."""
    weights = start_weights(row)
    size = len(weights)
    shapes = list(row.shapes.values())
    pieces = entry_sets(row)["tensor"] if row.optimizer == "Muon" else [range(i, i + 1) for i in range(size)]
    members: dict[tuple[str, float], list[list[int]]] = {}
    for r, (setting, start, entries, shift) in enumerate(runs):
        for piece in pieces:
            value = start + shift if piece[0] in entries else start
            members.setdefault((setting, value), []).append([r * size + i for i in piece])
    params: list[list[nn.Parameter]] = []
    places: list[int] = []
    for group in members.values():
        places += [place for piece in group for place in piece]
        if row.optimizer == "Muon":
            starts_at = {piece[0]: shape for piece, shape in zip(pieces, shapes)}
            of_group = [(weights[[p % size for p in piece]], starts_at[piece[0] % size]) for piece in group]
            params.append([nn.Parameter(w.reshape(shape)) for w, shape in of_group])
        else:
            params.append([nn.Parameter(weights[[piece[0] % size for piece in group]])])
    order = torch.tensor(places).argsort()
    optimizer = row.kind([{"params": of_group} for of_group in params], **row.options)
    for group, (setting, value) in zip(optimizer.param_groups, members):
        set_plain(optimizer, group, setting, value)

    def losses(batch: tuple[Tensor, Tensor]) -> Tensor:
        flat = torch.cat([p.reshape(-1) for of_group in params for p in of_group])[order].view(
            len(runs), size
        )
        return batched_loss(
            dict(zip(row.shapes, flat.split([numel(shape) for shape in shapes], dim=1))), batch
        )

    *train, val = batches(row)
    for batch in train:
        optimizer.zero_grad()
        losses(batch).sum().backward()
        optimizer.step()
    return losses(val).detach()


def set_plain(optimizer: torch.optim.Optimizer, group: dict[str, Any], setting: str, value: float) -> None:
    """Gives a param group a value that the constructor might refuse, such as a negative weight decay."""
    key, _, entry = setting.partition(".")
    group[key] = (
        tuple(value if str(i) == entry else old for i, old in enumerate(group[key])) if entry else value
    )
    if setting == "initial_accumulator_value":
        for p in group["params"]:
            optimizer.state[p]["sum"].fill_(value)


def batched_loss(weights: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """:func:`loss` of :class:`Net`, for many networks at once."""
    x, y = batch
    hidden = torch.einsum("rij,kj->rki", weights["hidden"].unflatten(1, (3, 2)), x)
    hidden = hidden + weights["bias"].unsqueeze(1) if "bias" in weights else hidden
    return (torch.einsum("rki,ri->rk", hidden.tanh(), weights["output"]) - y).square().mean(1)


# ---- checks ------------------------------------------------------------------------------------------------


def check(cell: Cell) -> None:
    """Unrolled against the reference, with the graphs of its steps and with every step replayed.

    Raises:
        AssertionError: if they differ, or the cell is empty.
    """
    if not cell.in_torch:
        *train, val = batches(cell.row)
        make = partial(build, cell.row, [cell.hyperparameter()], Unrolled())
        entries = check_hypergradient(make, train, val, rtol=RTOL, num_entries=1)
        assert_not_empty(cell, [entry.computed for entry in entries])
        return
    reference = references(cell.row)[cell.setting, cell.start]
    assert_not_empty(cell, reference.derivatives[cell.per])
    for method in (Unrolled(), Unrolled(memory=0)):
        found, val_loss = hypergradient(cell.row, [cell.hyperparameter()], method)
        difference = abs(val_loss - reference.val_loss)
        assert difference <= 1e-12 * abs(val_loss), "training differs from plain torch"
        assert_close(found[cell.setting], reference.derivatives[cell.per], RTOL, ROUNDING)


def assert_not_empty(cell: Cell, derivatives: Sequence[float]) -> None:
    """Some derivative must be well away from zero, unless the row says why there is none."""
    largest = max(map(abs, derivatives))
    reason = cell.row.flat.get(cell.setting) or cell.row.flat.get(f"{cell.setting}={cell.start:g}")
    if reason is not None:
        assert largest < 1e-9, f"derivative of {largest:g}, though {reason}"
    else:
        assert largest > SMALLEST, f"largest derivative is {largest:g}: the cell shows nothing"


def assert_close(found: Sequence[float], expected: Sequence[float], rtol: float, atol: float = 1e-11) -> None:
    """Each entry to ``rtol``, and those near zero to ``1e-3 * rtol`` of the largest, or ``atol``."""
    assert len(found) == len(expected)
    largest = max(map(abs, expected))
    wrong = [
        f"entry {i}: {f:.10g} instead of {e:.10g}"
        for i, (f, e) in enumerate(zip(found, expected))
        if not abs(f - e) <= rtol * abs(e) + 1e-3 * rtol * largest + atol
    ]
    assert not wrong, "; ".join(wrong)


def check_forward_mode(row: Row, per: str, zero: str | None = None) -> None:
    """ForwardMode with all settings tuned at once, one of them from 0, against Unrolled;
    without one from 0 both against the references, which are for one setting at a time.

    Raises:
        AssertionError: if they differ.
    """
    cells = [Cell(row, s, 0.0 if s == zero else row.value(s), per) for s in settings_of(row)]
    tune = [cell.hyperparameter() for cell in cells]
    unrolled, _ = hypergradient(row, tune, Unrolled())
    forward, _ = hypergradient(row, tune, ForwardMode())
    for cell in cells:
        assert_close(forward[cell.setting], unrolled[cell.setting], 1e-9)
        alone_as_together = cell.setting not in row.flat  # a tuned momentum gives dampening a buffer, for one
        if zero is None and cell.in_torch and alone_as_together:
            assert_close(
                forward[cell.setting],
                references(row)[cell.setting, cell.start].derivatives[per],
                RTOL,
                ROUNDING,
            )
