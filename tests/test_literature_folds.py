"""Logistic regression and a kernel machine tuned over folds, as the literature has them, against
scikit-learn, dense linear algebra and finite differences of training."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import Tensor

from torch_hypergrad import Cholesky, HyperOptimizer, Hyperparameter, Implicit
from torch_hypergrad.bilevel import CrossValidation, fit, stratified_folds
from torch_hypergrad.testing import derivative

EXAMPLES = Path(__file__).parent.parent / "examples"
FROZEN = torch.optim.SGD
NUM_ROWS, NUM_FOLDS = 60, 3


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples import what they share from their own folder."""
    monkeypatch.syspath_prepend(EXAMPLES)
    for name in ("command_line", "common", "kernel_machine"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def breast_cancer(num_rows: int = NUM_ROWS) -> tuple[Tensor, Tensor]:
    """Standardized rows, and labels 0 and 1."""
    x, y = map(torch.tensor, load_breast_cancer(return_X_y=True))
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:num_rows]
    x, y = x[chosen], y[chosen]
    return (x - x.mean(0)) / x.std(0), y.double()


# ---- logistic regression with a decay for each group of features -------------------------------------------

DECAYS = torch.tensor([0.02, 0.3], dtype=torch.float64)
GROUPS = (torch.arange(30) >= 12).long()


def of_scikit_learn(decays: Tensor) -> float:
    """Mean log loss of the folds. Its penalty is ``|w|^2 / 2 C`` on the sum of losses: a feature divided by
    the root of its decay has the same penalty as all others."""
    x, y = breast_cancer()
    x = (x / decays[GROUPS].sqrt()).numpy()
    losses = []
    for train, val in stratified_folds(y, NUM_FOLDS, seed=0):
        reference = LogisticRegression(C=1 / len(train), tol=1e-12, solver="newton-cholesky", max_iter=1000)
        reference.fit(x[train], y[train].numpy())
        losses.append(log_loss(y[val].numpy(), reference.predict_proba(x[val])))
    return sum(losses) / len(losses)


def logistic_folds() -> tuple[CrossValidation, list]:
    import adaptive_logistic_regression as example

    x, y = breast_cancer()
    tune = Hyperparameter("weight_decay", per="label", labels={"weight": GROUPS}, init=DECAYS, groups=[0])
    splits = stratified_folds(y, NUM_FOLDS, seed=0)
    folds = CrossValidation([example.make(30, tune) for _ in splits], FROZEN)
    for fold, (train, _) in zip(folds.folds, splits):
        fit(fold, (x[train], y[train]), tol=1e-10, method="newton")
    return folds, [(x[val], y[val]) for _, val in splits]


@pytest.mark.usefixtures("examples")
def test_two_decays_over_folds_are_those_of_scikit_learn():
    folds, val_batches = logistic_folds()
    found = folds.evaluate(val_batches)
    assert found.val_loss == pytest.approx(of_scikit_learn(DECAYS), rel=1e-8)
    for entry, unit in enumerate(torch.eye(2, dtype=torch.float64)):
        width = 0.1 * DECAYS[entry].item()
        reference, _ = derivative(lambda h, unit=unit: of_scikit_learn(DECAYS + h * unit), width)
        computed = found.hypergradient["weight_decay/group0"][entry].item()
        assert computed == pytest.approx(reference, rel=1e-5)


def printed(lines: str) -> dict[str, list[str]]:
    """The cells of a printed table by their first one."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines() if "|" in line
    ]
    return {first: rest for first, *rest in cells}


@pytest.mark.usefixtures("examples")
def test_a_decay_for_probes_is_better_than_one_for_all(capsys):
    import adaptive_logistic_regression as example

    example.main(["--seeds", "1", "--num-rows", "120", "--evals", "6", "--folds", "3"])
    rows = printed(capsys.readouterr().out)
    one, two, plain, each = (
        [float(cell) for cell in rows[f"{name}, seed 0"][2:]]
        for name in (
            "90 probes, one decay",
            "90 probes, two decays",
            "no probes, one decay",
            "no probes, 30 decays",
        )
    )
    assert two[0] < one[0] - 0.01
    assert two[1] < one[1] - 0.01
    assert each[0] < plain[0] / 2, "the folds are fitted"
    assert each[1] > 1.3 * plain[1], "and new rows are not"
    of_features, of_probes = map(float, rows["90 probes, two decays, seed 0"][1].split(" / "))
    assert of_probes > 3 * of_features


# ---- the kernel machine ------------------------------------------------------------------------------------


def by_coefficients(decay: Tensor, width: Tensor, scales: Tensor) -> float:
    """Mean smoothed error, with the machine written as ``f = k alpha`` (Chapelle 2007): coefficients are 0
    for rows outside of the margin and ``(K + decay n / 2) alpha = y`` within."""
    x, y = breast_cancer()
    x, y, errors = x * scales / width, 2 * y - 1, []
    for train, val in stratified_folds(y, NUM_FOLDS, seed=0):
        kernel = torch.exp(-(x[:, None] - x[train]).square().sum(2) / 2) + 1
        inner = kernel[train] + 1e-8 * torch.eye(len(train), dtype=x.dtype)
        inside, before = torch.ones(len(train), dtype=torch.bool), None
        while before is None or not torch.equal(inside, before):
            alpha = torch.zeros(len(train), dtype=x.dtype)
            penalty = decay * len(train) / 2 * torch.ones(int(inside.sum()), dtype=x.dtype)
            system = inner[inside][:, inside] + penalty.diag()
            alpha[inside] = torch.linalg.solve(system, y[train][inside])
            inside, before = y[train] * (inner @ alpha) < 1, inside
        errors.append(torch.sigmoid(-2 * y[val] * (kernel[val] @ alpha)).mean())
    return float(torch.stack(errors).mean())


def along(at: dict[str, Tensor], name: str, direction: Tensor, shift: float) -> float:
    """The same with one of the values multiplied with ``1 + shift * direction``."""
    return by_coefficients(**{**at, name: at[name] * (1 + shift * direction)})


def machine_folds(values: dict[str, Tensor]) -> tuple[CrossValidation, list]:
    from kernel_machine import KernelMachine, smoothed_error, squared_hinge, train

    x, y = breast_cancer()
    y = 2 * y - 1
    width, scales = (values[name].clone().requires_grad_() for name in ("width", "scales"))
    tune = [
        Hyperparameter("weight_decay", init=float(values["decay"]), log=True),
        Hyperparameter.of(width, "width", log=True),
        Hyperparameter.of(scales, "scales", log=True),
    ]

    def make(rows: Tensor) -> HyperOptimizer:
        model = KernelMachine(rows, width, scales)
        given = model, torch.optim.SGD(model.parameters()), squared_hinge, tune, Implicit(Cholesky())
        return HyperOptimizer(*given, FROZEN, val_loss=smoothed_error)

    splits = stratified_folds(y, NUM_FOLDS, seed=0)
    folds = CrossValidation([make(x[chosen]) for chosen, _ in splits], FROZEN)
    for fold, (chosen, _) in zip(folds.folds, splits):
        train(fold, y[chosen])
    return folds, [(x[val], y[val]) for _, val in splits]


@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize(("decay", "width"), [(1e-2, 4.0), (1e-4, 12.0)])
def test_the_smoothed_error_and_all_its_derivatives_are_those_of_retrained_machines(decay, width):
    scales = 0.7 + 0.6 * torch.rand(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    at = {"decay": torch.tensor(decay).double(), "width": torch.tensor(width).double(), "scales": scales}
    folds, val_batches = machine_folds(at)
    found = folds.evaluate(val_batches)
    assert found.val_loss == pytest.approx(by_coefficients(*at.values()), rel=1e-8)
    for name, public in (("decay", "weight_decay/group0"), ("width", "width"), ("scales", "scales")):
        for unit in torch.eye(at[name].numel(), dtype=torch.float64)[:4].view(-1, *at[name].shape):
            reference, _ = derivative(partial(along, at, name, unit), 1e-3)
            computed = float((found.hypergradient[public] * at[name] * unit).sum())
            assert computed == pytest.approx(reference, rel=1e-6, abs=1e-9)
    direction = torch.linspace(-1, 1, 30, dtype=torch.float64)
    reference, _ = derivative(partial(along, at, "scales", direction), 1e-3)
    computed = float((found.hypergradient["scales"] * scales * direction).sum())
    assert computed == pytest.approx(reference, rel=1e-6)


@pytest.mark.usefixtures("examples")
def test_hypergradients_reach_what_a_grid_does_and_scales_fit_the_folds(capsys):
    import smoothed_svm as example

    example.main(["--num-rows", "80", "--side-of-grid", "3", "--evals", "8"])
    rows = printed(capsys.readouterr().out)
    grid, two, many = (
        [float(cell) for cell in rows[f"{name}, seed 0"]]
        for name in ("2 by a grid", "2 by hypergradients", "32 by hypergradients")
    )
    assert grid[0] == 9
    assert two[0] <= 8
    assert many[0] <= 32
    assert two[1] < grid[1]
    assert many[1] < two[1] / 2
    assert max(grid[3], two[3], many[3]) < 10
