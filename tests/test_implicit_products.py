"""Implicit hypergradients whose products take another way than double backward,
against dense linear algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from problems import FROZEN, mse, random_batch
from torch_hypergrad import CG, HyperOptimizer, Hyperparameter, Implicit
from torch_hypergrad.step.second_order import SecondOrder

DAMPING = 1.0
BATCHES = [random_batch(16, 4, seed) for seed in range(4)]
VAL = random_batch(16, 4, seed=99)


def penalized(model: nn.Module, batch: tuple[Tensor, Tensor], strength: Tensor) -> Tensor:
    return mse(model, batch) + strength * sum(p.square().sum() for p in model.parameters())


def dense_reference(model: nn.Module, strength: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Hypergradients of the decay of each weight and of the penalty's strength, from the whole Hessian."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def loss(theta: Tensor, batches: list, strength: Tensor) -> Tensor:
        pieces = [piece.view(shape) for piece, shape in zip(theta.split([s.numel() for s in shapes]), shapes)]
        own = dict(zip(names, pieces))
        errors = [(functional_call(model, own, (x,)) - y).square().mean() for x, y in batches]
        return sum(errors) / len(errors) + strength * theta.square().sum()

    hessian = torch.autograd.functional.hessian(
        lambda theta: loss(theta, BATCHES[-2:], strength.detach()), flat
    )
    system = hessian + (decay + DAMPING) * torch.eye(len(flat), dtype=flat.dtype)
    theta = flat.clone().requires_grad_()
    (b,) = torch.autograd.grad(loss(theta, [VAL], torch.zeros((), dtype=flat.dtype)), theta)
    q = torch.linalg.solve(system, b)
    return -q * flat, -2 * (q @ flat)


@pytest.mark.parametrize(
    ("second_order", "rtol"), [("reverse", 1e-9), ("forward", 1e-9), ("finite_difference", 1e-7)]
)
def test_every_way_gives_the_dense_answer(second_order: SecondOrder, rtol: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    strength = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    hyper = HyperOptimizer(
        model,
        torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=0.1),
        lambda model, batch: penalized(model, batch, strength),
        [Hyperparameter("weight_decay", per="element"), ("strength", strength)],
        Implicit(CG(200, 1e-13, DAMPING), num_batches=2, second_order=second_order),
        FROZEN,
        val_loss=mse,
    )
    for batch in BATCHES:
        hyper.step(batch)
    decay, penalty = dense_reference(model, strength, 0.1)
    found = hyper.hypergradient(VAL)
    of_weights = torch.cat([value.reshape(-1) for name, value in found.items() if name != "strength"])
    torch.testing.assert_close(of_weights, decay, rtol=rtol, atol=rtol * decay.abs().max().item())
    torch.testing.assert_close(found["strength"], penalty, rtol=rtol, atol=0.0)
    report = hyper.hyper_step(VAL)
    assert (report.product_error is not None) == (second_order == "finite_difference")


def test_gauss_newton_goes_with_double_backward() -> None:
    with pytest.raises(
        ValueError, match=r"curvature='gauss_newton' .* second_order='reverse', got 'forward'"
    ):
        Implicit(CG(), curvature="gauss_newton", second_order="forward")


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ValueError, match=r"second_order must be one of 'reverse', .* got 'backward'"):
        Implicit(CG(), second_order="backward")  # type: ignore[arg-type]
