"""HOAG (Pedregosa 2016) on his problem, the decay of logistic regression, against Brent's method on
scikit-learn's own training."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from test_examples import EXAMPLES, check_picture, rows_of, run_example
from torch_hypergrad.bilevel import cubic, exponential, quadratic

OPTIMA = {"breast_cancer": (0.013908, 0.1113610), "digits": (6.9296e-4, 0.2086408)}
SCHEDULES = {
    "exponential": lambda: exponential(0.01, 0.8, 1e-8),
    "quadratic": lambda: quadratic(0.01, 1e-8),
    "cubic": lambda: cubic(0.01, 1e-8),
}


@pytest.fixture
def hoag(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("hoag")


def loss_at(hoag: Any, dataset: str, decay: float) -> float:
    """The validation loss after training by scikit-learn; a column of ones stands for the bias, so that it
    decays too."""
    (rows, labels), (val_rows, val_labels) = hoag.load(dataset)
    with_ones, val_with_ones = (np.hstack([part, np.ones((len(part), 1))]) for part in (rows, val_rows))
    model = LogisticRegression(
        C=1 / (decay * len(rows)), fit_intercept=False, solver="newton-cholesky", tol=1e-12, max_iter=1000
    )
    model.fit(with_ones, labels)
    return log_loss(val_labels, model.predict_proba(val_with_ones))


@pytest.mark.parametrize("dataset", OPTIMA)
def test_the_optimum_is_that_of_scikit_learn_and_brent(hoag, dataset):
    found = scipy.optimize.minimize_scalar(
        lambda x: loss_at(hoag, dataset, math.exp(x)), bracket=(-8, -3), options={"xtol": 1e-7}
    )
    decay, loss = OPTIMA[dataset]
    assert math.exp(found.x) == pytest.approx(decay, rel=1e-3)
    assert found.fun == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dataset", OPTIMA)
def test_the_optimum_is_reached_by_rough_hypergradients_within_the_budget(hoag, dataset, schedule):
    budget, search = {"breast_cancer": 200, "digits": 500}[dataset], hoag.Search(dataset)
    search.hoag(SCHEDULES[schedule](), budget)
    costs, _, decays = np.array(search.path).T
    decay, loss = OPTIMA[dataset]
    assert decays[0] == 1
    assert costs[-1] <= budget
    away = abs(decays / decay - 1)
    assert away[costs > budget * 0.7].max() < 0.01, "it is there before the budget ends, and stays"
    assert loss_at(hoag, dataset, decays[-1]) == pytest.approx(loss, rel=1e-6)
    assert search.hyper.validation_loss(search.val).item() == pytest.approx(loss, rel=1e-4)
    assert search.hyper.hyper_optimizer.param_groups[0]["lr"] > 1, "the step size has not collapsed"


def test_the_example(tmp_path: Path):
    printed = run_example("hoag.py", "--datasets", "breast_cancer", "--out", tmp_path)
    rows = rows_of(printed)
    for way in ("Brent", "exact", "exponential", "quadratic", "cubic"):
        to, gradients, decay, above = rows[f"breast_cancer: {way}"]
        assert float(decay) == pytest.approx(0.013908, rel=0.01)
        assert abs(float(above)) < 1e-6
        assert int(to.split()[0]) <= int(gradients)
    rough, exact = (int(rows[f"breast_cancer: {way}"][0].split()[0]) for way in ("exponential", "exact"))
    assert rough < exact / 2
    check_picture(tmp_path / "hoag.png", printed)
