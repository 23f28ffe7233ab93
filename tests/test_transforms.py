"""Clipping of gradients, as torch has it, and hypergradients through it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from problems import REPLAY, mse, random_batch, tanh_mlp
from torch_hypergrad import ForwardMode, HyperOptimizer, Hyperparameter, Unrolled, clip_grad_norm

LR, NUM_STEPS = 0.3, 6
BATCHES, VAL = [random_batch(8, 4, seed) for seed in range(NUM_STEPS)], random_batch(8, 4, 99)


def after_training(lr: float, max_norm: float) -> float:
    """The validation loss, by plain PyTorch."""
    model = tanh_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5)
    for batch in BATCHES:
        optimizer.zero_grad()
        mse(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return mse(model, VAL).item()


@pytest.mark.parametrize("method", [Unrolled(), REPLAY, ForwardMode()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("max_norm", [0.1, 0.8, 100.0])
def test_the_hypergradient_is_that_of_clipped_training(method, max_norm):
    model = tanh_mlp()
    hyper = HyperOptimizer(
        model,
        torch.optim.SGD(model.parameters(), lr=LR, momentum=0.5),
        mse,
        [Hyperparameter("lr")],
        method,
        partial(torch.optim.SGD, lr=0.0),
        grad_transform=clip_grad_norm(max_norm),
    )
    for batch in BATCHES:
        hyper.step(batch)
    assert hyper.validation_loss(VAL).item() == pytest.approx(after_training(LR, max_norm), rel=1e-12)
    eps = 1e-6
    expected = (after_training(LR + eps, max_norm) - after_training(LR - eps, max_norm)) / (2 * eps)
    assert hyper.hypergradient(VAL)["lr/group0"].item() == pytest.approx(expected, rel=1e-6)


def test_gradients_of_zero_stay_zero():
    zero = torch.zeros(3, requires_grad=True)
    (clipped,) = clip_grad_norm(1.0)([zero])
    clipped.sum().backward()
    assert clipped.tolist() == [0, 0, 0]
    assert zero.grad is not None
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan"), float("inf")])
def test_other_norms_are_refused(max_norm):
    with pytest.raises(ValueError, match="max_norm must be positive and finite"):
        clip_grad_norm(max_norm)
