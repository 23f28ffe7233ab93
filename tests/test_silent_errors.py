"""Batches, parameters and calls that once gave a wrong number in silence, or somebody else's error.

Each is now right, or refused by name. Right means equal to differences of a plain torch loop, or to the
hypergradient in the proper way of writing it. Losses are in ``test_silent_errors_in_losses.py``.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from problems import REPLAY, mse, random_batch, tanh_mlp
from refusals import frozen_bytes, refused
from torch_hypergrad import (
    Cholesky,
    ForwardMode,
    HyperOptimizer,
    Hyperparameter,
    Identity,
    Implicit,
    Neumann,
    TrajectoryError,
    Unrolled,
)
from torch_hypergrad.methods import Method
from torch_hypergrad.step.batch import is_as_seen, seen
from torch_hypergrad.testing import derivative

LR, MOMENTUM = 0.1, 0.5
BATCHES = [random_batch(8, 4, seed) for seed in range(4)]
VAL = random_batch(8, 4, seed=100)


def hyper_of(
    model: nn.Module, train_loss: Any, tune: Any, method: Method, *, hyper_lr: float = 0.0, **options: Any
) -> HyperOptimizer:
    """Trains with SGD at the rate and momentum that :func:`differences` takes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    hyper_optimizer = partial(torch.optim.SGD, lr=hyper_lr)
    return HyperOptimizer(model, optimizer, train_loss, tune, method, hyper_optimizer, **options)


def trained(hyper: HyperOptimizer, batches: Sequence[Any]) -> HyperOptimizer:
    torch.manual_seed(1)
    for batch in batches:
        hyper.step(batch)
    return hyper


def differences(
    make: Callable[[], tuple[nn.Module, Any]],
    batches: Sequence[Any],
    val: Any,
    *,
    val_loss: Any = None,
    transform: Callable[[list[Tensor]], list[Tensor]] | None = None,
) -> float:
    """The derivative of the validation loss by lr, from a plain loop that is run again for every lr.

    Args:
        make: the model and its training loss, at the beginning of whatever they draw from.
    """

    def loss_at(shift: float) -> float:
        model, loss = make()
        params = list(model.parameters())
        optimizer = torch.optim.SGD(params, lr=LR + shift, momentum=MOMENTUM)
        torch.manual_seed(1)
        for batch in batches:
            optimizer.zero_grad()
            loss(model, batch).backward()
            if transform is not None:
                for p, g in zip(params, transform([p.grad for p in params])):  # type: ignore[misc]
                    p.grad = g
            optimizer.step()
        return (val_loss or loss)(model, val).item()

    return derivative(loss_at, 0.02 * LR)[0]


def right_or_refused(run: Callable[[], float], reference: float, kind: type[Exception], *words: str) -> None:
    """Holds that ``run`` gives ``reference``, or raises a ``kind`` of error in which each word is found."""
    refusal = None
    try:
        found = run()
    except kind as error:
        refusal = str(error)
    if refusal is None:
        assert found == pytest.approx(reference, rel=1e-5)
    else:
        missing = [word for word in words if re.search(word, refusal) is None]
        assert not missing, f"{missing} not in: {refusal}"


# ---- batches that are no registered pytree -----------------------------------------------------------------


@dataclass
class Example:
    x: Any
    y: Any


@dataclass(frozen=True)
class FrozenExample:
    x: Any
    y: Any


OwnDict, OwnList = type("OwnDict", (dict,), {}), type("OwnList", (list,), {})


def arrays(x: Tensor, y: Tensor) -> tuple[Any, Any]:
    return x.numpy().copy(), y.numpy().copy()


def over_arrays(x: Tensor, y: Tensor) -> tuple[Any, Any]:
    """Tensors whose memory is numpy's, which writes to it without a trace."""
    return torch.from_numpy(x.numpy().copy()), torch.from_numpy(y.numpy().copy())


CONTAINERS: dict[str, Callable[[Any, Any], Any]] = {
    "tuple": lambda x, y: (x, y),
    "dict": lambda x, y: {"x": x, "y": y},
    "list": lambda x, y: [x, y],
    "dataclass": Example,
    "frozen dataclass": FrozenExample,
    "UserDict": lambda x, y: UserDict(x=x, y=y),  # as Hugging Face's BatchEncoding
    "own dict": lambda x, y: OwnDict(x=x, y=y),
    "own list": lambda x, y: OwnList([x, y]),
    "dict in a dataclass": lambda x, y: Example({"x": x}, y),
    "dataclass in a dict": lambda x, y: {"both": Example(x, y)},
    "dict in a UserDict in a list": lambda x, y: [UserDict(both={"x": x, "y": y})],
}


def slots(batch: Any) -> Iterator[tuple[Any, Any]]:
    """Where x and y are: the container that has it, and the key."""
    held: Any = dict(enumerate(batch)) if isinstance(batch, (tuple, list)) else batch
    held = vars(batch) if is_dataclass(batch) else held
    for key, part in held.items():
        yield from [(batch, key)] if isinstance(part, (Tensor, np.ndarray)) else slots(part)


def content(batch: Any) -> list[Any]:
    """x and y of a batch of any kind."""
    return [getattr(part, key) if is_dataclass(part) else part[key] for part, key in slots(batch)]


def refill(batch: Any, leaves: Sequence[Any]) -> None:
    """Puts others into the same container, as a loader that has one of them does."""
    for (part, key), leaf in zip(list(slots(batch)), leaves):
        if is_dataclass(part):
            setattr(part, key, leaf)
        else:
            part[key] = leaf


def loss_of_content(model: nn.Module, batch: Any) -> Tensor:
    """The loss, whatever holds the batch, and whether in tensors or arrays."""
    x, y = map(torch.as_tensor, content(batch))
    return mse(model, (x, y))


RECORDING = [
    REPLAY,
    Unrolled(offload="cpu"),
    Unrolled(max_snapshots=2),
    Implicit(Neumann(3, 0.05), num_batches=3),
]
DECAY = (Hyperparameter("weight_decay", init=0.1),)


def with_dropout(method: Method) -> HyperOptimizer:
    """On batches of any kind."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 1)).double()
    return hyper_of(model, loss_of_content, DECAY, method)


@pytest.mark.parametrize("leaves", [lambda x, y: (x, y), arrays], ids=["tensors", "arrays"])
@pytest.mark.parametrize("kind", [kind for kind in CONTAINERS if kind not in ("tuple", "frozen dataclass")])
@pytest.mark.parametrize("method", RECORDING, ids=str)
def test_a_container_may_be_filled_with_the_next_batch(method: Method, kind: str, leaves: Any) -> None:
    """What was in it at the step is what is replayed."""
    refilled, fresh = with_dropout(method), trained(with_dropout(method), BATCHES)
    container = CONTAINERS[kind](*BATCHES[0])
    torch.manual_seed(1)
    for batch in BATCHES:
        refill(container, leaves(*batch))
        refilled.step(container)
    assert frozen_bytes(refilled.hypergradient(VAL)) == frozen_bytes(fresh.hypergradient(VAL))


CHANGES = [
    pytest.param(lambda x, y: (x.clone(), y), lambda x: x.add_(1.0), id="tensor"),
    pytest.param(arrays, lambda x: np.add(x, 1.0, out=x), id="array"),
    pytest.param(over_arrays, lambda x: np.add(x.numpy(), 1.0, out=x.numpy()), id="tensor over an array"),
]


@pytest.mark.parametrize(("leaves", "change"), CHANGES)
@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("method", RECORDING, ids=str)
def test_a_batch_changed_in_place_is_refused(method: Method, kind: str, leaves: Any, change: Any) -> None:
    hyper = with_dropout(method)
    batches = [CONTAINERS[kind](*leaves(*batch)) for batch in BATCHES]
    trained(hyper, batches)
    change(content(batches[2])[0])
    for call in (hyper.hypergradient, hyper.hyper_step):
        with refused(TrajectoryError, "training step", "changed"):
            call(VAL)


# ---- models and parameters ---------------------------------------------------------------------------------


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of one, in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


EVERY_METHOD = [REPLAY, Unrolled(max_graphs=3), ForwardMode(), Implicit(Identity(0.1))]


@pytest.mark.filterwarnings("ignore")  # torch's own, about what is to come
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("method", EVERY_METHOD, ids=str)
@pytest.mark.parametrize("inside", [False, True])
def test_a_model_for_many_processes_is_refused(method: Method, inside: bool) -> None:
    """torch.autograd.grad calls none of the hooks that average gradients: each process would train alone."""
    model: nn.Module = DistributedDataParallel(tanh_mlp())
    with refused(ValueError, "DistributedDataParallel"):
        hyper_of(nn.Sequential(model) if inside else model, mse, DECAY, method)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("method", EVERY_METHOD, ids=str)
def test_a_sharded_model_is_refused(method: Method) -> None:
    model = tanh_mlp()
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"FSDP|DTensor"):
        hyper_of(model, mse, DECAY, method)


@pytest.mark.parametrize("windows", [0, 1])
@pytest.mark.parametrize("method", EVERY_METHOD, ids=str)
def test_a_parameter_replaced_between_windows_is_refused(method: Method, windows: int) -> None:
    """The old one would be trained, and the new one would not move."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1).double()
    hyper = hyper_of(model, mse, DECAY, method)
    for _ in range(windows):
        hyper.step(BATCHES[0])
        hyper.hyper_step(VAL)
    model.weight = nn.Parameter(torch.zeros_like(model.weight))
    hyper.optimizer.param_groups[0]["params"][0] = model.weight
    with refused(ValueError, "new HyperOptimizer"):
        hyper.step(BATCHES[1])


class Parts(nn.Module):
    """Two parameters cut out of one tensor, or two copies of these."""

    def __init__(self, cut: slice, second: slice, *, copies: bool = False, reads_whole: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        base = torch.randn(7, dtype=torch.float64)
        first, last = base[cut], base[second]
        self.first = nn.Parameter(first.clone() if copies else first)
        self.last = nn.Parameter(last.clone() if copies else last)
        self.whole = base if reads_whole else None

    def forward(self, x: Tensor) -> Tensor:
        first, last = x[:, : len(self.first)] @ self.first, x[:, -len(self.last) :] @ self.last
        scale = 1 if self.whole is None else 1 + 0.1 * self.whole.square().sum()
        return scale * (torch.tanh(first) + torch.sin(last))[:, None]


def of_parts(method: Method, model: nn.Module) -> float:
    hyper = hyper_of(model, mse, [Hyperparameter("lr")], method)
    return trained(hyper, BATCHES).hypergradient(VAL)["lr/group0"].item()


UNROLLING = [
    REPLAY,
    Unrolled(max_snapshots=2),
    Unrolled(max_graphs=3),
    Unrolled(second_order="forward"),
    Unrolled(second_order="finite_difference"),
    ForwardMode(),
]
APART = slice(0, 3), slice(3, 7)


@pytest.mark.parametrize("method", UNROLLING, ids=str)
def test_parameters_that_are_parts_of_one_storage(method: Method) -> None:
    reference = differences(lambda: (Parts(*APART, copies=True), mse), BATCHES, VAL)
    right_or_refused(lambda: of_parts(method, Parts(*APART)), reference, ValueError, "memory|storage")


@pytest.mark.parametrize("method", UNROLLING, ids=str)
def test_a_loss_that_reads_what_parameters_are_parts_of(method: Method) -> None:
    """It moves with the parameters, and autograd does not see it."""
    reference = differences(lambda: (Parts(*APART, reads_whole=True), mse), BATCHES, VAL)
    run = partial(of_parts, method, Parts(*APART, reads_whole=True))
    right_or_refused(run, reference, ValueError, "memory|storage")


@pytest.mark.parametrize("method", EVERY_METHOD, ids=str)
def test_parameters_that_overlap_are_refused(method: Method) -> None:
    with pytest.raises(ValueError, match=r"memory|storage|overlap"):
        hyper_of(Parts(slice(0, 4), slice(3, 7)), mse, DECAY, method)


def by_scale(method: Method, scale: Tensor) -> Tensor:
    def train_loss(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return (model(x * scale.flatten()[:4]) - y * scale.flatten()[-1]).square().mean()

    hyper = hyper_of(tanh_mlp(), train_loss, [("scale", scale)], method, val_loss=mse, hyper_lr=0.1)
    found = trained(hyper, BATCHES).hypergradient(VAL)["scale"]
    before = scale.detach().clone()
    hyper.hyper_step(VAL)
    torch.testing.assert_close(scale.detach(), before - 0.1 * found)
    return found


METHODS_OF_TENSORS = [ForwardMode(), REPLAY, Implicit(Neumann(5, 0.05))]


@pytest.mark.parametrize("method", METHODS_OF_TENSORS, ids=str)
def test_a_tuned_tensor_that_is_not_contiguous(method: Method) -> None:
    start = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = by_scale(method, start.t().contiguous().requires_grad_())
    found = by_scale(method, start.t().requires_grad_())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("method", METHODS_OF_TENSORS, ids=str)
def test_a_tuned_tensor_that_is_expanded(method: Method) -> None:
    """Its four numbers are one in memory."""
    expected = by_scale(method, torch.ones(4, dtype=torch.float64, requires_grad=True))

    def run() -> float:
        found = by_scale(method, torch.ones(1, dtype=torch.float64).expand(4).requires_grad_())
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
        return found[0].item()

    right_or_refused(run, expected[0].item(), ValueError, "expand|memory")


# ---- calls -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [0, 2])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("method", [REPLAY, Unrolled(max_graphs=3)], ids=str)
def test_a_copy_is_refused(method: Method, duplicate: Callable[[Any], Any], num_steps: int) -> None:
    """It would share the loss's model, or lose the recorded window."""
    hyper = trained(hyper_of(tanh_mlp(), mse, DECAY, method), BATCHES[:num_steps])
    with refused(TypeError, "state_dict"):
        duplicate(hyper)


# ---- several validation batches ----------------------------------------------------------------------------

PARTS = [(VAL[0][i : i + 3], VAL[1][i : i + 3]) for i in (0, 3, 6)]
SIZES = [3, 3, 2]
ON_BATCHES = [*METHODS_OF_TENSORS, Unrolled(max_graphs=3), Implicit(Identity(0.1))]


def mean_of_losses(model: nn.Module, batches: Any) -> Tensor:
    return torch.stack([mse(model, batch) for batch in batches]).mean()


def ready(method: Method, val_loss: Any = mse) -> HyperOptimizer:
    return trained(hyper_of(tanh_mlp(), mse, DECAY, method, val_loss=val_loss, hyper_lr=0.1), BATCHES)


def assert_all_equal(
    on_batches: HyperOptimizer, options: dict[str, Any], on_one: HyperOptimizer, val: Any
) -> None:
    """All three calls, and the values after a hyper step."""
    close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-14)
    close(on_batches.validation_loss(**options), on_one.validation_loss(val))
    close(on_batches.hypergradient(**options), on_one.hypergradient(val))
    found, expected = on_batches.hyper_step(**options), on_one.hyper_step(val)
    assert found.val_loss == pytest.approx(expected.val_loss, rel=1e-10)
    assert found.hypergradient_norm == pytest.approx(expected.hypergradient_norm, rel=1e-10)
    close(on_batches.values(), on_one.values())


@pytest.mark.parametrize("method", ON_BATCHES, ids=str)
def test_batches_weighted_by_their_sizes_are_one_batch(method: Method) -> None:
    assert_all_equal(ready(method), {"batches": PARTS, "sizes": SIZES}, ready(method), VAL)


@pytest.mark.parametrize("method", ON_BATCHES, ids=str)
def test_batches_without_sizes_weigh_the_same(method: Method) -> None:
    assert_all_equal(ready(method), {"batches": PARTS}, ready(method, mean_of_losses), PARTS)


def test_batches_of_a_loader() -> None:
    loader = DataLoader(TensorDataset(*VAL), batch_size=3)
    assert_all_equal(ready(REPLAY), {"batches": loader, "sizes": SIZES}, ready(REPLAY), VAL)


BAD_BATCHES: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    ((VAL,), {"batches": PARTS}, "batches"),
    ((), {}, "batches"),
    ((), {"batches": []}, "empty|batches"),
    ((), {"batches": DataLoader(TensorDataset(VAL[0][:0], VAL[1][:0]))}, "empty|batches"),
    ((), {"batches": PARTS, "sizes": [3, 3]}, "sizes"),
    ((), {"batches": PARTS, "sizes": [3, 3, 2, 1]}, "sizes"),
    ((), {"batches": PARTS, "sizes": [3, 0, 2]}, "sizes"),
    ((), {"batches": PARTS, "sizes": [3, -1, 2]}, "sizes"),
    ((VAL,), {"sizes": [8]}, "sizes"),
]


@pytest.mark.parametrize("call", ["validation_loss", "hypergradient", "hyper_step"])
@pytest.mark.parametrize(("given", "options", "pattern"), BAD_BATCHES)
def test_batches_that_do_not_fit(
    call: str, given: tuple[Any, ...], options: dict[str, Any], pattern: str
) -> None:
    hyper = ready(REPLAY)
    with pytest.raises((TypeError, ValueError), match=pattern):
        getattr(hyper, call)(*given, **options)


@pytest.mark.parametrize("method", RECORDING, ids=str)
def test_a_batch_may_be_looked_at_through_numpy(method: Method) -> None:
    """Which shares its memory from then on. Written to through it, it is another batch."""
    hyper, other = with_dropout(method), trained(with_dropout(method), BATCHES)
    batches = [(x.clone(), y.clone()) for x, y in BATCHES]
    trained(hyper, batches)
    views = [x.numpy() for x, _ in batches]
    assert frozen_bytes(hyper.hypergradient(VAL)) == frozen_bytes(other.hypergradient(VAL))
    views[2][...] += 1.0
    with refused(TrajectoryError, "training step", "changed"):
        hyper.hypergradient(VAL)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.complex64, torch.uint8, torch.bool, torch.int64]
)
def test_batches_of_every_type_are_watched(dtype: torch.dtype) -> None:
    for number in (0, 1, 17, 5000):
        x = torch.ones(number, dtype=dtype)
        before = seen((x, {"x": x}))
        assert is_as_seen((x, {"x": x}), before)
        if number:
            x.data.zero_()  # leaves no trace but the values
            assert not is_as_seen((x, {"x": x}), before)


@pytest.mark.parametrize("way", ["step", "record"])
def test_a_tuned_value_that_is_copied_into_the_group_is_refused(way):
    """As a scheduler's factor it would count twice: a decay of 0.1 would be taken for one of 0.025."""
    torch.manual_seed(0)
    batch = torch.randn(30, 5, dtype=torch.float64), torch.randn(30, 1, dtype=torch.float64)
    model = torch.nn.Linear(5, 1, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.4)
    hyper = HyperOptimizer(
        model,
        optimizer,
        lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
        tune=[Hyperparameter("weight_decay", init=0.1, low=0.0)],
        method=Implicit(Cholesky()),
        hyper_optimizer=partial(torch.optim.SGD, lr=1e-3),
    )
    take = getattr(hyper, way)
    take(batch)
    optimizer.param_groups[0]["weight_decay"] = float(hyper.values()["weight_decay/group0"])
    if way == "record":
        take(batch)
        take = hyper.hypergradient
    with pytest.raises(ValueError, match=r"set to the tuned value, 0\.1\..*count it twice"):
        take(batch)
    optimizer.param_groups[0]["weight_decay"] = 0.2  # as a schedule of one's own may: half of the tuned value
    hyper.begin_window()
    getattr(hyper, way)(batch)
    assert hyper.hypergradient(batch)["weight_decay/group0"].isfinite()
