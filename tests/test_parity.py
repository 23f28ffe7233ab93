"""With nothing tuned away from its value, training is that of plain ``torch.optim``.

Reference: the same steps with the optimizer itself. Weights, buffers and the optimizer's state,
in torch's own format, are compared bitwise wherever torch's arithmetic is ours. It is not in two cases,
which are compared to 1e-12 in float64: with a tuned setting, a tensor where torch has a number;
and with ``foreach=True`` for the three optimizers in ``REORDERED``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from cells import ADAM_DECOUPLES
from problems import REPLAY
from torch_hypergrad import HyperOptimizer, Hyperparameter, Unrolled

NUM_STEPS = 12
REORDERED = {"ASGD", "NAdam", "RAdam"}
"""Their foreach implementation in torch multiplies in another order than their single-tensor one,
which is ours."""

Batch = tuple[Tensor, Tensor]


def grid(**axes: Sequence[Any]) -> list[dict[str, Any]]:
    """All combinations of one value for each option."""
    return [dict(zip(axes, values)) for values in product(*axes.values())]


DECAYS = [0.0, 0.1]
DECOUPLING = {"decoupled_weight_decay": [False, True]} if ADAM_DECOUPLES else {}
OPTIONS = {
    "SGD": [
        *grid(lr=[0.1], momentum=[0.0, 0.9], dampening=[0.0, 0.3], weight_decay=DECAYS),
        *grid(lr=[0.1], momentum=[0.9], weight_decay=DECAYS, nesterov=[True]),
    ],
    "ASGD": grid(lr=[0.1], lambd=[1e-4, 0.1], t0=[1e6, 3], weight_decay=DECAYS),
    "Adam": grid(lr=[0.01], amsgrad=[False, True], weight_decay=DECAYS, **DECOUPLING),
    "AdamW": grid(lr=[0.01], amsgrad=[False, True], weight_decay=DECAYS),
    "NAdam": grid(
        lr=[0.01], decoupled_weight_decay=[False, True], weight_decay=DECAYS, momentum_decay=[4e-3, 0.3]
    ),
    "RAdam": grid(
        lr=[0.01], decoupled_weight_decay=[False, True], weight_decay=DECAYS, betas=[(0.9, 0.999), (0.9, 0.5)]
    ),
    "Adamax": grid(lr=[0.01], weight_decay=DECAYS),
    "Adagrad": grid(
        lr=[0.01], weight_decay=DECAYS, lr_decay=[0.0, 0.1], initial_accumulator_value=[0.0, 0.2]
    ),
    "Adadelta": grid(lr=[1.0], weight_decay=DECAYS, rho=[0.9, 0.5]),
    "RMSprop": grid(lr=[0.01], weight_decay=DECAYS, centered=[False, True], momentum=[0.0, 0.5]),
    "Rprop": grid(lr=[0.01], step_sizes=[(1e-6, 50), (1e-2, 2e-2)]),
}
COMBINATIONS = [(name, options) for name, of_optimizer in OPTIONS.items() for options in of_optimizer]
METHODS = {"graphs": Unrolled(), "replay": REPLAY}
"""The first computes gradients with their graphs in training; the second takes plain steps."""

VARIANTS = [(name, options, method) for name, options in COMBINATIONS for method in METHODS]
# maximize and foreach with one method each, in a chequerboard over the options: a neighbor has the other
for place, (name, options) in enumerate(COMBINATIONS):
    first, second = list(METHODS)[:: 1 if place.bit_count() % 2 else -1]
    VARIANTS += [
        (name, {**options, "maximize": True}, first),
        (name, {**options, "foreach": True}, second),
    ]
if hasattr(torch.optim, "Muon"):
    matrices = grid(
        lr=[0.01], weight_decay=DECAYS, nesterov=[False, True], adjust_lr_fn=["original", "match_rms_adamw"]
    )
    COMBINATIONS += [("Muon", options) for options in matrices]
    VARIANTS += [("Muon", options, method) for options in matrices for method in METHODS]


def name_of(part: object) -> str:
    if isinstance(part, dict):
        return ",".join(f"{key}={value}" for key, value in part.items())
    return part if isinstance(part, str) else str(part).removeprefix("torch.")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Pair:
    """The same model and optimizer twice, one for plain steps and one to be wrapped.

    Args:
        make_model: makes the model, the same each time.
        make_optimizer: makes the optimizer of a model.
        loss: the training loss of a model on a batch.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        loss: Callable[[nn.Module, Any], Tensor],
    ) -> None:
        self.plain, self.model = make_model(), make_model()
        self.plain_optimizer, self.optimizer = make_optimizer(self.plain), make_optimizer(self.model)
        self.loss = loss

    def wrap(
        self, *tune: Hyperparameter, grad_transform: Any = None, method: Unrolled = METHODS["graphs"]
    ) -> HyperOptimizer:
        """Tunes the settings, or nothing but a tensor in the loss, which is zero."""
        zero = torch.zeros((), dtype=next(self.model.parameters()).dtype, requires_grad=True)
        used = [("shift", zero)] if not tune else list(tune)

        def train_loss(model: nn.Module, batch: Any) -> Tensor:
            loss = self.loss(model, batch)
            return loss if tune else loss + zero

        make = partial(torch.optim.SGD, lr=0.0)
        return HyperOptimizer(
            self.model,
            self.optimizer,
            train_loss,
            used,
            method,
            make,
            val_loss=self.loss,
            grad_transform=grad_transform,
        )

    def plain_step(self, batch: Any, clip: Callable[[list[nn.Parameter]], Any] | None = None) -> Tensor:
        return plain_step(self.plain, self.plain_optimizer, self.loss, batch, clip)

    def assert_equal(self, rtol: float = 0.0) -> None:
        """Weights, buffers and the optimizer's state; bitwise with ``rtol=0``."""
        ours = dict(self.model.state_dict())
        for key, value in self.plain.state_dict().items():
            assert_equal_tensors(ours.pop(key), value, rtol, key)
        assert not ours
        theirs, mine = self.plain_optimizer.state_dict(), self.optimizer.state_dict()
        assert mine["param_groups"] == theirs["param_groups"]
        assert_equal_states(mine["state"], theirs["state"], rtol)


def plain_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    clip: Callable[[list[nn.Parameter]], Any] | None = None,
) -> Tensor:
    optimizer.zero_grad()
    value = loss(model, batch)
    value.backward()
    if clip is not None:
        clip(list(model.parameters()))
    optimizer.step()
    return value.detach()


def assert_equal_tensors(found: Any, expected: Any, rtol: float, what: str) -> None:
    assert type(found) is type(expected), what
    if expected is None:
        return
    assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device), what
    if rtol == 0:
        assert torch.equal(found, expected), f"{what} differs by {(found - expected).abs().max():.1e}"
    else:
        largest = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(
            found, expected, rtol=rtol, atol=rtol * largest, msg=lambda m: f"{what}: {m}"
        )


def assert_equal_states(found: dict[int, Any], expected: dict[int, Any], rtol: float) -> None:
    assert found.keys() == expected.keys()
    for i in expected:
        assert found[i].keys() == expected[i].keys(), i
        for key in expected[i]:
            assert_equal_tensors(found[i][key], expected[i][key], rtol, f"state of parameter {i}, {key}")


def network(*, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, 2, bias=bias))


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


def regression_batches(num: int = NUM_STEPS, inputs: int = 4, outputs: int = 2) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, inputs, generator=generator), torch.randn(6, outputs, generator=generator))
        for _ in range(num)
    ]


def optimizer_maker(name: str, options: dict[str, Any]) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: getattr(torch.optim, name)(model.parameters(), **options)


def network_pair(name: str, options: dict[str, Any], dtype: torch.dtype) -> Pair:
    def make_model() -> nn.Module:
        return network(bias=name != "Muon").to(dtype)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return squared_error(model, (batch[0].to(dtype), batch[1].to(dtype)))

    return Pair(make_model, optimizer_maker(name, options), loss)


def run_both(pair: Pair, hyper: HyperOptimizer, batches: Sequence[Any]) -> None:
    for batch in batches:
        plain_loss = pair.plain_step(batch)
        loss = hyper.step(batch)
        assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-4)


# ---- the grid of options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options", "method"), VARIANTS, ids=name_of)
def test_training_with_all_settings_untuned_is_bitwise_that_of_torch(
    name: str, options: dict[str, Any], method: str
) -> None:
    with default_dtype(torch.float64):
        pair = network_pair(name, options, torch.float64)
        run_both(pair, pair.wrap(method=METHODS[method]), regression_batches())
        pair.assert_equal(rtol=1e-12 if options.get("foreach") and name in REORDERED else 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize(("name", "options"), COMBINATIONS, ids=name_of)
def test_it_is_bitwise_the_same_with_float32_as_the_default_dtype(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    pair = network_pair(name, options, dtype)
    run_both(pair, pair.wrap(), regression_batches())
    pair.assert_equal()


def harmless(name: str, options: dict[str, Any], per: Any) -> list[Hyperparameter]:
    """Learning rate and weight decay. ASGD's state holds ``eta``, made of the learning rate:
    one number for a tensor in torch's format, which has no place for one for each element."""
    settings = ["weight_decay"] if (name, per) == ("ASGD", "element") else ["lr", "weight_decay"]
    return [Hyperparameter(setting, per=per) for setting in settings if setting in options]


@pytest.mark.parametrize(
    ("name", "options", "per"),
    [(name, options, per) for name, options in COMBINATIONS for per in ("group", "tensor", "element")],
    ids=name_of,
)
def test_settings_tuned_from_their_own_value_leave_training_as_it_is(
    name: str, options: dict[str, Any], per: Any
) -> None:
    with default_dtype(torch.float64):
        pair = network_pair(name, options, torch.float64)
        tune = harmless(name, options, per)
        run_both(pair, pair.wrap(*tune), regression_batches())
        pair.assert_equal(rtol=1e-12)


@pytest.mark.parametrize("per", ["group", "tensor", "element"])
@pytest.mark.parametrize(
    ("name", "options"), [(name, of_optimizer[-1]) for name, of_optimizer in OPTIONS.items()], ids=name_of
)
def test_tuned_settings_in_float32_leave_training_as_it_is(
    name: str, options: dict[str, Any], per: Any
) -> None:
    pair = network_pair(name, options, torch.float32)
    tune = harmless(name, options, per)
    run_both(pair, pair.wrap(*tune), regression_batches())
    pair.assert_equal(rtol=1e-5)


# ---- param groups, parameters and gradients of every kind --------------------------------------------------

TWO_GROUPS = {
    "SGD": [
        {"lr": 0.1, "momentum": 0.0},
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ],
    "ASGD": [{"lr": 0.1, "t0": 3}, {"lr": 0.05, "lambd": 0.1, "maximize": True, "foreach": False}],
    "Adam": [{"lr": 0.01}, {"lr": 0.02, "betas": (0.5, 0.9), "amsgrad": True}],
    "AdamW": [{"lr": 0.01, "weight_decay": 0.0}, {"lr": 0.02, "weight_decay": 0.1}],
    "NAdam": [
        {"lr": 0.01},
        {"lr": 0.02, "momentum_decay": 0.3, "decoupled_weight_decay": True, "weight_decay": 0.1},
    ],
    "RAdam": [{"lr": 0.01}, {"lr": 0.02, "betas": (0.5, 0.6)}],
    "Adamax": [{"lr": 0.01}, {"lr": 0.02, "eps": 0.1}],
    "Adagrad": [{"lr": 0.01}, {"lr": 0.02, "lr_decay": 0.1, "initial_accumulator_value": 0.5}],
    "Adadelta": [{"lr": 1.0}, {"lr": 0.5, "rho": 0.5}],
    "RMSprop": [{"lr": 0.01}, {"lr": 0.02, "centered": True, "momentum": 0.5, "foreach": False}],
    "Rprop": [{"lr": 0.01}, {"lr": 0.02, "etas": (0.4, 1.5)}],
}


def in_two_groups(name: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        first, *rest = model.parameters()
        groups = [{"params": [first], **TWO_GROUPS[name][0]}, {"params": rest, **TWO_GROUPS[name][1]}]
        return getattr(torch.optim, name)(groups)

    return make


@pytest.mark.parametrize("tuned", [False, True], ids=["untuned", "tuned"])
@pytest.mark.parametrize("name", TWO_GROUPS)
def test_groups_with_settings_of_their_own(name: str, tuned: bool) -> None:
    with default_dtype(torch.float64):
        pair = Pair(network, in_two_groups(name), squared_error)
        run_both(pair, pair.wrap(*[Hyperparameter("lr", per="tensor")] * tuned), regression_batches())
        pair.assert_equal(rtol=1e-12 * tuned)


OF_EACH_FAMILY = [("SGD", {"lr": 0.1, "momentum": 0.9}), ("Adam", {"lr": 0.01, "amsgrad": True}),
                  ("NAdam", {"lr": 0.01}), ("ASGD", {"lr": 0.1}),
                  ("RMSprop", {"lr": 0.01, "centered": True, "momentum": 0.5}),
                  ("Rprop", {"lr": 0.01}), ("Adagrad", {"lr": 0.1})]  # fmt: skip


class TwoHeads(nn.Module):
    """Uses one head or the other, as the batch says, so that a step gives some parameters no gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.left, self.right = nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor, head: str) -> Tensor:
        return self.get_submodule(head)(self.body(x).tanh())


def head_error(model: nn.Module, batch: Any) -> Tensor:
    x, y, head = batch
    return (model(x, head) - y).square().mean()


@pytest.mark.parametrize("per", [None, "group", "tensor", "element"])
@pytest.mark.parametrize(("name", "options"), OF_EACH_FAMILY, ids=name_of)
def test_parameters_without_gradient_are_skipped_with_their_step_counts(
    name: str, options: dict[str, Any], per: Any
) -> None:
    heads = ["left", "left", "right", "left", "right", "right", "right"]
    with default_dtype(torch.float64):
        pair = Pair(TwoHeads, optimizer_maker(name, options), head_error)
        setting = "weight_decay" if "weight_decay" in pair.optimizer.defaults else "lr"
        tune = [] if per is None else [Hyperparameter(setting, per=per)]
        run_both(
            pair, pair.wrap(*tune), [(*batch, head) for batch, head in zip(regression_batches(7), heads)]
        )
        pair.assert_equal(rtol=0.0 if per is None else 1e-12)
        if "step" in pair.optimizer.state[pair.model.left.weight]:
            assert pair.optimizer.state[pair.model.left.weight]["step"] == heads.count("left")
            assert pair.optimizer.state[pair.model.right.weight]["step"] == heads.count("right")


@pytest.mark.parametrize(("name", "options"), OF_EACH_FAMILY, ids=name_of)
def test_frozen_parameters_stay(name: str, options: dict[str, Any]) -> None:
    def make_model() -> nn.Module:
        model = network()
        model[0].requires_grad_(False)
        return model

    pair = Pair(make_model, optimizer_maker(name, options), squared_error)
    frozen = pair.model[0].weight.clone()
    run_both(pair, pair.wrap(), regression_batches())
    pair.assert_equal()
    assert torch.equal(pair.model[0].weight, frozen)


@pytest.mark.parametrize(("name", "options"), OF_EACH_FAMILY, ids=name_of)
def test_parameters_frozen_and_thawed_between_steps(name: str, options: dict[str, Any]) -> None:
    pair = Pair(network, optimizer_maker(name, options), squared_error)
    hyper = pair.wrap()
    for trains, batches in zip((True, False, True), (regression_batches(3),) * 3):
        pair.plain[0].requires_grad_(trains)
        pair.model[0].requires_grad_(trains)
        run_both(pair, hyper, batches)
    pair.assert_equal()


class Tied(nn.Module):
    """A decoder that shares the encoder's weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x).tanh())


@pytest.mark.parametrize(("name", "options"), OF_EACH_FAMILY, ids=name_of)
def test_tied_parameters_are_one(name: str, options: dict[str, Any]) -> None:
    pair = Pair(Tied, optimizer_maker(name, options), squared_error)
    run_both(pair, pair.wrap(), regression_batches(outputs=4))
    pair.assert_equal()
    assert pair.model.decoder.weight is pair.model.encoder.weight


class OddLayouts(nn.Module):
    """Parameters that are a single number, transposed, sliced with gaps, channels-last and empty."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.transposed = nn.Parameter(torch.randn(2, 4, generator=generator).T)
        self.gaps = nn.Parameter(torch.randn(4, 6, generator=generator)[:, ::3])
        conv = nn.Parameter(torch.randn(3, 2, 2, 2, generator=generator))
        self.conv = nn.Parameter(conv.detach().to(memory_format=torch.channels_last))
        self.empty = nn.Parameter(torch.empty(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        image = nn.functional.conv2d(x.view(6, 2, 2, 1).expand(6, 2, 2, 2), self.conv).mean()
        return self.scale * (x @ self.transposed).tanh() + x @ self.gaps + image + self.empty.sum()


@pytest.mark.parametrize("per", [None, "element"])
@pytest.mark.parametrize(("name", "options"), OF_EACH_FAMILY, ids=name_of)
def test_parameters_of_any_shape_and_memory_layout(name: str, options: dict[str, Any], per: Any) -> None:
    with default_dtype(torch.float64):
        pair = Pair(OddLayouts, optimizer_maker(name, options), squared_error)
        setting = "weight_decay" if "weight_decay" in pair.optimizer.defaults else "lr"
        tune = [] if per is None else [Hyperparameter(setting, per=per)]
        strides = [p.stride() for p in pair.model.parameters()]
        run_both(pair, pair.wrap(*tune), regression_batches())
        pair.assert_equal(rtol=0.0 if per is None else 1e-12)
        assert [p.stride() for p in pair.model.parameters()] == strides


def test_buffers_are_those_of_the_plain_loop() -> None:
    def make_model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)), nn.BatchNorm1d(5), nn.Linear(5, 2)
        )

    pair = Pair(make_model, optimizer_maker("Adam", {"lr": 0.01}), squared_error)
    hyper = pair.wrap()
    run_both(pair, hyper, regression_batches())
    pair.assert_equal()
    hyper.hypergradient(regression_batches(1)[0])
    pair.assert_equal()
    assert pair.model[1].num_batches_tracked == NUM_STEPS


@pytest.mark.parametrize("options", [{"fused": True}, {"lr": torch.tensor(0.01)}], ids=name_of)
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_other_implementations_in_torch_and_tensor_learning_rates(name: str, options: dict[str, Any]) -> None:
    """They multiply in another order, so equal to rounding errors; the state has the very same format."""
    pair = Pair(network, optimizer_maker(name, {"lr": 0.01, **options}), squared_error)
    run_both(pair, pair.wrap(), regression_batches())
    pair.assert_equal(rtol=1e-5)


# ---- schedulers and clipping -------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.3),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=NUM_STEPS + 1),
    "warm-up from 0": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 5)),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=NUM_STEPS),
    "chain": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(optimizer, total_iters=5), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
}


@pytest.mark.parametrize("tuned", [(), ("lr",), ("weight_decay",), ("lr", "momentum")], ids=name_of)
@pytest.mark.parametrize("created", ["before", "after"])
@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_lr_schedulers_compose(name: str, kind: str, created: str, tuned: tuple[str, ...]) -> None:
    options = {"lr": 0.1, "momentum": 0.9} if name == "SGD" else {"lr": 0.01}
    names = ["betas.0" if setting == "momentum" and name == "AdamW" else setting for setting in tuned]
    with default_dtype(torch.float64):
        pair = Pair(network, optimizer_maker(name, options), squared_error)
        plain_scheduler = SCHEDULERS[kind](pair.plain_optimizer)
        scheduler = SCHEDULERS[kind](pair.optimizer) if created == "before" else None
        hyper = pair.wrap(*map(Hyperparameter, names))
        scheduler = SCHEDULERS[kind](pair.optimizer) if scheduler is None else scheduler
        for batch in regression_batches():
            run_both(pair, hyper, [batch])
            plain_scheduler.step()
            scheduler.step()
        pair.assert_equal(rtol=1e-12 if tuned else 0.0)
        assert scheduler.get_last_lr() == plain_scheduler.get_last_lr()


def clipped_by_norm(grads: list[Tensor], max_norm: float = 0.6) -> list[Tensor]:
    """What ``clip_grad_norm_`` does."""
    norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
    return [g * (max_norm / (norm + 1e-6)).clamp(max=1.0) for g in grads]


@pytest.mark.parametrize(("name", "options"), OF_EACH_FAMILY, ids=name_of)
def test_clipping_by_norm(name: str, options: dict[str, Any]) -> None:
    norms = []
    with default_dtype(torch.float64):
        pair = Pair(network, optimizer_maker(name, options), squared_error)
        hyper = pair.wrap(grad_transform=clipped_by_norm)
        for batch in regression_batches():
            pair.plain_step(batch, lambda params: norms.append(nn.utils.clip_grad_norm_(params, 0.6)))
            hyper.step(batch)
        pair.assert_equal(rtol=1e-10)
    assert min(norms) < 0.6 < max(norms), "clipping must do something at some steps and nothing at others"


@pytest.mark.parametrize(("name", "options"), OF_EACH_FAMILY, ids=name_of)
def test_clipping_by_value(name: str, options: dict[str, Any]) -> None:
    pair = Pair(network, optimizer_maker(name, options), squared_error)
    hyper = pair.wrap(grad_transform=lambda grads: [g.clamp(-0.1, 0.1) for g in grads])
    for batch in regression_batches():
        pair.plain_step(batch, lambda params: nn.utils.clip_grad_value_(params, 0.1))
        hyper.step(batch)
    pair.assert_equal()


# ---- wrapping and unwrapping -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), COMBINATIONS[::3], ids=name_of)
def test_wrapping_in_the_middle_of_training_and_unwrapping_again(name: str, options: dict[str, Any]) -> None:
    pair = network_pair(name, options, torch.float32)
    batches = regression_batches(15)
    for batch in batches:
        pair.plain_step(batch)
    for batch in batches[:5]:
        plain_step(pair.model, pair.optimizer, pair.loss, batch)
    hyper = pair.wrap()
    for batch in batches[5:10]:
        hyper.step(batch)
    for batch in batches[10:]:
        plain_step(pair.model, pair.optimizer, pair.loss, batch)
    pair.assert_equal()


@pytest.mark.parametrize(("name", "options"), COMBINATIONS[1::3], ids=name_of)
def test_the_optimizer_state_loads_into_a_plain_optimizer(name: str, options: dict[str, Any]) -> None:
    pair = network_pair(name, options, torch.float32)
    batches = regression_batches(10)
    run_both(pair, pair.wrap(), batches[:5])
    fresh = optimizer_maker(name, options)(pair.model)
    fresh.load_state_dict(deepcopy(pair.optimizer.state_dict()))
    for batch in batches[5:]:
        pair.plain_step(batch)
        plain_step(pair.model, fresh, pair.loss, batch)
    pair.optimizer = fresh
    pair.assert_equal()


@pytest.mark.parametrize(("name", "options"), COMBINATIONS[2::3], ids=name_of)
def test_a_plain_optimizer_state_loads_into_the_wrapped_optimizer(name: str, options: dict[str, Any]) -> None:
    pair = network_pair(name, options, torch.float32)
    batches = regression_batches(10)
    for batch in batches[:5]:
        pair.plain_step(batch)
    pair.model.load_state_dict(pair.plain.state_dict())
    pair.optimizer.load_state_dict(deepcopy(pair.plain_optimizer.state_dict()))
    run_both(pair, pair.wrap(), batches[5:])
    pair.assert_equal()


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=name_of)
def test_unwrapping_a_channels_last_model_leaves_its_state_in_that_layout(options: dict[str, Any]) -> None:
    def make_model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Conv2d(2, 4, 2).to(memory_format=torch.channels_last)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch[0].view(3, 2, 2, 2)).flatten(1) - 1).square().mean()

    pair = Pair(make_model, optimizer_maker("Adam", {"lr": 0.01, **options}), loss)
    batches = regression_batches(10)
    hyper = pair.wrap()
    run_both(pair, hyper, batches[:5])
    for batch in batches[5:]:
        pair.plain_step(batch)
        plain_step(pair.model, pair.optimizer, loss, batch)
    pair.assert_equal(rtol=1e-5)
    state = pair.optimizer.state[pair.model.weight]
    assert state["exp_avg"].stride() == pair.model.weight.stride()
