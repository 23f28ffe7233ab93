"""Our own samplers, on functions with a known optimum."""

from __future__ import annotations

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler

from torch_hypergrad.search.samplers import CoordinateDescent, ParticleSwarm, Reinforce, SimulatedAnnealing
from torch_hypergrad.search.samplers.base import from_unit, reflected, to_unit

SAMPLERS = [CoordinateDescent, ParticleSwarm, Reinforce, SimulatedAnnealing]
OPTIMUM = np.array([0.2, 0.7, 0.4, 0.9, 0.55])


@pytest.fixture(autouse=True)
def _quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


def bowl(trial: optuna.Trial) -> float:
    x = np.array([trial.suggest_float(f"x{i}", 0.0, 1.0) for i in range(5)])
    return float((np.array([1, 2, 4, 1, 3]) * (x - OPTIMUM) ** 2).sum())


def losses(sampler: optuna.samplers.BaseSampler, num: int, objective=bowl, **options) -> list[float]:
    study = optuna.create_study(sampler=sampler, **options)
    study.optimize(objective, n_trials=num)
    return [trial.value for trial in study.trials]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_it_is_better_than_random_in_the_median(sampler):
    best, late = (
        {
            s: [what(losses(s(seed=seed), 50)) for seed in range(7)]
            for s in (sampler, optuna.samplers.RandomSampler)
        }
        for what in (min, lambda values: np.mean(values[-20:]))
    )
    assert np.median(best[sampler]) < 0.6 * np.median(best[RandomSampler])
    assert np.median(late[sampler]) < 0.6 * np.median(late[RandomSampler])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_it_maximizes_as_it_minimizes(sampler):
    down = losses(sampler(seed=3), 12)
    up = losses(sampler(seed=3), 12, lambda trial: -bowl(trial), direction="maximize")
    assert up == [-value for value in down]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_all_that_it_knows_is_in_the_storage(sampler, tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    whole = losses(sampler(seed=1), 8)
    study = optuna.create_study(sampler=sampler(seed=1), storage=url, study_name="s")
    study.optimize(bowl, n_trials=4)
    resumed = optuna.load_study(sampler=sampler(seed=1), storage=url, study_name="s")
    resumed.optimize(bowl, n_trials=4)
    assert [trial.value for trial in resumed.trials] == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_choices_integers_and_log_scales(sampler):
    def objective(trial: optuna.Trial) -> float:
        kind = trial.suggest_categorical("kind", ["a", "b", "c"])
        width = trial.suggest_int("width", 8, 256, log=True)
        rate = trial.suggest_float("rate", 1e-5, 1.0, log=True)
        depth = trial.suggest_int("depth", 2, 8, step=2)
        assert 8 <= width <= 256
        assert 1e-5 <= rate <= 1.0
        assert depth in (2, 4, 6, 8)
        return (kind != "b") + abs(np.log(width / 64)) + abs(np.log10(rate / 1e-2)) + abs(depth - 4) / 2

    found = [min(losses(sampler(seed=seed), 60, objective)) for seed in range(3)]
    assert np.median(found) < 1.2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pruned_and_failed_trials_do_no_harm(sampler):
    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0.0, 1.0)
        if trial.number % 3 == 1:
            trial.report(x, 1)
            raise optuna.TrialPruned
        if trial.number % 3 == 2:
            raise ArithmeticError
        return (x - 0.3) ** 2

    study = optuna.create_study(sampler=sampler(seed=0))
    study.optimize(objective, n_trials=12, catch=(ArithmeticError,))
    assert len(study.trials) == 12


@pytest.mark.parametrize(
    ("distribution", "values"),
    [
        (FloatDistribution(-2.0, 3.0), [-2.0, 0.3, 3.0]),
        (FloatDistribution(1e-4, 10.0, log=True), [1e-4, 0.1, 10.0]),
        (FloatDistribution(0.0, 1.0, step=0.25), [0.0, 0.25, 0.75, 1.0]),
        (IntDistribution(1, 9, step=2), [1, 3, 9]),
        (IntDistribution(1, 1000, log=True), [1, 10, 1000]),
        (CategoricalDistribution(["a", None, 3]), ["a", None, 3]),
    ],
)
def test_settings_are_points_and_points_settings(distribution, values):
    for value in values:
        u = to_unit(distribution, value)
        assert 0.0 <= u <= 1.0
        again = from_unit(distribution, u)
        assert again == (pytest.approx(value) if isinstance(value, float) else value)
    for u in (0.0, 0.4999, 1.0):
        assert distribution._contains(distribution.to_internal_repr(from_unit(distribution, u)))


def test_what_leaves_the_cube_is_reflected():
    assert reflected(np.array([-0.2, 0.4, 1.3, 2.5])).tolist() == pytest.approx([0.2, 0.4, 0.7, 0.5])


def test_a_worker_more_draws_other_numbers():
    for sampler in SAMPLERS:
        first, second = sampler(seed=0), sampler(seed=0)
        second.reseed_rng()
        assert losses(first, 6) != losses(second, 6)
