"""Running statistics that training reads, or that are moved in unusual ways, against plain training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from problems import FROZEN, REPLAY, mse, random_batch
from torch_hypergrad import (
    Cholesky,
    ForwardMode,
    HypergradientError,
    HyperOptimizer,
    Hyperparameter,
    Implicit,
    Neumann,
    Unrolled,
)
from torch_hypergrad.methods import Method
from torch_hypergrad.testing import derivative

BATCHES = [(x + 1, y) for x, y in (random_batch(8, 4, seed) for seed in range(7))]
VAL = random_batch(8, 4, seed=100)
EXACT: list[Method] = [
    REPLAY,
    Unrolled(max_snapshots=2),
    Unrolled(max_graphs=3),
    Unrolled(second_order="forward"),
    ForwardMode(),
]
every_method = pytest.mark.parametrize("method", EXACT, ids=str)
Loss = Callable[[nn.Module, Any], Tensor]


def network(middle: Callable[[], nn.Module] = lambda: nn.BatchNorm1d(5)) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), middle(), nn.Tanh(), nn.Linear(5, 1)).double()


def in_eval_mode(model: nn.Module, batch: Any) -> Tensor:
    modes = [module.training for module in model.modules()]
    model.eval()
    loss = mse(model, batch)
    for module, mode in zip(model.modules(), modes):
        module.training = mode
    return loss


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=0.01)


def nothing(model: nn.Module, t: int) -> None:
    pass


def computed(
    method: Method, make: Callable[[], nn.Module], train_loss: Loss, val_loss: Loss, before: Any
) -> float:
    model = make()
    hyper = HyperOptimizer(
        model, sgd(model), train_loss, [Hyperparameter("lr")], method, FROZEN, val_loss=val_loss
    )
    for t, batch in enumerate(BATCHES):
        before(model, t)
        hyper.step(batch)
    return hyper.hypergradient(VAL)["lr/group0"].item()


def reference(make: Callable[[], nn.Module], train_loss: Loss, val_loss: Loss, before: Any) -> float:
    """Central differences of plain training."""

    def loss_at(shift: float) -> float:
        model = make()
        optimizer = sgd(model, 0.1 + shift)
        for t, batch in enumerate(BATCHES):
            before(model, t)
            optimizer.zero_grad()
            train_loss(model, batch).backward()
            optimizer.step()
        return val_loss(model, VAL).item()

    return derivative(loss_at, 0.005)[0]


def check(
    method: Method,
    make: Callable[[], nn.Module] = network,
    train_loss: Loss = mse,
    val_loss: Loss = in_eval_mode,
    before: Any = nothing,
    rtol: float = 1e-6,
) -> None:
    expected = reference(make, train_loss, val_loss, before)
    assert abs(expected) > 1e-3
    assert computed(method, make, train_loss, val_loss, before) == pytest.approx(expected, rel=rtol)


# ---- training that reads them ------------------------------------------------------------------------------


def freeze_from_step_4(model: nn.Module, t: int) -> None:
    model[1].train(t < 4)  # type: ignore[index, operator, union-attr]


def every_third_in_eval_mode(model: nn.Module, batch: Any) -> Tensor:
    """Which no mode shows before the loss."""
    third = any(batch[0] is x for x, _ in BATCHES[2::3])
    return in_eval_mode(model, batch) if third else mse(model, batch)


@every_method
def test_statistics_that_training_alone_reads(method: Method) -> None:
    """Validation in train mode does not read them; training does, once the layer is frozen."""
    check(method, val_loss=mse, before=freeze_from_step_4)
    without = reference(lambda: network(nn.Identity), mse, mse, nothing)
    assert reference(network, mse, mse, freeze_from_step_4) != pytest.approx(without, rel=0.01)


@every_method
@pytest.mark.parametrize("val_loss", [mse, in_eval_mode])
def test_a_loss_that_changes_modes_by_itself(method: Method, val_loss: Loss) -> None:
    check(method, train_loss=every_third_in_eval_mode, val_loss=val_loss)


def test_differences_of_gradients_see_what_training_reads() -> None:
    check(Unrolled(second_order="finite_difference"), val_loss=mse, before=freeze_from_step_4)


def train_then_eval(model: nn.Module, batch: Any) -> Tensor:
    return mse(model, batch) + 0.1 * in_eval_mode(model, batch)


def eval_then_train(model: nn.Module, batch: Any) -> Tensor:
    """torch's own gradient is not that of this loss: BatchNorm reads its statistics again on the way back."""
    return 0.1 * in_eval_mode(model, batch) + mse(model, batch)


@pytest.mark.parametrize("method", [*EXACT, Unrolled(second_order="finite_difference")], ids=str)
@pytest.mark.parametrize("train_loss", [train_then_eval, eval_then_train])
def test_reading_and_moving_in_one_loss_is_refused(method: Method, train_loss: Loss) -> None:
    with pytest.raises(HypergradientError, match="reads buffers that it also moves"):
        computed(method, network, train_loss, in_eval_mode, nothing)


# ---- who moves them ----------------------------------------------------------------------------------------


class Own(nn.Module):
    """A normalization that is no module of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("location", torch.zeros(5))
        self.register_buffer("scale", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.location, self.scale, training=self.training, momentum=0.3)


class Stretched(nn.BatchNorm1d):
    """A subclass whose output is another."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.3 * super().forward(x).square()


class OneForBoth(nn.Module):
    """Two layers that share their statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.linear = (
            nn.BatchNorm1d(5),
            nn.BatchNorm1d(5, momentum=0.4),
            nn.Linear(5, 5),
        )
        self.second.running_mean, self.second.running_var = self.first.running_mean, self.first.running_var

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.linear(self.first(x))))


def shared() -> nn.Module:
    model = network(OneForBoth)
    layer: Any = model[1]  # type: ignore[index]
    layer.second.running_mean, layer.second.running_var = layer.first.running_mean, layer.first.running_var
    return model


def and_its_mean(model: Any, batch: Any) -> Tensor:
    """Folded by hand: the layer's statistics read as attributes, of the layer or of a list of all buffers."""
    buffers = dict(model.named_buffers())
    read = 0.5 * model[1].running_mean.sin().sum() + buffers["1.running_var"].log().sum()
    return in_eval_mode(model, batch) + read


@pytest.mark.parametrize("method", [*EXACT, Unrolled(second_order="finite_difference")], ids=str)
def test_validation_that_reads_attributes(method: Method) -> None:
    expected = reference(network, mse, and_its_mean, nothing)
    assert reference(network, mse, in_eval_mode, nothing) != pytest.approx(expected, rel=0.01)
    check(method, val_loss=and_its_mean)


def folded(model: Any, batch: Any) -> Tensor:
    """What evaluation mode computes, by hand."""
    layer = model[1]
    x = (model[0](batch[0]) - layer.running_mean) / (layer.running_var + layer.eps).sqrt()
    return (model[3](torch.tanh(x * layer.weight + layer.bias)) - batch[1]).square().mean()


def test_an_implicit_hypergradient_through_attributes() -> None:
    found = []
    for val_loss in (in_eval_mode, folded):
        model = network()
        tune = [Hyperparameter("weight_decay")]
        hyper = HyperOptimizer(
            model, sgd(model), mse, tune, Implicit(Cholesky(damping=30.0)), FROZEN, val_loss=val_loss
        )
        for batch in BATCHES:
            hyper.step(batch)
        found.append(hyper.hypergradient(VAL)["weight_decay/group0"].item())
    assert found[1] == pytest.approx(found[0], rel=1e-10)


@pytest.mark.parametrize("method", [*EXACT, Unrolled(second_order="finite_difference")], ids=str)
def test_training_that_reads_attributes_of_a_frozen_layer(method: Method) -> None:
    """Of one that was moved by earlier steps."""

    def train_loss(model: Any, batch: Any) -> Tensor:
        loss = mse(model, batch)
        return loss if model[1].training else loss + ((model[0].bias - model[1].running_mean) ** 2).sum()

    check(method, train_loss=train_loss, val_loss=mse, before=freeze_from_step_4)


@pytest.mark.parametrize("method", [*EXACT, Unrolled(second_order="finite_difference")], ids=str)
@pytest.mark.parametrize("is_before", [True, False])
def test_training_that_reads_an_attribute_and_moves_it_is_refused(method: Method, is_before: bool) -> None:
    def train_loss(model: Any, batch: Any) -> Tensor:
        before = (model[1].running_mean * model[0].bias).sum().clone()
        loss = mse(model, batch)
        return loss + (before if is_before else (model[1].running_mean * model[0].bias).sum())

    with pytest.raises(HypergradientError, match=r"reads the attribute '1\.running_mean'"):
        computed(method, network, train_loss, in_eval_mode, nothing)


MODELS = {"own": lambda: network(Own), "subclass": lambda: network(lambda: Stretched(5)), "shared": shared}


@every_method
@pytest.mark.parametrize("kind", MODELS)
def test_attributes_of_layers_that_validation_does_not_call(kind: str, method: Method) -> None:
    """What moves the buffers of a layer of one's own shows in training alone."""

    def val_loss(model: Any, batch: Any) -> Tensor:
        mean, var = (buffer for buffer in model.buffers() if buffer.is_floating_point())
        x = (model[0](batch[0]) - mean) / (var + 0.1).sqrt()
        return (model[-1](torch.tanh(x)) - batch[1]).square().mean()

    check(method, MODELS[kind], val_loss=val_loss)


@every_method
@pytest.mark.parametrize("kind", MODELS)
def test_who_moves_them_does_not_matter(kind: str, method: Method) -> None:
    check(method, MODELS[kind])


@every_method
def test_a_model_that_is_called_functionally(method: Method) -> None:
    def train_loss(model: nn.Module, batch: Any) -> Tensor:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return (functional_call(model, tensors, (batch[0],)) - batch[1]).square().mean()

    check(method, train_loss=train_loss)


@every_method
def test_a_step_that_does_not_call_the_layer(method: Method) -> None:
    """Its adjoint goes on as it is."""

    def train_loss(model: Any, batch: Any) -> Tensor:
        if batch[0] is BATCHES[4][0]:
            return (model[3](torch.tanh(model[0](batch[0]))) - batch[1]).square().mean()
        return mse(model, batch)

    check(method, train_loss=train_loss)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_model() -> None:
    def compiled() -> nn.Module:
        return torch.compile(network(), backend="aot_eager")  # type: ignore[return-value]

    torch.compiler.reset()
    try:
        compiled()(BATCHES[0][0])
    except Exception as error:  # no compiler for this Python or platform
        pytest.skip(f"torch.compile does not work here: {error}")
    expected = reference(network, mse, in_eval_mode, nothing)
    method = Unrolled(second_order="finite_difference")
    assert computed(method, compiled, mse, in_eval_mode, nothing) == pytest.approx(expected, rel=1e-6)


class Looking(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def test_under_a_mode_of_the_users() -> None:
    """torch then calls its own functions by name a second time."""
    expected = reference(network, mse, in_eval_mode, nothing)
    with Looking():
        assert computed(REPLAY, network, mse, in_eval_mode, nothing) == pytest.approx(expected, rel=1e-6)
    assert F.batch_norm.__module__ == "torch.nn.functional"  # nothing is left in its place


def test_a_layer_that_somebody_else_moves_is_refused() -> None:
    """Not a number that is wrong in silence."""

    def train_loss(model: Any, batch: Any) -> Tensor:
        loss = mse(model, batch)
        with torch.no_grad():
            model[1].running_mean.data.mul_(0.9)
        return loss

    for method in (REPLAY, ForwardMode(), Unrolled(max_graphs=3)):
        with pytest.raises(
            HypergradientError, match="'running_mean' of a BatchNorm1d is not what it should be"
        ):
            computed(method, network, train_loss, in_eval_mode, nothing)


def test_what_stays_constant_is_named_in_the_report() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("level", torch.ones(()))
            self.register_buffer("untouched", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            self.level = self.level + 0.1
            return x * self.level * self.untouched

    for method in (REPLAY, Implicit(Neumann(3, scale=0.01, damping=10.0))):
        model = nn.Sequential(network(), Counting()).double()
        hyper = HyperOptimizer(
            model, sgd(model), mse, [Hyperparameter("weight_decay")], method, FROZEN, val_loss=in_eval_mode
        )
        for batch in BATCHES:
            hyper.step(batch)
        assert hyper.hyper_step(VAL).constants == ["1.level"]
        hyper.step(BATCHES[0])
        assert hyper.hyper_step(VAL).constants == ["1.level"]
