"""Searches on Optuna's objects: spaces, names, storages, killed workers, hypergradients in trials."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

import search_worker
from problems import mse, random_batch, tanh_mlp
from test_examples import check_picture, mean, rows_of, run_example
from torch_hypergrad import (
    CG,
    DrMAD,
    ForwardMode,
    HyperOptimizer,
    Hyperparameter,
    Implicit,
    SolverError,
    Unrolled,
)
from torch_hypergrad.search import (
    PRUNERS,
    SAMPLERS,
    best_so_far,
    create_study,
    hyper_step_cost,
    hypergradients,
    make_pruner,
    make_sampler,
    make_space,
    make_storage,
    names,
    objective_of,
    watched,
)

FLOAT = {"type": "float", "low": -1.0, "high": 3.0}
SPACE = {"x": FLOAT, "width": {"type": "int", "low": 1, "high": 8, "log": True}, "kind": ["a", "b"]}
COMPLETE, FAIL, PRUNED = TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


def square(trial: optuna.Trial, settings: dict[str, Any]) -> float:
    return settings["x"] ** 2


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.trials]


@pytest.fixture(params=["sqlite:///{}/study.db", "journal:///{}/study.log"], ids=["sqlite", "journal"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.param.format(tmp_path)


# ---- spaces ------------------------------------------------------------------------------------------------


def test_a_space_is_of_optunas_distributions():
    assert make_space({**SPACE, "lr": FloatDistribution(1e-3, 1.0, log=True)}) == {
        "x": FloatDistribution(-1.0, 3.0),
        "width": IntDistribution(1, 8, log=True),
        "kind": CategoricalDistribution(["a", "b"]),
        "lr": FloatDistribution(1e-3, 1.0, log=True),
    }


@pytest.mark.parametrize(
    ("space", "error", "message"),
    [
        ({}, ValueError, "empty"),
        (["x"], TypeError, "a dict from names"),
        ({"x": 3}, TypeError, r"space\['x'\] must be an Optuna distribution.*got 3"),
        ({"x": {**FLOAT, "high": -2}}, ValueError, r"space\['x'\]: low=-1.0 must be below high=-2"),
        ({"x": {**FLOAT, "high": -1.0}}, ValueError, "no value lies between"),
        ({"x": FloatDistribution(1, 1)}, ValueError, "no value lies between"),
        ({"x": FloatDistribution(math.nan, 1)}, ValueError, "finite"),
        ({"x": {**FLOAT, "high": math.inf}}, ValueError, "finite"),
        ({"x": {**FLOAT, "type": "int", "low": 0.5}}, ValueError, "whole number, got 0.5"),
        ({"x": {"low": 0, "high": 1}}, ValueError, "needs 'type': 'float' or 'type': 'int', got None"),
        ({"x": {**FLOAT, "lg": True}}, ValueError, "got 'lg'. Did you mean 'log'"),
        ({"x": {**FLOAT, "log": True}}, ValueError, r"space\['x'\]: `low > 0` must hold"),
        ({"x": {**FLOAT, "low": "1e-3"}}, TypeError, "low must be a number, got '1e-3'"),
        ({"x": []}, ValueError, r"space\['x'\] has no choices"),
        ({"x": ["a"]}, ValueError, "single value"),
        ({"x": FloatDistribution(0.0, 1.0, step=1.0), "y": [None]}, ValueError, r"space\['y'\] has a single"),
        ({"x": [torch.relu, torch.tanh]}, TypeError, "Give it a name"),
    ],
)
def test_refuses_a_space(space, error, message):
    with pytest.raises(error, match=message) as raised:
        create_study(space)
    assert "\n" not in str(raised.value)


# ---- samplers and pruners ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_sampler_searches_the_space(name):
    study = create_study(SPACE, sampler=name, seed=0)
    study.optimize(objective_of(square), n_trials=12)
    assert states(study) == ["COMPLETE"] * 12
    for trial in study.trials:
        assert -1 <= trial.params["x"] <= 3
        assert trial.params["width"] in range(1, 9)
        assert trial.params["kind"] in ("a", "b")
        assert trial.value == trial.params["x"] ** 2
    assert len({trial.params["x"] for trial in study.trials}) > 2


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "grid"])
def test_a_seed_makes_a_search_again(name):
    def values(seed: int) -> list[float]:
        study = create_study({"x": FLOAT, "y": FLOAT}, sampler=name, seed=seed)
        study.optimize(objective_of(square), n_trials=5)
        return [trial.params["x"] for trial in study.trials]

    assert values(1) == values(1) != values(2)


def test_a_grid_takes_every_point_once_and_stops():
    """Also over a stop: whoever goes on has the same order of points."""
    storage = optuna.storages.InMemoryStorage()
    space = {
        "x": FLOAT,
        "lr": {"type": "float", "low": 1e-4, "high": 1.0, "log": True},
        "width": {"type": "int", "low": 1, "high": 9, "step": 4},
        "kind": ["a", "b"],
    }
    expected = {
        (x, lr, width, kind)
        for x in (-1.0, 1.0, 3.0)
        for lr in (1e-4, 1e-2, 1.0)
        for width in (1, 5, 9)
        for kind in ("a", "b")
    }
    for num_trials, seed in ((20, 3), (None, 4)):
        study = create_study(space, storage=storage, sampler=make_sampler("grid", space, points=3, seed=seed))
        study.optimize(objective_of(square), n_trials=num_trials)
    points = [tuple(trial.params[name] for name in space) for trial in study.trials]
    assert len(points) == len(expected)
    assert {(x, round(lr, 12), width, kind) for x, lr, width, kind in points} == expected


def test_pruners_by_name():
    kinds = {name: type(make_pruner(name)).__name__ for name in PRUNERS}
    assert kinds == {
        "asha": "SuccessiveHalvingPruner",
        "hyperband": "HyperbandPruner",
        "median": "MedianPruner",
        "none": "NopPruner",
        "percentile": "PercentilePruner",
    }


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sampler": "tpee"}, ValueError, "sampler must be one of .*got 'tpee'. Did you mean 'tpe'?"),
        ({"pruner": "ahsa"}, ValueError, "pruner must be one of .*got 'ahsa'. Did you mean 'asha'?"),
        ({"sampler": 3}, TypeError, "sampler must be a name"),
        ({"pruner": optuna.pruners.MedianPruner}, TypeError, "pruner must be a name"),
        ({"direction": "down"}, ValueError, "'minimize' or 'maximize', got 'down'"),
        ({"name": ""}, TypeError, "names the study"),
        ({"heartbeat": 0}, ValueError, "at least 1, got 0"),
    ],
)
def test_refuses_arguments(options, error, message):
    with pytest.raises(error, match=message):
        create_study(SPACE, **options)


def test_refuses_a_grid_that_is_too_large():
    with pytest.raises(ValueError, match=r"x0, x1, x2, ... with points=5 has 2.71e\+45 points"):
        create_study({f"x{i}": FLOAT for i in range(65)}, sampler="grid")
    with pytest.raises(ValueError, match="at least 2 points"):
        make_sampler("grid", SPACE, points=1)
    with pytest.raises(ValueError, match="needs the space"):
        make_sampler("grid")


def test_says_which_package_is_missing(monkeypatch):
    monkeypatch.setattr(names, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package cmaes.*torch-hypergrad\[search\]"):
        make_sampler("cmaes")
    code = """
import sys
sys.modules["optuna"] = None
import torch_hypergrad
try:
    import torch_hypergrad.search
except ModuleNotFoundError as error:
    print(error)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'torch-hypergrad[search]'" in printed
    assert len(printed.splitlines()) == 1


# ---- storages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_study_goes_on_where_it_was(url, sampler):
    first = create_study(SPACE, storage=url, sampler=sampler, seed=0)
    first.optimize(objective_of(square), n_trials=3)
    second = create_study(SPACE, storage=url, sampler=sampler, seed=0)
    assert [trial.params for trial in second.trials] == [trial.params for trial in first.trials]
    second.optimize(objective_of(square), n_trials=3)
    assert states(second) == ["COMPLETE"] * 6
    assert len({trial.params["x"] for trial in second.trials}) == 6, "a seed must not draw the same again"
    assert second.best_value == min(trial.value for trial in first.trials)


OTHER_STUDIES = [
    ({"space": {**SPACE, "x": {**FLOAT, "high": 4}}}, "has another space: its 'x' .*high=3.*got .*high=4"),
    ({"space": {"x": FLOAT, "kind": ["a", "b"]}}, "its 'width' is .*got none"),
    ({"space": {**SPACE, "new": [1, 2]}}, "its 'new' is not searched, got"),
    ({"space": {**SPACE, "kind": ["b", "a"]}}, "its 'kind' is"),
    ({"direction": "maximize"}, "is to minimize, got direction='maximize'"),
    ({"name": "serch"}, "storage of another study: it holds 'search', and none named 'serch'"),
]


def test_refuses_to_go_on_with_another_study(url):
    study = create_study(SPACE, storage=url)
    study.optimize(objective_of(square), n_trials=2)
    before = study.trials
    for options, message in OTHER_STUDIES:
        with pytest.raises(ValueError, match=message) as raised:
            create_study(**{"space": SPACE, **options}, storage=url)
        assert "\n" not in str(raised.value)
    assert study.trials == before
    assert optuna.get_all_study_names(make_storage(url)) == ["search"]


def test_refuses_a_study_that_was_made_otherwise(url):
    storage = make_storage(url)
    study = optuna.create_study(storage=storage, study_name="search")
    study.add_trial(create_trial(value=1.0))
    with pytest.raises(ValueError, match=r"not made by torch_hypergrad.search.*load_study"):
        create_study(SPACE, storage=url)
    with pytest.raises(ValueError, match="has no space"):
        objective_of(square)(SimpleNamespace(study=optuna.create_study()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("storage", "error", "message"),
    [
        ("sqlite:///nowhere/x.db", ConnectionError, "cannot be reached: unable to open database file"),
        ("journal:///nowhere/x.log", ConnectionError, "cannot be reached: .*No such file or directory"),
        ("redis://:secret@localhost:1", (ConnectionError, ModuleNotFoundError), "redis://:.*@localhost:1 "),
        ("postgresql://me:secret@localhost:1/db", (ConnectionError, ModuleNotFoundError), r"me:\*\*\*@local"),
        ("sqllite:///x.db", ValueError, "got 'sqllite'. Did you mean 'sqlite'?"),
        ("x.db", ValueError, "got 'x.db'.*'sqlite:///path.db'"),
        ("journal://x.log", ValueError, "has no file"),
        ("sqlite:///:memory:", ValueError, "Pass None for a study in memory|pass None"),
        (3, TypeError, "got 3"),
    ],
)
def test_refuses_a_storage(storage, error, message):
    with pytest.raises(error, match=message) as raised:
        create_study(SPACE, storage=storage)
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("scheme", ["sqlite", "journal"])
def test_refuses_a_file_of_something_else(scheme, tmp_path):
    file = tmp_path / "picture.png"
    file.write_bytes(b"\x89PNG\r\n" * 400)
    with pytest.raises(ConnectionError, match="cannot be reached"):
        create_study(SPACE, storage=f"{scheme}:///{file}")
    assert file.read_bytes() == b"\x89PNG\r\n" * 400


def test_takes_optunas_storage():
    storage = optuna.storages.InMemoryStorage()
    create_study(SPACE, storage=storage).optimize(objective_of(square), n_trials=2)
    assert len(create_study(SPACE, storage=storage).trials) == 2


# ---- workers -----------------------------------------------------------------------------------------------


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_killed_workers_trial_is_tried_again(url, tmp_path):
    begun = tmp_path / "begun"
    study = create_study(search_worker.SPACE, storage=url, heartbeat=search_worker.HEARTBEAT)
    worker = subprocess.Popen([sys.executable, search_worker.__file__, url, str(begun)])
    try:
        objective = objective_of(square)
        wait_for(lambda: begun.exists() or worker.poll() is not None)
        lost = int(begun.read_text())
        time.sleep(2.5 * search_worker.HEARTBEAT)
        study.optimize(objective, n_trials=2)
        assert study.trials[lost].state == TrialState.RUNNING, "a slow trial is not a dead one"
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait()

    def tried_again() -> bool:
        study.optimize(objective, n_trials=1)
        time.sleep(0.1)
        return any(trial.system_attrs.get("failed_trial") == lost for trial in study.trials if trial.value)

    wait_for(tried_again, 20)
    (again,) = [trial for trial in study.trials if trial.system_attrs.get("failed_trial") == lost]
    assert study.trials[lost].state == FAIL
    assert study.trials[lost].intermediate_values == {1: 0.5}
    assert again.params == study.trials[lost].params
    assert all(trial.state == COMPLETE for trial in study.trials if trial.number != lost)
    assert all(trial.value == trial.params["x"] ** 2 for trial in study.trials if trial.number != lost)


def stale(study: optuna.Study) -> None:
    """A trial of a worker that died long ago."""
    running = create_trial(
        state=TrialState.RUNNING,
        params={"x": 0.5},
        distributions=make_space({"x": FLOAT}),
        user_attrs={"heartbeat": 0.0},
    )
    running.datetime_start = running.datetime_start and running.datetime_start.replace(year=2020)
    study.add_trial(running)


def test_many_workers_queue_a_lost_trial_once(tmp_path):
    url = f"journal:///{tmp_path}/study.log"
    study = create_study({"x": FLOAT}, storage=url)
    stale(study)
    barrier = threading.Barrier(4)

    def join() -> None:
        barrier.wait()
        create_study({"x": FLOAT}, storage=url)

    threads = [threading.Thread(target=join) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert states(study) == ["FAIL", "WAITING"]


def test_a_trial_is_not_tried_again_for_ever(tmp_path):
    study = create_study({"x": FLOAT}, storage=f"journal:///{tmp_path}/study.log")
    stale(study)
    for _ in range(6):
        create_study({"x": FLOAT}, storage=f"journal:///{tmp_path}/study.log")
        if "WAITING" in states(study):  # a worker takes it, and dies at once
            trial = study.ask()
            trial.set_user_attr("heartbeat", 0.0)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(time, "time", partial(float, time.time() + 1000))
                create_study({"x": FLOAT}, storage=f"journal:///{tmp_path}/study.log")
    assert states(study) == ["FAIL"] * 4


def test_an_own_objective_is_watched(tmp_path):
    storage = make_storage(f"journal:///{tmp_path}/study.log")
    study = optuna.create_study(storage=storage)
    stale(study)
    study.optimize(watched(lambda trial: trial.suggest_float("x", -1, 3) ** 2, interval=60), n_trials=2)
    assert states(study) == ["FAIL", "COMPLETE", "COMPLETE"]
    assert study.trials[2].params == {"x": 0.5}
    assert time.time() - study.trials[1].user_attrs["heartbeat"] < 60


# ---- objectives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [math.nan, math.inf, SolverError("CG did\nnot converge.")])
def test_what_cannot_be_used_prunes_the_trial(end):
    def train(trial: optuna.Trial, settings: dict[str, Any]) -> float:
        if trial.number == 1 and isinstance(end, SolverError):
            raise end
        return end if trial.number == 1 else 1.0

    study = create_study(SPACE, seed=0)
    study.optimize(objective_of(train), n_trials=3)
    assert states(study) == ["COMPLETE", "PRUNED", "COMPLETE"]
    reason = study.trials[1].user_attrs["pruned_because"]
    assert reason in (
        "SolverError: CG did not converge.",
        f"NonFiniteError: The validation loss is {end}. These settings do not train.",
    )


def test_other_errors_stop_the_search():
    study = create_study(SPACE)
    with pytest.raises(TypeError, match="train must return the validation loss as one number, got None"):
        study.optimize(objective_of(lambda trial, settings: None), n_trials=3)
    assert states(study) == ["FAIL"]


# ---- hypergradients in trials ------------------------------------------------------------------------------

BATCH, VAL = random_batch(20, 4, seed=0), random_batch(20, 4, seed=1)


def tuner(lr: float, method: Any = None, name: str = "lr", **options: Any) -> HyperOptimizer:
    model = tanh_mlp()
    return HyperOptimizer(
        model,
        torch.optim.SGD(model.parameters(), lr=lr, weight_decay=0.1),
        mse,
        [Hyperparameter(name, **options)],
        method or Unrolled(),
        partial(torch.optim.SGD, lr=0.01),
    )


def run(trial: optuna.Trial, hyper: HyperOptimizer, num_steps: int = 20, every: int = 5) -> float:
    with hypergradients(trial, hyper) as tuning:
        for step in range(1, num_steps + 1):
            tuning.step(BATCH)
            if step % every == 0:
                tuning.hyper_step(VAL)
    return float(hyper.validation_loss(VAL))


def test_a_trial_trains_and_tunes_as_without_optuna():
    alone = tuner(0.05)
    losses = []
    for step in range(1, 21):
        alone.step(BATCH)
        if step % 5 == 0:
            losses.append(alone.hyper_step(VAL).val_loss)
    study = optuna.create_study()
    study.optimize(lambda trial: run(trial, tuner(0.05)), n_trials=1)
    (trial,) = study.trials
    assert (
        trial.user_attrs["tuned"] == {"lr/group0": alone.values()["lr/group0"].item()} != {"lr/group0": 0.05}
    )
    assert trial.intermediate_values == dict(zip((5, 10, 15, 20), losses))
    assert trial.value == float(alone.validation_loss(VAL))


@pytest.mark.parametrize(
    ("method", "options", "cost"),
    [
        (Unrolled(), {}, 20 + 4 * (1 + 3 * 5)),
        (Unrolled(truncation=2), {}, 20 + 4 * (1 + 3 * 2)),
        (DrMAD(num_points=2), {}, 20 + 4 * (1 + 3 * 2)),
        (DrMAD(), {}, 20 + 4 * (1 + 3)),
        (ForwardMode(), {}, 20 + 4 * (1 + 2 * 5)),
        (ForwardMode(), {"per": "tensor"}, 20 + 4 * (1 + 2 * 5 * 4)),
    ],
)
def test_cost_is_counted_in_training_steps(method, options, cost):
    study = optuna.create_study()
    study.optimize(lambda trial: run(trial, tuner(0.05, method, **options)), n_trials=1)
    assert study.trials[0].user_attrs["cost"] == cost


def test_the_cost_of_an_implicit_hyper_step_is_that_of_its_products():
    method = Implicit(CG(50), num_batches=2, curvature="gauss_newton")
    hyper = tuner(0.05, method, "weight_decay", per="element", log=True)
    trial = optuna.create_study().ask()
    with hypergradients(trial, hyper) as tuning:
        for _ in range(5):
            tuning.step(BATCH)
        report = tuning.hyper_step(VAL)
        tuning.spend(7)
    assert report.num_matvecs is not None
    assert report.num_matvecs > 1
    cost = 3 + 2 * report.num_matvecs * 2
    assert trial.user_attrs["cost"] == 5 + cost + 7
    assert cost == hyper_step_cost(hyper, report, 5)
    assert trial.user_attrs["tuned"]["weight_decay/0.weight"] == (
        hyper.values()["weight_decay/0.weight"].tolist()
    )


def test_of_many_values_the_range_is_kept():
    model = torch.nn.Linear(101, 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tune = [Hyperparameter("weight_decay", per="element", init=0.25)]
    hyper = HyperOptimizer(model, optimizer, mse, tune, Unrolled(), partial(torch.optim.SGD, lr=0.1))
    trial = optuna.create_study().ask()
    with hypergradients(trial, hyper):
        pass
    assert trial.user_attrs["tuned"] == {
        "weight_decay/weight": {"min": 0.25, "mean": 0.25, "max": 0.25},
        "weight_decay/bias": [0.25],
    }


def test_the_pruner_sees_the_validation_loss():
    pruner = make_pruner("median", n_startup_trials=1, n_warmup_steps=6)
    study = create_study({"lr": [0.1, 1e-6]}, pruner=pruner)
    study.enqueue_trial({"lr": 0.1})
    study.enqueue_trial({"lr": 1e-6})
    study.optimize(objective_of(lambda trial, settings: run(trial, tuner(settings["lr"]))), n_trials=2)
    assert states(study) == ["COMPLETE", "PRUNED"]
    assert list(study.trials[1].intermediate_values) == [5, 10]
    assert study.trials[1].user_attrs["cost"] == 10 + 2 * (1 + 3 * 5)
    assert best_so_far(study) == ([84.0], [study.trials[0].value])


def test_an_error_of_a_hypergradient_prunes_the_trial():
    study = optuna.create_study()
    study.optimize(lambda trial: run(trial, tuner((0.05, 1e9)[trial.number % 2])), n_trials=3)
    assert states(study) == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert study.trials[1].user_attrs["pruned_because"].startswith("NonFiniteError: ")
    num_hyper_steps = len(study.trials[1].intermediate_values)
    assert study.trials[1].user_attrs["cost"] == 5 * (num_hyper_steps + 1) + 16 * num_hyper_steps


def test_another_error_is_the_users():
    def fails(trial: optuna.Trial) -> float:
        with hypergradients(trial, tuner(0.05)) as tuning:
            tuning.step(BATCH)
            raise KeyError("mine")

    study = optuna.create_study()
    with pytest.raises(KeyError, match="mine"):
        study.optimize(fails, n_trials=1)
    assert study.trials[0].user_attrs["cost"] == 1
    with (
        pytest.raises(TypeError, match="takes a HyperOptimizer, got Linear"),
        hypergradients(
            study.ask(),
            torch.nn.Linear(1, 1),  # type: ignore[arg-type]
        ),
    ):
        pass


@pytest.mark.parametrize(("direction", "best"), [("minimize", [3, 2, 2]), ("maximize", [3, 3, 4])])
def test_best_so_far_against_the_cost_of_all(direction, best):
    study = optuna.create_study(direction=direction)
    for value, cost in ((3.0, 10), (2.0, 5), (None, 7), (4.0, 1)):
        state = COMPLETE if value else PRUNED
        study.add_trial(create_trial(state=state, value=value, user_attrs={"cost": cost}))
    assert best_so_far(study) == ([10.0, 15.0, 23.0], best)
    study.add_trial(create_trial(value=1.0))
    with pytest.raises(ValueError, match="Trial 4 has no cost"):
        best_so_far(study)


# ---- examples ----------------------------------------------------------------------------------------------


def test_an_optuna_objective_gets_hypergradients():
    rows = rows_of(run_example("optuna_hypergradient.py", "--steps", 40, "--seeds", 1, "--trials", 3))
    (num_alone, cost_alone, *alone), (num_tuned, cost_tuned, *tuned) = (
        [mean(cell) for cell in rows[name]] for name in ("search alone", "with hypergradients")
    )
    assert num_alone > num_tuned == 3
    assert cost_tuned == 3 * (40 + 2 * (3 + 2 * (10 + 8))), "two hyper steps; 8 products are for the scale"
    assert cost_tuned <= cost_alone < cost_tuned + 40
    for val_loss, accuracy, test_loss in (alone, tuned):
        assert 0.1 < val_loss < 1
        assert 70 < accuracy < 99
        assert 0.1 < test_loss < 1


def test_hybrid_search(tmp_path):
    printed = run_example(
        "hybrid_search.py", "--steps", 40, "--seeds", 1, "--trials", 3, "--keep", "--out", tmp_path
    )
    rows = rows_of(printed)
    for name, num_trials in (("hybrid", 3), ("search alone", 7)):
        number, cost, val_loss, accuracy, _ = map(mean, rows[name])
        assert number >= num_trials
        assert cost >= 3 * (40 + 2 * (3 + 2 * 10))
        assert 0.1 < val_loss < 2
        assert 40 < accuracy < 99
    assert {path.name for path in tmp_path.glob("*.log")} == {"hybrid-0.log", "alone-0.log"}
    check_picture(tmp_path / "hybrid_search.png", printed)
