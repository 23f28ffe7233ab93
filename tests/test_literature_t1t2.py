"""T1-T2 and DARTS against their papers' formulas, written out in plain autograd."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from problems import FROZEN, mse, random_batch, tanh_mlp
from torch_hypergrad import (
    ForwardMode,
    HyperOptimizer,
    Hyperparameter,
    Identity,
    Implicit,
    Unrolled,
    t1t2,
)

LR = 0.1
TRAIN, VAL = random_batch(20, 4, seed=1), random_batch(15, 4, seed=2)


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return ((ours - exact).norm() / exact.norm()).item()


def decayed_loss(model: nn.Module, batch: Any, decays: Tensor) -> Tensor:
    """The training loss of the paper: a penalty for each tensor, and a scale of the inputs."""
    x, y = batch
    penalty = sum(d * p.square().sum() for d, p in zip(decays, model.parameters()))
    return mse(model, (decays[-1] * x, y)) + 0.5 * penalty


def tuned(method: Any, decays: Tensor, num_steps: int) -> tuple[nn.Module, HyperOptimizer]:
    model = tanh_mlp()
    hyper = HyperOptimizer(
        model,
        torch.optim.SGD(model.parameters(), lr=LR),
        partial(decayed_loss, decays=decays),
        tune=[("decays", decays)],
        method=method,
        hyper_optimizer=FROZEN,
        val_loss=mse,
    )
    for _ in range(num_steps):
        hyper.step(TRAIN)
    return model, hyper


def start() -> Tensor:
    return torch.tensor([0.02, 0.1, 0.05, 0.2, 1.1], dtype=torch.float64, requires_grad=True)


def mixed_product(model: nn.Module, decays: Tensor, at: list[Tensor], direction: list[Tensor]) -> Tensor:
    """The transposed mixed second derivative of the training loss at some weights, times a direction."""
    put(model, at)
    params = list(model.parameters())
    grads = torch.autograd.grad(decayed_loss(model, TRAIN, decays), params, create_graph=True)
    return torch.autograd.grad(flat(grads) @ flat(direction), decays)[0]


def put(model: nn.Module, at: list[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(model.parameters(), at):
            p.copy_(value)


def by_the_paper(num_steps: int) -> tuple[Tensor, Tensor]:
    """Luketina et al. 2016, section 2.2: ``-lr`` times the mixed product at the weights before the last step,
    with the validation gradient after it; and the same product at the weights after it."""
    model, decays = tanh_mlp(), start()
    params = list(model.parameters())
    for _ in range(num_steps):
        before = [p.detach().clone() for p in params]
        grads = torch.autograd.grad(decayed_loss(model, TRAIN, decays), params)
        put(model, [p - LR * g for p, g in zip(params, grads)])
    after = [p.detach().clone() for p in params]
    val_grads = list(torch.autograd.grad(mse(model, VAL), params))
    return tuple(-LR * mixed_product(model, decays, at, val_grads) for at in (before, after))


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize(
    "method",
    [t1t2(), t1t2("forward"), Unrolled(truncation=1), Unrolled(truncation=1, max_graphs=1)],
    ids=["t1t2", "forward", "replayed", "kept graph"],
)
def test_t1_t2_is_one_unrolled_step(method: Any, num_steps: int) -> None:
    expected, _ = by_the_paper(num_steps)
    _, hyper = tuned(method, start(), num_steps)
    assert relative_error(hyper.hypergradient(VAL)["decays"], expected) < 1e-12


def test_t1_t2_by_differences_is_the_papers_finite_difference_form() -> None:
    expected, _ = by_the_paper(3)
    _, hyper = tuned(t1t2("finite_difference"), start(), 3)
    report = hyper.evaluate(VAL)
    assert relative_error(report.hypergradient["decays"], expected) < 1e-8
    assert report.product_error is not None


def test_identity_takes_the_mixed_product_one_step_later() -> None:
    expected, later = by_the_paper(3)
    _, hyper = tuned(Implicit(Identity(scale=LR)), start(), 3)
    found = hyper.hypergradient(VAL)["decays"]
    assert relative_error(found, later) < 1e-12
    assert 0.005 < relative_error(found, expected) < 0.5


def test_t1_t2_of_weight_decay_as_a_setting() -> None:
    """-lr times the weights before the step times the validation gradient after it."""
    model = tanh_mlp()
    tune = [Hyperparameter("weight_decay", per="element", init=0.05)]
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    hyper = HyperOptimizer(model, optimizer, mse, tune, t1t2(), FROZEN)
    hyper.step(TRAIN)
    before = [p.detach().clone() for p in model.parameters()]
    hyper.step(TRAIN)
    grads = torch.autograd.grad(mse(model, VAL), list(model.parameters()))
    expected = [-LR * w * g for w, g in zip(before, grads)]
    assert relative_error(flat(hyper.hypergradient(VAL).values()), flat(expected)) < 1e-12


def test_t1_t2_is_all_there_is_in_a_window_of_one_step_alone() -> None:
    """Exact there; later the steps before count too, which T1-T2 leaves out."""
    for num_steps, agree in ((1, True), (3, False)):
        greedy, exact = (
            tuned(method, start(), num_steps)[1].hypergradient(VAL)["decays"]
            for method in (t1t2(), ForwardMode())
        )
        assert (relative_error(greedy, exact) < 1e-12) is agree


def test_t1t2_refuses_another_way_by_name() -> None:
    with pytest.raises(ValueError, match=r"second_order must be .*got 'exact'"):
        t1t2("exact")  # type: ignore[arg-type]


# ---- DARTS ------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """A softmax mixture of candidate operations on each of two edges, in a chain."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList((torch.randn(2, 4, 4, dtype=torch.float64) / 2).unbind())
        self.head = nn.Linear(4, 1).double()

    def forward(self, x: Tensor, mixture: Tensor) -> Tensor:
        for weight, row in zip(self.weights, mixture.softmax(1)):
            candidates = [x, torch.tanh(x @ weight), F.softplus(x @ weight), torch.sin(x)]
            x = sum(share * of for share, of in zip(row, candidates))
        return self.head(x)


def search_loss(model: nn.Module, batch: Any, mixture: Tensor) -> Tensor:
    x, y = batch
    return (model(x, mixture) - y).square().mean()


def cell(first_order: bool = False, num_steps: int = 2, **options: float) -> tuple[nn.Module, Tensor, Tensor]:
    """The model after training, its mixture, and the hypergradient of the mixture by torch_hypergrad."""
    torch.manual_seed(0)
    model = Mixed()
    mixture = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    read = mixture.detach() if first_order else mixture
    hyper = HyperOptimizer(
        model,
        torch.optim.SGD(model.parameters(), lr=LR, **options),
        lambda model, batch: search_loss(model, batch, read),
        tune=[("mixture", mixture)],
        method=t1t2(),
        hyper_optimizer=FROZEN,
        val_loss=partial(search_loss, mixture=mixture),
    )
    for _ in range(num_steps):
        hyper.step(TRAIN)
    return model, mixture, hyper.hypergradient(VAL)["mixture"]


def by_autograd(num_steps: int, momentum: float = 0.0, weight_decay: float = 0.0) -> tuple[Tensor, Tensor]:
    """Liu, Simonyan and Yang 2019, section 2.3: the derivative of the validation loss after an unrolled
    step, and its direct part alone."""
    torch.manual_seed(0)
    model = Mixed()
    mixture = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    params = dict(model.named_parameters())
    buffers = {name: torch.zeros_like(p) for name, p in params.items()}
    for step in range(num_steps):
        params = {name: p.detach().requires_grad_() for name, p in params.items()}
        loss = torch.func.functional_call(model, params, (TRAIN[0], mixture)) - TRAIN[1]
        grads = torch.autograd.grad(loss.square().mean(), list(params.values()), create_graph=True)
        decayed = [g + weight_decay * p for g, p in zip(grads, params.values())]
        buffers = {
            name: momentum * b.detach() + g if step else g for (name, b), g in zip(buffers.items(), decayed)
        }
        params = {name: p - LR * buffers[name] for name, p in params.items()}

    def derivative(params: dict[str, Tensor]) -> Tensor:
        outputs = torch.func.functional_call(model, params, (VAL[0], mixture))
        return torch.autograd.grad((outputs - VAL[1]).square().mean(), mixture, retain_graph=True)[0]

    return derivative(params), derivative({name: p.detach() for name, p in params.items()})


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.01}], ids=["sgd", "momentum"])
def test_darts_second_order_is_autograd_through_the_unrolled_step(options: dict[str, float]) -> None:
    expected, direct = by_autograd(2, **options)
    _, _, found = cell(**options)
    assert relative_error(found, expected) < 1e-12
    assert relative_error(direct, expected) > 1e-3, "the step counts"


def test_darts_first_order_is_the_direct_derivative() -> None:
    """The training loss reads the mixture detached."""
    _, direct = by_autograd(2)
    _, _, found = cell(first_order=True)
    assert relative_error(found, direct) < 1e-12


def test_darts_second_order_with_a_learning_rate_of_zero_is_the_first_order() -> None:
    """The paper's xi = 0."""
    torch.manual_seed(0)
    model = Mixed()
    mixture = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    hyper = HyperOptimizer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        partial(search_loss, mixture=mixture),
        tune=[("mixture", mixture)],
        method=t1t2(),
        hyper_optimizer=FROZEN,
        val_loss=partial(search_loss, mixture=mixture),
    )
    hyper.step(TRAIN)
    expected = torch.autograd.grad(search_loss(model, VAL, mixture), mixture)[0]
    assert relative_error(hyper.hypergradient(VAL)["mixture"], expected) < 1e-12
