"""Which optimizers have an update rule, rules of the user's own, and rules from ``higher``.

References: finite differences of re-run training (``check_hypergradient``), the user's optimizer itself
for the weights, and for the optimizers and settings in which ``higher`` is right its hypergradient, to 1e-9.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cells import ADAM, SGD, Net, Row, batches, exact, hypergradient, loss
from torch_hypergrad import ForwardMode, HyperOptimizer, Hyperparameter, Unrolled, register_update
from torch_hypergrad.testing import check_hypergradient
from torch_hypergrad.updates import UpdateRule, rule_of
from torch_hypergrad.updates.base import registered_rule

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # higher compiles with a SyntaxWarning
    import higher


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with exact():
        yield


# ---- an optimizer of the user's own ------------------------------------------------------------------------


class SoftSign(torch.optim.Optimizer):
    """Steps by a smooth sign of the momentum."""

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.5, softness: float = 0.2) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "softness": softness})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad)
                p -= group["lr"] * buffer / (buffer.square() + group["softness"]).sqrt()


def soft_sign(
    param: Tensor, grad: Tensor, state: dict[str, Any], settings: Any
) -> tuple[Tensor, dict[str, Any]]:
    buffer = settings["momentum"] * state.get("buffer", torch.zeros_like(grad)) + grad
    return param - settings["lr"] * buffer / (buffer.square() + settings["softness"]).sqrt(), {
        "buffer": buffer
    }


RANGES = {"lr": (0.0, math.inf), "momentum": (0.0, math.inf), "softness": (0.0, math.inf)}
register_update(SoftSign, RANGES)(soft_sign)


class NormalizedSGD(torch.optim.Optimizer):
    """Divides each tensor's gradient by a running average of its norm, kept as one number."""

    def __init__(self, params: Any, lr: float = 0.1, decay: float = 0.6) -> None:
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", torch.tensor(0.0)) + 1
                norm = (1 - group["decay"]) * p.grad.norm() + group["decay"] * state.get(
                    "norm", torch.tensor(0.0)
                )
                state["norm"] = norm
                p -= group["lr"] / state["step"] * p.grad / norm


@register_update(
    NormalizedSGD, {"lr": (0.0, math.inf), "decay": (0.0, 0.999)}, elementwise=False, scalars=("norm",)
)
def normalized_sgd(
    param: Tensor, grad: Tensor, state: dict[str, Any], settings: Any
) -> tuple[Tensor, dict[str, Any]]:
    step, decay = state.get("step", 0) + 1, settings["decay"]
    norm = (1 - decay) * grad.norm() + decay * state.get("norm", 0.0)
    return param - settings["lr"] / step * grad / norm, {"step": step, "norm": norm}


PROBLEM = Row("SGD", "", {})
TRAIN, VAL = batches(PROBLEM)[:-1], batches(PROBLEM)[-1]


def wrapped(
    kind: type[torch.optim.Optimizer], *tune: Hyperparameter, method: Any = None, **options: Any
) -> HyperOptimizer:
    model = Net(PROBLEM)
    optimizer = kind(model.parameters(), **options)  # type: ignore[call-arg]
    method = Unrolled() if method is None else method
    return HyperOptimizer(model, optimizer, loss, list(tune), method, partial(torch.optim.SGD, lr=0.0))


def train(hyper: HyperOptimizer) -> HyperOptimizer:
    for batch in TRAIN:
        hyper.step(batch)
    return hyper


def train_plain(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    for batch in TRAIN:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()


OWN = [
    (SoftSign, "lr"),
    (SoftSign, "momentum"),
    (SoftSign, "softness"),
    (NormalizedSGD, "lr"),
    (NormalizedSGD, "decay"),
]


@pytest.mark.parametrize(("kind", "setting"), OWN)
@pytest.mark.parametrize("per", ["group", "tensor"])
def test_own_rules_have_the_right_hypergradient(kind: Any, setting: str, per: Any) -> None:
    entries = check_hypergradient(
        partial(wrapped, kind, Hyperparameter(setting, per=per)), TRAIN, VAL, num_entries=1
    )
    assert len(entries) == (1 if per == "group" else 3)
    assert max(abs(entry.computed) for entry in entries) > 1e-4


def test_an_elementwise_rule_takes_a_value_for_each_weight() -> None:
    make = partial(wrapped, SoftSign, Hyperparameter("softness", per="element"))
    entries = check_hypergradient(make, TRAIN, VAL, num_entries=3)
    assert len({entry.computed for entry in entries}) == 9


def test_a_value_close_to_its_upper_bound_can_be_checked() -> None:
    """Adam's default beta2 moved by a 50th of itself would be above 1."""
    optimizer = partial(torch.optim.Adam, lr=0.05, eps=1e-2, betas=(0.9, 0.999))
    entries = check_hypergradient(partial(wrapped, optimizer, Hyperparameter("betas.1")), TRAIN, VAL)
    assert abs(entries[0].computed) > 1e-6


@pytest.mark.parametrize("kind", [SoftSign, NormalizedSGD])
def test_own_rules_keep_state_as_the_optimizer_itself_does(kind: Any) -> None:
    hyper = train(wrapped(kind, Hyperparameter("lr")))
    model = Net(PROBLEM)
    optimizer = kind(model.parameters())
    train_plain(optimizer, model)
    for ours, theirs in zip(hyper.model.parameters(), model.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        assert hyper.optimizer.state[ours].keys() == optimizer.state[theirs].keys()
        for key, value in optimizer.state[theirs].items():
            torch.testing.assert_close(
                hyper.optimizer.state[ours][key], value, rtol=1e-12, atol=1e-14, msg=key
            )


def test_the_method_does_not_matter_for_own_rules() -> None:
    for kind, setting in OWN:
        tune = Hyperparameter(setting, per="tensor")
        unrolled = train(wrapped(kind, tune)).hypergradient(VAL)
        forward = train(wrapped(kind, tune, method=ForwardMode())).hypergradient(VAL)
        for name, value in unrolled.items():
            torch.testing.assert_close(forward[name], value, rtol=1e-9, atol=1e-12)


def test_registering_again_replaces_the_rule() -> None:
    class Own(SoftSign):
        def step(self) -> None:  # type: ignore[override]
            raise NotImplementedError

    register_update(Own, {"lr": (0.0, 1.0)})(soft_sign)
    register_update(Own, {"softness": (0.0, 1.0)})(soft_sign)
    assert list(rule_of(Own([nn.Parameter(torch.ones(1))])).tunable) == ["softness"]


def test_a_rule_is_a_plain_function_still() -> None:
    param, state = soft_sign(torch.ones(2), torch.zeros(2), {}, {"lr": 0.1, "momentum": 0.5, "softness": 0.2})
    assert torch.equal(param, torch.ones(2))
    assert torch.equal(state["buffer"], torch.zeros(2))
    assert isinstance(registered_rule(SoftSign([nn.Parameter(torch.ones(1))])), UpdateRule)


# ---- subclasses, and what has no rule ----------------------------------------------------------------------


def test_a_subclass_that_inherits_its_step_has_the_rule_of_its_base() -> None:
    class WithDefaults(torch.optim.Adam):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.01, betas=(0.5, 0.9))

    parameter = nn.Parameter(torch.ones(1))
    assert rule_of(WithDefaults([parameter])) is rule_of(torch.optim.Adam([parameter]))


def test_a_subclass_with_a_step_of_its_own_is_refused() -> None:
    class Changed(torch.optim.Adam):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)

    with pytest.raises(ValueError, match=r"no update rule for .*Changed.*register_update"):
        wrapped(Changed, Hyperparameter("lr"))


def test_an_unknown_optimizer_is_refused_with_the_known_ones_and_the_remedy() -> None:
    class Unknown(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1})

        def step(self) -> None:  # type: ignore[override]
            raise NotImplementedError

    with pytest.raises(ValueError, match=r"Unknown.*Known: .*Adam.*SGD.*register_update"):
        wrapped(Unknown, Hyperparameter("lr"))


@pytest.mark.parametrize(
    ("kind", "reason"), [(torch.optim.LBFGS, "line search"), (torch.optim.SparseAdam, "sparse gradients")]
)
def test_optimizers_that_cannot_be_unrolled_are_refused_with_the_reason(kind: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__} cannot be wrapped: .*{reason}"):
        wrapped(kind, Hyperparameter("lr"))


def test_lbfgs_subclasses_are_refused_too() -> None:
    class Mine(torch.optim.LBFGS):
        pass

    with pytest.raises(ValueError, match=r"Mine cannot be wrapped: .*line search"):
        wrapped(Mine, Hyperparameter("lr"))


class OneParameter(nn.Module):
    """Holds a parameter of any kind."""

    def __init__(self, parameter: Tensor) -> None:
        super().__init__()
        self.parameter = nn.Parameter(parameter)


@pytest.mark.parametrize(
    ("parameter", "kind"),
    [(torch.ones(2, dtype=torch.complex128), "complex"), (torch.eye(2).to_sparse(), "sparse")],
)
def test_complex_and_sparse_parameters_are_refused(parameter: Tensor, kind: str) -> None:
    model = OneParameter(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"'parameter' is {kind}"):
        HyperOptimizer(
            model, optimizer, loss, [Hyperparameter("lr")], Unrolled(), partial(torch.optim.SGD, lr=0.1)
        )


def test_sparse_gradients_are_refused_at_the_first_step_and_nothing_has_changed() -> None:
    model = nn.Embedding(5, 2, sparse=True)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hyper = HyperOptimizer(
        model,
        optimizer,
        lambda model, batch: model(batch).square().sum(),
        [Hyperparameter("lr")],
        Unrolled(),
        partial(torch.optim.SGD, lr=0.1),
    )
    with pytest.raises(ValueError, match=r"'weight' is sparse.*sparse=False"):
        hyper.step(torch.tensor([1, 2]))
    assert torch.equal(model.weight, before)


# ---- optimizers registered with higher ---------------------------------------------------------------------


class Belief(torch.optim.Optimizer):
    """AdaBelief (Zhuang et al. 2020) without bias correction, and a rate that fades away."""

    def __init__(
        self, params: Any, lr: float = 0.1, betas: Any = (0.6, 0.8), eps: float = 0.05, fade: float = 0.8
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "fade": fade, "frozen": False, "order": 2}
        )

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                left = state["left"] = state.get("left", 1.0) * group["fade"]
                mean = state["mean"] = beta1 * state.get("mean", torch.zeros_like(p)) + (1 - beta1) * p.grad
                spread = state.get("spread", torch.zeros_like(p))
                spread = state["spread"] = beta2 * spread + (1 - beta2) * (p.grad - mean) ** 2
                p -= group["lr"] * left * mean / (spread + group["eps"]).sqrt()


class DifferentiableBelief(higher.optim.DifferentiableOptimizer):
    """The same for ``higher``."""

    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        for g, (group, grads) in enumerate(zip(self.param_groups, grouped_grads)):
            beta1, beta2 = group["betas"]
            for i, (p, grad) in enumerate(zip(group["params"], grads)):
                state = self.state[g][i]
                left = state["left"] = state.get("left", 1.0) * group["fade"]
                mean = state["mean"] = beta1 * state.get("mean", torch.zeros_like(p)) + (1 - beta1) * grad
                spread = state.get("spread", torch.zeros_like(p))
                spread = state["spread"] = beta2 * spread + (1 - beta2) * (grad - mean) ** 2
                group["params"][i] = p - group["lr"] * left * mean / (spread + group["eps"]).sqrt()


higher.register_optim(Belief, DifferentiableBelief)


@pytest.mark.parametrize("per", ["group", "tensor", "element"])
@pytest.mark.parametrize("setting", ["lr", "betas.0", "betas.1", "eps", "fade"])
def test_optimizers_registered_with_higher_have_the_right_hypergradient(setting: str, per: Any) -> None:
    entries = check_hypergradient(
        partial(wrapped, Belief, Hyperparameter(setting, per=per)), TRAIN, VAL, num_entries=1
    )
    assert max(abs(entry.computed) for entry in entries) > 1e-4


def test_training_through_higher_is_that_of_the_optimizer() -> None:
    hyper = train(wrapped(Belief, Hyperparameter("lr")))
    model = Net(PROBLEM)
    optimizer = Belief(model.parameters())
    train_plain(optimizer, model)
    for ours, theirs in zip(hyper.model.parameters(), model.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        for key, value in optimizer.state[theirs].items():
            value = torch.as_tensor(value)
            torch.testing.assert_close(
                hyper.optimizer.state[ours][key], value, rtol=1e-12, atol=1e-14, msg=key
            )


def test_through_higher_the_method_does_not_matter() -> None:
    tune = [Hyperparameter(setting, per="tensor") for setting in ("lr", "eps")]
    unrolled = train(wrapped(Belief, *tune)).hypergradient(VAL)
    forward = train(wrapped(Belief, *tune, method=ForwardMode())).hypergradient(VAL)
    for name, value in unrolled.items():
        torch.testing.assert_close(forward[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("setting", ["frozen", "order"])
def test_of_an_optimizer_from_higher_only_floats_are_tuned(setting: str) -> None:
    with pytest.raises(ValueError, match="cannot be tuned"):
        wrapped(Belief, Hyperparameter(setting))


def test_a_rule_of_our_own_goes_before_the_one_from_higher() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    assert rule_of(optimizer) is registered_rule(optimizer)
    assert rule_of(optimizer).elementwise


# ---- higher as second opinion ------------------------------------------------------------------------------


def hypergradient_of_higher(row: Row, setting: str) -> Tensor:
    *train_batches, val = batches(row)
    model = Net(row)
    optimizer = row.kind(model.parameters(), **row.options)
    value = torch.tensor(row.value(setting), requires_grad=True)
    with higher.innerloop_ctx(model, optimizer, override={setting: [value]}) as (functional, differentiable):
        for batch in train_batches:
            differentiable.step(loss(functional, batch))
        (found,) = torch.autograd.grad(loss(functional, val), [value])
    return found


# higher adds eps before the bias correction and torch after it: they agree while eps is as good as zero.
TINY_EPS = {**ADAM, "eps": 1e-13}

RIGHT_IN_HIGHER = [
    (Row("SGD", "momentum", SGD), ["lr", "momentum", "weight_decay"]),
    (Row("SGD", "nesterov", {**SGD, "nesterov": True}), ["lr", "momentum", "weight_decay"]),
    (Row("SGD", "dampening", {**SGD, "dampening": 0.3}), ["lr", "dampening"]),
    (Row("Adam", "", TINY_EPS), ["lr", "weight_decay"]),
    (Row("Adam", "long", {**TINY_EPS, "weight_decay": 0.0}, num_steps=30), ["lr"]),
    (Row("Adadelta", "", {"lr": 0.5, "rho": 0.8, "eps": 0.02, "weight_decay": 0.1}), ["lr", "weight_decay"]),
]


@pytest.mark.parametrize(
    ("row", "setting"),
    [(row, setting) for row, settings in RIGHT_IN_HIGHER for setting in settings],
    ids=lambda part: getattr(part, "name", part),
)
def test_higher_agrees(row: Row, setting: str) -> None:
    found, _ = hypergradient(row, [Hyperparameter(setting)], Unrolled())
    expected = hypergradient_of_higher(row, setting).item()
    assert abs(expected) > 1e-4
    assert abs(found[setting][0] - expected) <= 1e-9 * abs(expected)
