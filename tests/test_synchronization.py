"""How often Python waits for the device: never in a step, at most once in a hyper step.

Counted on a CPU that is treated as a device: what may be compared at once there is not, and every operation
that would wait for a device is noted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from problems import FROZEN, mse, random_batch
from refusals import INFINITY, NAN, Point, refused, unchanged
from torch_hypergrad import (
    HyperOptimizer,
    Hyperparameter,
    Identity,
    Implicit,
    Neumann,
    NonFiniteError,
    SolverError,
    TrajectoryError,
    Unrolled,
)
from torch_hypergrad.device import readings
from torch_hypergrad.methods import Method

BATCHES = [random_batch(8, 4, seed) for seed in range(4)]
VAL = random_batch(8, 4, seed=100)

WAITING = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim"}
"""Operations whose result Python reads, or whose shape depends on values."""
COPYING = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist}
MAKING = {torch.tensor, torch.as_tensor}
"""These bring a number to a device of a tensor, and wait until it is there."""


class Waits(TorchDispatchMode):
    """Notes operations that wait for a device. Tensors that are on the CPU in any case do not count:
    random number generators' states, and the step counts of torch's optimizers."""

    def __init__(self, on_cpu: Callable[[], list[Tensor]]) -> None:
        super().__init__()
        self.found: list[str] = []
        self._on_cpu = on_cpu

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in WAITING and not self._is_on_cpu(args):
            self.found.append(name)
        if name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.found.append(f"{name} by flags")
        return function(*args, **(kwargs or {}))

    def _is_on_cpu(self, args: Any) -> bool:
        first = args[0]
        return first.dtype == torch.uint8 or first.data_ptr() in {t.data_ptr() for t in self._on_cpu()}


class Copies(TorchFunctionMode):
    """Notes calls that bring values from a device, or to it from memory that is not pinned."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in COPYING and not (
            args and isinstance(args[0], Tensor) and args[0].dtype == torch.uint8
        ):
            self._found.append(function.__name__)
        if function in MAKING and isinstance((kwargs or {}).get("device"), torch.device):
            self._found.append(function.__name__)
        if function in (torch.where, torch.Tensor.where) and any(
            isinstance(arg, (int, float)) for arg in args
        ):
            self._found.append("where with a number")
        return function(*args, **(kwargs or {}))


def waits_of(hyper: HyperOptimizer, call: Callable[[], Any]) -> list[str]:
    """What ``call`` would have waited for."""

    def on_cpu() -> list[Tensor]:
        optimizers = (hyper.optimizer, hyper.hyper_optimizer)
        return [
            state["step"]
            for o in optimizers
            for state in o.state.values()
            if isinstance(state.get("step"), Tensor)
        ]

    waits = Waits(on_cpu)
    with Copies(waits.found), waits:
        call()
    return waits.found


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU as a device: nothing can be compared at once."""
    monkeypatch.setattr(readings, "at_once", lambda tensor: False)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 1)
    ).double()


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
OPTIMIZERS = {
    "sgd": SGD,
    "adam": partial(torch.optim.Adam, lr=0.01, eps=1e-3),
    "adamw": partial(torch.optim.AdamW, lr=0.01, eps=1e-3),
    "nadam": partial(torch.optim.NAdam, lr=0.01, eps=1e-3),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, eps=1e-3),
}
METHODS = [
    Unrolled(),
    Unrolled(max_snapshots=2),
    Unrolled(max_graphs=2),
    Unrolled(second_order="finite_difference"),
    Implicit(Neumann(5, scale=0.1, damping=1.0)),
    Implicit(Neumann(20, damping=3.0)),
    Implicit(Identity(0.1)),
    Implicit(Neumann(5, scale=0.1, damping=1.0), curvature="gauss_newton"),
]


def made(method: Method, optimizer: Any = SGD, **options: Any) -> HyperOptimizer:
    model = network()
    tune = [Hyperparameter("weight_decay", per="element", init=0.1, high=0.1), Hyperparameter("lr", log=True)]
    if isinstance(method, Implicit):
        tune.pop()
    hyper_optimizer = partial(torch.optim.Adam, lr=1e-3)
    return HyperOptimizer(model, optimizer(model.parameters()), mse, tune, method, hyper_optimizer, **options)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_step_never_waits_and_a_hyper_step_waits_once(method: Method) -> None:
    check_waits(made(method))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nor_with_any_optimizer(optimizer: str) -> None:
    check_waits(made(Unrolled(), OPTIMIZERS[optimizer]))


def check_waits(hyper: HyperOptimizer) -> None:
    for _ in range(2):
        for batch in BATCHES:
            assert waits_of(hyper, partial(hyper.step, batch)) == []
        assert waits_of(hyper, partial(hyper.hyper_step, VAL)) == ["tolist"]
    hyper.step(BATCHES[0])
    assert waits_of(hyper, partial(hyper.hypergradient, VAL)) == ["tolist"]


def test_the_counter_sees_what_waits() -> None:
    hyper, x = made(Unrolled()), torch.arange(3.0)
    calls: dict[str, Callable[[], Any]] = {
        "_local_scalar_dense": lambda: float(x[0]),
        "equal": lambda: torch.equal(x, x),
        "tolist": lambda: x.tolist(),
        "cpu": lambda: x.cpu(),
        "where with a number": lambda: torch.where(x > 1, x, 0.0),
        "index by flags": lambda: x[x > 1],
        "nonzero": lambda: x.nonzero(),
        "tensor": lambda: torch.tensor(1.0, device=x.device),
    }
    for name, call in calls.items():
        assert name in waits_of(hyper, call), name


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_reading_late_changes_no_number(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = []
    for late in (False, True):
        if late:
            monkeypatch.setattr(readings, "at_once", lambda tensor: False)
        hyper = made(method)
        torch.manual_seed(1)
        for _ in range(2):
            for batch in BATCHES:
                hyper.step(batch)
            report = hyper.hyper_step(VAL)
        reports.append((vars(report), hyper.values()))
    assert reports[0][0] == reports[1][0]
    assert type(reports[1][0]["val_loss"]) is float
    for name, value in reports[0][1].items():
        assert torch.equal(reports[1][1][name], value), name


# ---- errors that are found at the end ----------------------------------------------------------------------


def recorded(method: Method, *, bad: float | None = None) -> HyperOptimizer:
    """After a hyper step and three steps more, the second of them with a bad target."""
    hyper = made(method)
    hyper.step(BATCHES[3])
    hyper.hyper_step(VAL)
    for t, (x, y) in enumerate(BATCHES[:3]):
        hyper.step((x, y + bad if bad is not None and t == 1 else y))
    return hyper


REPLAYING = [Unrolled(), Unrolled(max_snapshots=2)]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("bad", [INFINITY, NAN])
@pytest.mark.parametrize("method", [*REPLAYING, Implicit(Neumann(5), num_batches=3)], ids=str)
def test_a_training_loss_that_is_not_finite(method: Method, bad: float) -> None:
    hyper = recorded(method, bad=bad)
    for call in (hyper.hypergradient, hyper.hyper_step):
        with unchanged(hyper), refused(NonFiniteError, "The training loss was", str(bad), "training step 3"):
            call(VAL)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_validation_loss_that_is_not_finite(method: Method) -> None:
    hyper = recorded(method)
    x, y = VAL
    for call in (hyper.hypergradient, hyper.hyper_step, hyper.validation_loss):
        with unchanged(hyper), refused(NonFiniteError, "validation loss is inf"):
            call((x, y + INFINITY))
    hyper.step(BATCHES[0])  # nothing is taken for tampering
    assert hyper.hyper_step(VAL).hypergradient_norm > 0


@pytest.mark.usefixtures("device")
def test_writes_through_data_are_found_with_the_step() -> None:
    hyper = recorded(Unrolled())
    hyper.model[0].weight.data.add_(0.1)  # type: ignore[operator, union-attr]
    hyper.step(BATCHES[3])
    with unchanged(hyper), refused(TrajectoryError, "wrote to a parameter before training step 5"):
        hyper.hyper_step(VAL)


@pytest.mark.usefixtures("device")
def test_values_that_leave_the_numbers_are_put_back() -> None:
    model = network()
    enormous = partial(torch.optim.SGD, lr=INFINITY)
    hyper = HyperOptimizer(
        model,
        SGD(model.parameters()),
        mse,
        [Hyperparameter("weight_decay", low=-INFINITY)],
        Unrolled(),
        enormous,
    )
    for batch in BATCHES:
        hyper.step(batch)
    with (
        unchanged(hyper),
        refused(NonFiniteError, "The hyper step moved 'weight_decay/group0' to", "Nothing was changed"),
    ):
        hyper.hyper_step(VAL)
    hyper.step(BATCHES[0])


def test_values_that_leave_the_numbers_are_not_taken_for_tampering_on_a_cpu_either() -> None:
    test_values_that_leave_the_numbers_are_put_back()


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("curvature", "words"),
    [([1.0, -1.0], ["Neumann diverged", "12 terms"]), ([0.0, 0.0], ["Neumann", "has no inverse"])],
)
def test_a_solver_that_failed(curvature: list[float], words: list[str]) -> None:
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    diagonal = torch.tensor(curvature, dtype=torch.float64)
    model = Point(0.5, 0.5)
    hyper = HyperOptimizer(
        model,
        SGD(model.parameters(), momentum=0.0, weight_decay=0.0),
        lambda model, batch: (diagonal * model.w.square()).sum() / 2 - shift @ model.w,
        [("shift", shift)],
        Implicit(Neumann(12)),
        FROZEN,
        val_loss=lambda model, batch: model.w @ torch.ones(2, dtype=torch.float64),
    )
    hyper.step(None)
    for call in (hyper.hypergradient, hyper.hyper_step):
        with unchanged(hyper), refused(SolverError, *words):
            call(None)
