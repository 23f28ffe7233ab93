"""Our own samplers, on functions with a known optimum."""

from __future__ import annotations

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler

from torch_hypergrad.search.samplers import CoordinateDescent, ParticleSwarm, Reinforce, SimulatedAnnealing
from torch_hypergrad.search.samplers.base import Tried, from_unit, reflected, to_unit

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


def late(values: list[float]) -> float:
    return float(np.mean(values[-20:]))


@pytest.fixture(scope="module")
def at_random() -> list[list[float]]:
    return [losses(RandomSampler(seed=seed), 50) for seed in range(10)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_it_is_better_than_random_in_the_median_of_ten_seeds(sampler, at_random):
    found = [losses(sampler(seed=seed), 50) for seed in range(10)]
    assert np.median([min(values) for values in found]) < 0.75 * np.median([min(v) for v in at_random])
    assert np.median([late(values) for values in found]) < 0.6 * np.median([late(v) for v in at_random])


def test_reinforce_learns_to_propose_better_points_than_random_ones():
    """The last 20 of 100, on every seed."""
    for seed in range(2):
        learned, drawn = (late(losses(s(seed=seed), 100)) for s in (Reinforce, RandomSampler))
        assert learned < 0.5 * drawn


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_it_maximizes_as_it_minimizes(sampler):
    down = losses(sampler(seed=3), 12)
    up = losses(sampler(seed=3), 12, lambda trial: -bowl(trial), direction="maximize")
    assert up == [-value for value in down]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_all_that_it_knows_is_in_the_storage(sampler, tmp_path):
    """Also past the random places that a swarm of eight begins with."""
    url = f"sqlite:///{tmp_path}/study.db"
    whole = losses(sampler(seed=1), 14)
    for num_trials in (10, 4):
        study = optuna.create_study(sampler=sampler(seed=1), storage=url, study_name="s", load_if_exists=True)
        study.optimize(bowl, n_trials=num_trials)
    assert [trial.value for trial in study.trials] == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("seed", [0, None])
def test_coordinate_descent_takes_each_turn_of_a_round_once_then_half_steps(seed):
    """Whoever joins a study has no seed, and must go on with the same round."""
    study = optuna.create_study(sampler=CoordinateDescent(seed))
    study.optimize(lambda trial: float(bowl(trial) > 0 and trial.number > 0), n_trials=21)
    points = np.array([[*trial.params.values()] for trial in study.trials])
    first = points[0]
    for begin, step in ((1, 0.25), (11, 0.125)):
        ends = [reflected(first + sign * step * row) for row in np.eye(5) for sign in (1, -1)]
        np.testing.assert_allclose(points[begin : begin + 10], ends, atol=1e-12)


def test_coordinate_descent_keeps_its_half_steps_after_a_gain():
    study = optuna.create_study(sampler=CoordinateDescent())

    def parabola(trial: optuna.Trial) -> float:
        return (trial.suggest_float("x", 0.0, 1.0) - 0.56) ** 2

    study.enqueue_trial({"x": 0.5})
    study.optimize(parabola, n_trials=7)
    steps = [trial.params["x"] for trial in study.trials]
    # A round of 0.25 fails, then one of 0.125, then 0.0625 gains; the next step is as long, not 0.25 again.
    assert steps == pytest.approx([0.5, 0.75, 0.25, 0.625, 0.375, 0.5625, 0.625])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_workers_at_the_same_time_try_different_points(sampler):
    study = optuna.create_study(sampler=sampler(seed=0))
    study.optimize(bowl, n_trials=12)
    asked = []
    for _ in range(4):  # none of which has ended
        trial = study.ask()
        asked.append(tuple(trial.suggest_float(f"x{i}", 0.0, 1.0) for i in range(5)))
    assert len(set(asked)) == 4


def test_a_particle_flies_on_from_its_own_places_though_a_trial_failed():
    """Two particles: the odd trials are those of the second one."""
    study = optuna.create_study(sampler=ParticleSwarm(0, num_particles=2, inertia=1.0, own=0.0, common=0.0))

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0.0, 1.0)
        if trial.number == 4:
            raise ArithmeticError
        return x

    for x in (0.10, 0.90, 0.12, 0.85):
        study.enqueue_trial({"x": x})
    study.optimize(objective, n_trials=8, catch=(ArithmeticError,))
    places = [trial.params["x"] for trial in study.trials]
    assert places[5::2] == pytest.approx([0.80, 0.75])
    assert places[4::2] == pytest.approx([0.14, 0.14])  # again, as what failed is not known


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_several_objectives_are_refused(sampler):
    study = optuna.create_study(sampler=sampler(seed=0), directions=["minimize", "maximize"])
    with pytest.raises(ValueError, match=f"{sampler.__name__} minimizes.*2 objectives. Take sampler='nsga2'"):
        study.optimize(lambda trial: (trial.suggest_float("x", 0.0, 1.0), 1.0), n_trials=1)


def test_a_distribution_of_another_kind_is_refused():
    class Another(BaseDistribution):
        def to_internal_repr(self, value):
            return value

        def single(self):
            return False

        def _contains(self, value):
            return True

    with pytest.raises(TypeError, match="knows ranges and choices, and the trial suggests a Another"):
        to_unit(Another(), 1.0)


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


@pytest.mark.parametrize(
    "distribution",
    [
        IntDistribution(3, 5),
        FloatDistribution(0.0, 1.0, step=0.5),
        CategoricalDistribution(["a", "b", "c"]),
    ],
)
def test_each_of_three_values_has_a_third_of_the_line(distribution):
    values = [from_unit(distribution, u) for u in np.linspace(0.0005, 0.9995, 999)]
    assert [values.count(value) for value in dict.fromkeys(values)] == [333, 333, 333]


def test_the_unit_of_losses_is_the_distance_of_their_quartiles_so_far():
    values = np.random.default_rng(0).normal(size=9)
    expected = [np.subtract(*np.quantile(values[:k], [0.75, 0.25])) for k in range(2, 10)]
    tried = Tried(np.zeros((9, 1)), values, np.arange(9))
    np.testing.assert_allclose(tried.spreads(), [1.0, *expected], rtol=1e-12)
    assert Tried(np.zeros((2, 1)), np.ones(2), np.arange(2)).spreads() == [1.0, 1.0]


def test_what_leaves_the_cube_is_reflected():
    assert reflected(np.array([-0.2, 0.4, 1.3, 2.5])).tolist() == pytest.approx([0.2, 0.4, 0.7, 0.5])


def test_a_worker_more_draws_other_numbers():
    for sampler in SAMPLERS:
        first, second = sampler(seed=0), sampler(seed=0)
        second.reseed_rng()
        assert losses(first, 6) != losses(second, 6)
