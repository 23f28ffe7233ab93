"""A search from the command line: trials are runs, a study goes on, and rivals search at equal cost."""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
import subprocess
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml

from runs import SURROUNDINGS, command, run_command
from test_configurations import refused
from test_resume import NO_STOP
from torch_hypergrad.cli import main
from torch_hypergrad.experiment import search as experiment_search
from torch_hypergrad.experiment.config import Config
from torch_hypergrad.experiment.parsing import read_config
from torch_hypergrad.experiment.run_folder import RunFolder
from torch_hypergrad.experiment.search import report_of_study
from torch_hypergrad.experiment.start import run_in
from torch_hypergrad.experiment.study import COST, FOLDER, REASON, Search, name_of

RUNNING, COMPLETE, _, FAIL, WAITING = optuna.trial.TrialState

SMALL = """
task: {name: ImageClassification, train_size: 60, val_size: 40, test_size: 50}
model: {name: MLP, hidden: [8]}
optimizer: {name: SGD, lr: 0.1, momentum: 0.9}
tune: {weight_decay: {per: tensor, init: 1.0e-2, log: true}}
method: {name: Implicit, solver: {name: CG, damping: 0.1, max_steps: 5}, curvature: gauss_newton}
train: {steps: 20, batch_size: 20, hyper_every: 10, threads: 1}
space:
  model.hidden: [[4], [8, 8]]
  optimizer.lr: {type: float, low: 1.0e-3, high: 0.3, log: true}
output: {loggers: []}
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("search") / "small.yaml"
    file.write_text(SMALL)
    return file


@pytest.fixture(scope="module")
def searched(file: Path) -> tuple[Path, str]:
    folder, out = file.parent / "out", io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        assert main(["search", "--config", str(file), "--output.folder", str(folder), "--trials=5"]) == 0
    return folder, out.getvalue()


def study_of(folder: Path, name: str = "small") -> optuna.Study:
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(folder / "study.log"))
    )
    return optuna.load_study(study_name=name, storage=storage)


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.usefixtures("no_report")
def test_trials_are_runs_that_anyone_can_train_again(searched: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = searched
    trials = study_of(folder).trials
    assert len(trials) == 5
    for trial in trials:
        run = Path(trial.user_attrs[FOLDER])
        summary = summary_of(run)
        assert trial.value == summary["val"]["loss"]
        assert trial.user_attrs[COST] == summary["cost"] > 20, "hyper steps cost, too"
        assert summary["num_values"] == 2 * (1 + len(yaml.safe_load(trial.params["model.hidden"])))
        config = read_config(run / "config.yaml")
        assert config.optimizer["lr"] == trial.params["optimizer.lr"]
        assert config.model["hidden"] == yaml.safe_load(trial.params["model.hidden"])
    again = tmp_path / "again"
    run = Path(trials[0].user_attrs[FOLDER])
    assert main(["train", "--config", str(run / "config.yaml"), "--output.folder", str(again)]) == 0
    ours, theirs = (torch.load(path / "model.pt", weights_only=True) for path in (run, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_table_and_the_report_name_the_best(searched: tuple[Path, str]) -> None:
    folder, told = searched
    best = study_of(folder).best_trial
    assert re.search(rf"\| trial {best.number} +\| .* {best.value:.4f} \|", told)
    page = (folder / "report" / "report.html").read_text()
    accuracy = 100 * summary_of(Path(best.user_attrs[FOLDER]))["test"]["accuracy"]
    assert f"{best.value:.4f}" in page
    assert f"{accuracy:.1f} %" in page
    for name in ("best_so_far", "importance", "parallel"):
        assert (folder / "report" / f"{name}.png").stat().st_size > 5000


def test_a_study_goes_on(searched: tuple[Path, str], file: Path) -> None:
    folder, _ = searched
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/model.pt")}
    assert main(["search", "--config", str(file), "--output.folder", str(folder), "--trials=6"]) == 0
    assert len(study_of(folder).trials) == 6
    assert before.items() <= {path: path.stat().st_mtime_ns for path in folder.glob("*/model.pt")}.items()


@pytest.mark.slow
def test_workers_are_processes(file: Path, tmp_path: Path) -> None:
    arguments = ["search", "--config", file, "--output.folder", tmp_path / "out", "--workers", 3]
    done = run_command(*arguments, "--trials", 4, "--sampler=random")
    assert done.returncode == 0, done.stderr
    trials = study_of(tmp_path / "out").trials
    assert len([trial for trial in trials if trial.value is not None]) == 4
    assert done.stderr.count("validation loss") == 4


@pytest.mark.parametrize(("scheme", "sampler"), [("journal", "random"), ("sqlite", "grid")])
def test_a_trial_too_many_is_taken_back(
    scheme: str, sampler: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker begins one after we have counted, and before ours."""
    url, space = f"{scheme}:///{tmp_path}/study", {"optimizer.lr": [0.1, 0.05, 0.01, 0.15]}
    ours = search(file, tmp_path / "out", space=space, storage=url, sampler=sampler, num_trials=3)
    rivals: list[optuna.Trial] = []

    counted = Search._over

    def counts(self: Search, study: optuna.Study) -> bool:
        over = counted(self, study)
        if not over and len(study.trials) == 2:
            rivals.append(ours.study().ask())
        return over

    monkeypatch.setattr(Search, "_over", counts)
    with contextlib.redirect_stderr(io.StringIO()) as told, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a rival in a database has no heartbeat
        ours(NO_STOP)
    study = ours.study()
    states = [trial.state for trial in study.trials]
    assert states[:4] == [COMPLETE, COMPLETE, RUNNING, FAIL]
    assert states[4:] == [WAITING] * (sampler == "grid"), "its point would not come again"
    assert told.getvalue().count("\n") == told.getvalue().count("validation loss") == 2
    study._storage.set_trial_state_values(rivals[0]._trial_id, FAIL)
    ours(NO_STOP)
    complete = study.get_trials(states=(COMPLETE,))
    assert len(complete) == 3, "one that failed is made up for"
    if sampler == "grid":
        assert complete[-1].params == study.trials[3].params
    assert "A search of 3 trials" in report_of_study(ours).read_text()


def test_a_worker_with_nothing_left_to_do_has_not_failed(file: Path, tmp_path: Path) -> None:
    ours = search(file, tmp_path / "out", sampler="random", num_trials=1)
    ours.study().ask()  # another one trains the only trial
    ours(NO_STOP)
    assert [trial.state for trial in ours.study().trials] == [RUNNING]


def test_workers_elsewhere_join_by_the_url(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment_search, "report_of_study", lambda _: "not drawn")
    url = f"sqlite:///{tmp_path}/study.db"
    for folder, trials in (("here", 2), ("there", 4)):
        arguments = ["search", "--config", str(file), "--output.folder", str(tmp_path / folder)]
        assert main([*arguments, "--storage", url, f"--trials={trials}", "--sampler=random"]) == 0
    trials = optuna.load_study(study_name="small", storage=url).trials
    assert [Path(trial.user_attrs[FOLDER]).parent.name for trial in trials] == ["here"] * 2 + ["there"] * 2


def test_a_stopped_search_goes_on_with_its_trial(file: Path, tmp_path: Path) -> None:
    arguments = [
        *("search", "--config", file, "--output.folder", tmp_path / "out", "--trials", 1, "--sampler=random"),
        *("--train.steps=800", "--train.hyper_every=400", "--output.checkpoint_every=50"),
    ]
    process = subprocess.Popen(
        command(*arguments),
        env=SURROUNDINGS,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        encoding="utf-8",
    )
    for _ in range(3000):
        if list(tmp_path.glob("out/*/checkpoints/*.pt")):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, told
    assert f"--output.folder {tmp_path / 'out'}" in told.splitlines()[-1]
    (run,) = tmp_path.glob("out/*/config.yaml")
    assert main([str(word) for word in arguments]) == 0
    assert [path.parent for path in tmp_path.glob("out/*/summary.json")] == [run.parent], "the same settings"
    undisturbed = RunFolder(tmp_path / "undisturbed")
    assert run_in(read_config(run), undisturbed, NO_STOP, quiet=True)
    ours, theirs = (torch.load(path / "model.pt") for path in (run.parent, undisturbed.path))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def search(file: Path, folder: Path, **options: Any) -> Search:
    config: Config = read_config(file)
    return Search(config, options.pop("space", config.space), folder, **options)


def test_a_pruner_gives_runs_up(file: Path, tmp_path: Path) -> None:
    """Learning rates that barely move are worse than the median of those that train."""
    space = {"optimizer.lr": [0.2, 0.1, 0.05, 0.15, 1e-6, 2e-6]}
    study = search(file, tmp_path, space=space, sampler="grid", pruner="median")
    study(NO_STOP)
    trials = study.study().trials
    pruned = [
        trial.params["optimizer.lr"] for trial in trials if trial.state == optuna.trial.TrialState.PRUNED
    ]
    assert len(trials) == 6
    assert all(trial.user_attrs[COST] > 0 for trial in trials)
    assert set(pruned) <= {1e-6, 2e-6, 0.05, 0.1}
    unfinished = [trial for trial in trials if not RunFolder(Path(trial.user_attrs[FOLDER])).finished]
    assert len(unfinished) == len(pruned)


def test_a_trial_that_cannot_train_is_left_out_with_its_reason(file: Path, tmp_path: Path) -> None:
    space = {"optimizer": [{"name": "SGD", "lr": 0.1}, {"name": "SGD", "lr": 1e30}]}
    study = search(file, tmp_path, space=space, sampler="grid")
    study(NO_STOP)
    (failed,) = [trial for trial in study.study().trials if REASON in trial.user_attrs]
    assert "1.0e+30" in failed.params["optimizer"]
    assert "Training stopped" in failed.user_attrs[REASON]
    assert study.study().best_trial.params["optimizer"] != failed.params["optimizer"]


def test_skipped_hyper_steps_of_trials_are_told_in_their_line(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diverges = [{"name": "Implicit", "solver": {"name": "Neumann", "scale": scale}} for scale in (1e3, 1e4)]
    search(file, tmp_path, space={"method": diverges}, sampler="grid")(NO_STOP)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.endswith("; 2 of 2 hyper steps were skipped") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler=tpee"], "Did you mean 'tpe'?"),
        (["--pruner=medan"], "Did you mean 'median'?"),
        (["--storage=nowhere://x"], "storage must be None or a URL that begins with 'journal'"),
        (["--space={}"], "space is empty"),
        (["--space.optimizer.mometum=[0.1, 0.2]"], "optimizer: SGD has no mometum. Did you mean momentum?"),
        (["--space.trian.steps=[10, 20]"], "Unknown key trian. The nearest is train;"),
        (
            ["--space.optimizer.lr={type: int, low: 0.1, high: 3}"],
            "low of an int range must be a whole number",
        ),
        (["--space.optimizer.lr={low: 0.1, high: 3}"], "a range needs 'type'"),
        (["--space.optimizer.lr={type: float, low: 3, high: 0.1}"], "must be below high"),
        (
            ["--space.train.batch_size={type: float, low: 1.5, high: 3.5}"],
            "train.batch_size: got 1.5, expected int",
        ),
        (["--space.optimizer.lr=0.1"], "space['optimizer.lr'] must be"),
        (["--trials=0"], "must be at least 1"),
        (["--workers=0"], "must be at least 1"),
        (["--trials=some"], "trials"),
        (["--space=3"], "space is a section"),
    ],
)
def test_a_bad_search_is_refused(arguments: list[str], message: str, file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert message in refused("search", "--config", file, "--output.folder", folder, *arguments)
    assert not folder.exists()


def test_a_storage_of_another_study_is_refused(searched: tuple[Path, str], file: Path) -> None:
    folder, _ = searched
    told = refused(
        "search", "--config", file, "--output.folder", folder, "--space={optimizer.lr: [0.1, 0.2]}"
    )
    assert "has another space" in told


def test_a_study_of_another_configuration_is_refused(searched: tuple[Path, str], file: Path) -> None:
    """Its trials would not be comparable, and nothing in their settings would tell."""
    folder, _ = searched
    told = refused("search", "--config", file, "--output.folder", folder, "--trials=9", "--train.steps=40")
    assert "trials of another configuration: train.steps was 20, is 40" in told
    assert len(study_of(folder).trials) < 9


def test_names_tell_settings_apart() -> None:
    close = {name_of({"optimizer.lr": value}) for value in (0.1, 0.1 + 1e-12, 0.1 - 1e-12)}
    assert len(close) == 3
    assert all(name.startswith("lr=0.1-") for name in close)
    assert "/" not in name_of({"task.root": "../../x", "model": "{name: MLP}"})
    assert len(name_of({f"a.key{i}": "x" * 50 for i in range(20)})) < 120


def test_a_budget_is_met_to_the_nearest_trial(file: Path, tmp_path: Path) -> None:
    config = replace(read_config(file), tune={}, method=None)
    space = {"optimizer.lr": {"type": "float", "low": 0.01, "high": 0.1}}
    for budget, expected in ((20, 1), (49, 2), (51, 3)):
        study = Search(config, space, tmp_path / str(budget), "random", budget=budget)
        study(NO_STOP)
        assert len(study.study().trials) == expected
    study.study().ask()  # one that has just begun elsewhere will cost 20 steps as well
    for budget, over in ((89, True), (91, False)):
        assert replace(study, budget=budget)._over(study.study()) is over
