"""How tolerances tighten."""

from __future__ import annotations

from itertools import islice

import pytest

from torch_hypergrad.bilevel import cubic, exponential, quadratic


@pytest.mark.parametrize(
    ("tolerances", "expected"),
    [
        (exponential(0.2, factor=0.5), [0.2, 0.1, 0.05, 0.025]),
        (quadratic(0.36), [0.36, 0.09, 0.04, 0.0225]),
        (cubic(2.16), [2.16, 0.27, 0.08, 0.03375]),
    ],
    ids=["exponential", "quadratic", "cubic"],
)
def test_tolerances_are_those_of_the_formula(tolerances, expected):
    assert list(islice(tolerances, 4)) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("schedule", [exponential, quadratic, cubic])
def test_tolerances_fall_to_the_least_and_have_a_finite_sum(schedule):
    found = list(islice(schedule(0.1, least=1e-5), 2000))
    assert found == sorted(found, reverse=True)
    assert found[-1] == 1e-5
    assert sum(x for x in found if x > 1e-5) <= 1.0  # 0.1 times 10, pi^2 / 6 or 1.202
    assert len(set(found)) > 10


@pytest.mark.parametrize("schedule", [exponential, quadratic, cubic])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"start": 0.0}, ValueError, "start must be finite and above 0, got 0.0"),
        ({"start": float("nan")}, ValueError, "start must be finite and above 0, got nan"),
        ({"start": "0.1"}, TypeError, "start must be a number, got '0.1'"),
        ({"least": 0.0}, ValueError, "least must be finite and above 0"),
        (
            {"start": 0.1, "least": 0.2},
            ValueError,
            "least must be at most start, got least=0.2 and start=0.1",
        ),
    ],
)
def test_refuses_at_once_by_name(schedule, options, error, message):
    with pytest.raises(error, match=f"{schedule.__name__}: {message}"):
        schedule(**options)


@pytest.mark.parametrize("factor", [0.0, 1.0, 1.5, -0.5])
def test_refuses_factors_that_do_not_tighten(factor):
    with pytest.raises(ValueError, match=r"exponential: factor must be"):
        exponential(0.1, factor=factor)
