"""The growth of adjoints over a sweep, and the warning that it gives."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from problems import FROZEN, random_batch, tanh_mlp, wrapped
from torch_hypergrad import ForwardMode, HyperOptimizer, Hyperparameter, Identity, Implicit, Unrolled
from torch_hypergrad.methods import Statistics
from torch_hypergrad.safety.trust import warnings_of


class Weights(nn.Module):
    """A vector of weights, in parts."""

    def __init__(self, *parts: float, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.tensor([part], dtype=dtype)) for part in parts)


def report_of(model, train_loss, val_loss, lr, num_steps, method=None, groups=None):
    """The report after plain gradient descent."""
    optimizer = torch.optim.SGD(model.parameters() if groups is None else groups, lr=lr)
    tune = [Hyperparameter("lr")]
    hyper = HyperOptimizer(
        model, optimizer, train_loss, tune, method or Unrolled(), FROZEN, val_loss=val_loss
    )
    for _ in range(num_steps):
        hyper.step(None)
    return hyper.hyper_step(None)


def quadratic(curvatures):
    """``sum of h w^2 / 2``: each step multiplies the adjoint of w by ``1 - lr h``."""
    return lambda model, batch: sum((h * w.square() / 2).sum() for h, w in zip(curvatures, model.parts))


def linear(slopes):
    return lambda model, batch: sum((s * w).sum() for s, w in zip(slopes, model.parts))


# ---- closed forms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", [-3.0, -0.5, 0.4, 4.0, 7.0])
@pytest.mark.parametrize("num_steps", [1, 5, 30])
def test_growth_along_an_eigenvector(curvature, num_steps):
    report = report_of(Weights(1.0), quadratic([curvature]), linear([2.5]), lr=0.5, num_steps=num_steps)
    largest = max(1.0, abs(1 - 0.5 * curvature) ** (num_steps - 1))  # nobody asks for that of the start
    assert report.adjoint_growth == pytest.approx(largest, rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"max_snapshots": 3}, {"offload": "cpu"}])
def test_growth_of_two_directions_together(options):
    """sqrt(sum of (s_i (1 - lr h_i)^T)^2) over sqrt(sum of s_i^2), in two param groups."""
    model = Weights(1.0, -2.0)
    groups = [{"params": [part]} for part in model.parts]
    report = report_of(
        model,
        quadratic([6.0, 0.2]),
        linear([0.3, 4.0]),
        lr=0.5,
        num_steps=12,
        method=Unrolled(**options),
        groups=groups,
    )
    norms = [math.hypot(0.3 * 2.0**t, 4.0 * 0.9**t) for t in range(12)]
    assert report.adjoint_growth == pytest.approx(max(norms) / norms[0], rel=1e-12)


def test_truncation_counts_its_own_steps():
    report = report_of(
        Weights(1.0), quadratic([6.0]), linear([1.0]), lr=0.5, num_steps=20, method=Unrolled(truncation=7)
    )
    assert report.adjoint_growth == pytest.approx(2.0**6)


def test_a_validation_loss_at_its_optimum():
    report = report_of(Weights(0.0), quadratic([6.0]), quadratic([1.0]), lr=0.5, num_steps=3)
    assert (report.adjoint_growth, report.warnings) == (1.0, [])


# ---- the warning -------------------------------------------------------------------------------------------


def logistic(model, batch):
    """Gradient descent with rate 1 on this loss is the logistic map ``4 w (1 - w)``,
    with Lyapunov exponent log 2."""
    w = model.parts[0]
    return (w.square() / 2 - 2 * w.square() + 4 * w**3 / 3).sum()


DOUBTS = ("wrong in its first digit", "hold for tiny changes alone")


@pytest.mark.parametrize(
    ("dtype", "num_steps", "doubts"),
    [
        (torch.float32, 5, ()),
        (torch.float32, 60, DOUBTS),
        (torch.float64, 5, ()),
        (torch.float64, 20, DOUBTS[1:]),
        (torch.float64, 120, DOUBTS),
    ],
)
def test_a_chaotic_training_is_doubted_first_for_its_growth_then_for_rounding(dtype, num_steps, doubts):
    report = report_of(Weights(0.3, dtype=dtype), logistic, linear([1.0]), lr=1.0, num_steps=num_steps)
    assert len(report.warnings) == len(doubts)
    for warning, doubt in zip(report.warnings, doubts):
        assert doubt in warning
        assert f"grew {report.adjoint_growth:.1e} times" in warning
    assert all(str(dtype) in warning for warning in report.warnings if DOUBTS[0] in warning)


def test_the_limits():
    """1e3, and 1e-3 over machine epsilon: 2^-23 in float32, 2^-52 in float64."""
    for dtype, growth, num_warnings in (
        (torch.float32, 999.0, 0),
        (torch.float32, 1001.0, 1),
        (torch.float32, 8.4e3, 2),
        (torch.float64, 4.4e12, 1),
        (torch.float64, 4.6e12, 2),
        (torch.bfloat16, 1.0, 1),
        (torch.float64, math.inf, 2),
    ):
        assert (
            len(warnings_of(Statistics(adjoint_growth=growth), [torch.zeros(1, dtype=dtype)])) == num_warnings
        )


def test_the_doubted_is_wrong_and_the_undoubted_right():
    """Against float64, after so many steps of the chaotic map."""
    for num_steps in (5, 60):
        norms, doubts = [], []
        for dtype in (torch.float32, torch.float64):
            report = report_of(
                Weights(0.3, dtype=dtype), logistic, linear([1.0]), lr=1.0, num_steps=num_steps
            )
            norms.append(report.hypergradient_norm)
            doubts.append(any(DOUBTS[0] in warning for warning in report.warnings))
        assert doubts[0] == (not math.isclose(*norms, rel_tol=0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_stable_training_is_not_doubted(dtype, optimizer):
    tune = [Hyperparameter("lr"), Hyperparameter("weight_decay")]
    hyper = wrapped(tanh_mlp().to(dtype), tune, Unrolled(), partial(optimizer, lr=0.01))
    batch = tuple(tensor.to(dtype) for tensor in random_batch(20, 4, seed=1))
    for _ in range(100):
        hyper.step(batch)
    report = hyper.hyper_step(batch)
    assert report.warnings == []
    assert 1.0 <= report.adjoint_growth < 100.0


def test_the_coarsest_dtype_decides():
    model = Weights(1.0, 1.0)
    model.parts[1].data = model.parts[1].data.to(torch.bfloat16)
    report = report_of(model, quadratic([6.0, 0.1]), linear([1.0, 1.0]), lr=0.5, num_steps=3)
    assert "torch.bfloat16" in report.warnings[0]


@pytest.mark.parametrize(
    "method", [ForwardMode(), Implicit(Identity(scale=0.1))], ids=["forward", "implicit"]
)
def test_methods_without_a_sweep_say_nothing(method):
    name = "weight_decay" if isinstance(method, Implicit) else "lr"
    hyper = wrapped(tanh_mlp(), [Hyperparameter(name)], method)
    batch = random_batch(20, 4, seed=1)
    hyper.step(batch)
    report = hyper.hyper_step(batch)
    assert (report.adjoint_growth, report.warnings) == (None, [])


@pytest.mark.parametrize(
    ("statistics", "words"),
    [
        (Statistics(product_error=0.6), "off by 60%"),
        (Statistics(residual=0.7), "left 70%"),
        (Statistics(product_error=math.nan), "off by nan%"),
    ],
)
def test_poor_products_and_solves_warn(statistics, words):
    (warning,) = warnings_of(statistics, [torch.zeros(1)])
    assert words in warning


def test_good_products_and_solves_do_not_warn():
    assert (
        warnings_of(Statistics(product_error=0.01, residual=0.1, adjoint_growth=5.0), [torch.zeros(1)]) == []
    )
