"""A run that is stopped, killed or damaged goes on and ends bit for bit where the uninterrupted one ends."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from runs import CONFIGURATIONS, SURROUNDINGS, check_equal_runs, command, metrics_of, run_command
from torch_hypergrad.experiment.build import build
from torch_hypergrad.experiment.config import Config, ConfigError
from torch_hypergrad.experiment.loop import Run
from torch_hypergrad.experiment.parsing import read_config
from torch_hypergrad.experiment.run_folder import RunFolder
from torch_hypergrad.experiment.start import resume, run_in
from torch_hypergrad.experiment.stopping import StopRequest

NO_STOP = StopRequest()


class StopAfter(StopRequest):
    """A stop that is requested after so many looks at it, one before each step."""

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self._left = num_steps

    @property
    def requested(self) -> bool:
        self._left -= 1
        return self._left < 0


@pytest.fixture(scope="module", params=list(CONFIGURATIONS))
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A configuration, and an uninterrupted run of it."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "config.yaml").write_text(CONFIGURATIONS[request.param])
    config = read_config(folder / "config.yaml")
    assert run_in(config, RunFolder(folder / "run"), NO_STOP, quiet=True)
    return config, folder / "run"


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("*.pt"))


# ---- exact resume ------------------------------------------------------------------------------------------


def test_runs_are_reproducible(whole: tuple[Config, Path], tmp_path: Path) -> None:
    config, run = whole
    run_in(config, RunFolder(tmp_path), NO_STOP, quiet=True)
    check_equal_runs(tmp_path, run)


def test_a_run_stopped_anywhere_ends_the_same(whole: tuple[Config, Path], tmp_path: Path) -> None:
    config, run = whole
    folder, total = RunFolder(tmp_path), metrics_of(run)[-1]["step"]
    stops = random.Random(0).sample(range(1, max(2, total // 2)), 3)
    for num_steps in stops:
        if not folder.finished:
            run_in(config, folder, StopAfter(num_steps), quiet=True)
    run_in(config, folder, NO_STOP, quiet=True)
    check_equal_runs(tmp_path, run)


def test_a_run_that_is_lost_between_two_checkpoints_ends_the_same(
    whole: tuple[Config, Path], tmp_path: Path
) -> None:
    """As a power cut leaves it: rows after the last checkpoint, half a row, a half-written checkpoint."""
    config, run = whole
    run_in(config, RunFolder(tmp_path), StopAfter(max(1, metrics_of(run)[-1]["step"] // 2)), quiet=True)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 99999, "loss": 1.0}\n{"kind": "tr')
    (tmp_path / "checkpoints" / "step-00009999-0123456789abcdef.pt.tmp").write_bytes(b"half")
    run_in(config, RunFolder(tmp_path), NO_STOP, quiet=True)
    check_equal_runs(tmp_path, run)
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("harm", [damage, cut])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    whole: tuple[Config, Path], tmp_path: Path, harm: object, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = whole
    run_in(config, RunFolder(tmp_path), StopAfter(metrics_of(run)[-1]["step"] - 1), quiet=True)
    *_, before, newest = checkpoints(tmp_path)
    harm(newest)  # type: ignore[operator]
    capsys.readouterr()
    run_in(config, RunFolder(tmp_path), NO_STOP, quiet=True)
    told = capsys.readouterr().err
    assert newest.stem in told
    assert "damaged" in told
    assert f"Going on after step {int(before.name.split('-')[1])}." in told
    check_equal_runs(tmp_path, run)


def test_without_a_whole_checkpoint_a_run_begins_again(whole: tuple[Config, Path], tmp_path: Path) -> None:
    config, run = whole
    run_in(config, RunFolder(tmp_path), StopAfter(3), quiet=True)
    for path in checkpoints(tmp_path):
        cut(path)
    run_in(config, RunFolder(tmp_path), NO_STOP, quiet=True)
    check_equal_runs(tmp_path, run)


def test_the_last_checkpoints_are_kept(whole: tuple[Config, Path]) -> None:
    config, run = whole
    kept = [int(path.name.split("-")[1]) for path in checkpoints(run)]
    every, total = config.output.checkpoint_every, metrics_of(run)[-1]["step"]
    assert every is not None
    assert kept == list(range(every, total, every))[-config.output.keep_checkpoints :]


def test_damaged_checkpoints_do_not_push_whole_ones_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    for step in (1, 2, 3):
        newest = folder.save_checkpoint(step, {"step": step}, keep=2)
    damage(newest)
    state, damaged = folder.load_checkpoint()
    assert state == {"step": 2}
    assert [path.stem for path in damaged] == [newest.stem]
    folder.save_checkpoint(2, {"step": "again"}, keep=1)
    assert folder.load_checkpoint() == ({"step": "again"}, [])


# ---- refusals ----------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no folder of a run: it has no config\.yaml"):
        resume(tmp_path)


def test_a_finished_run_stays_as_it_is(
    whole: tuple[Config, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = whole
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert resume(run) == (run, None)
    assert "finished already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def test_two_processes_cannot_train_in_one_folder(whole: tuple[Config, Path], tmp_path: Path) -> None:
    config, _ = whole
    folder = RunFolder(tmp_path)
    folder.create(config)
    with folder.locked(), pytest.raises(ConfigError, match="Another process is training"):
        run_in(config, RunFolder(tmp_path), NO_STOP, quiet=True)


def test_another_configuration_in_the_same_folder_is_refused(whole: tuple[Config, Path]) -> None:
    config, run = whole
    other = replace(config, train=replace(config.train, seed=99))
    with pytest.raises(
        ConfigError, match=r"holds a run of another configuration: train\.seed was \d+, is 99"
    ):
        run_in(other, RunFolder(run), NO_STOP, quiet=True)
    quieter = replace(config, output=replace(config.output, log_every=7))
    assert run_in(quieter, RunFolder(run), NO_STOP, quiet=True)


def test_a_checkpoint_that_does_not_fit_an_edited_configuration_is_refused(tmp_path: Path) -> None:
    for name, file in CONFIGURATIONS.items():
        (tmp_path / f"{name}.yaml").write_text(file)
    unrolled, implicit = (read_config(tmp_path / f"{name}.yaml") for name in ("unrolled", "implicit"))
    run_in(unrolled, RunFolder(tmp_path / "run"), StopAfter(3), quiet=True)
    (tmp_path / "run" / "config.yaml").unlink()
    RunFolder(tmp_path / "run").create(implicit)
    with pytest.raises(
        ConfigError, match=r"edited after the run had begun: .*optimizer\.name was Adam, is SGD.* Undo it"
    ):
        resume(tmp_path / "run")


def test_a_checkpoint_of_another_network_is_refused(whole: tuple[Config, Path], tmp_path: Path) -> None:
    """As one of a module of one's own that was changed since, which the configuration does not show."""
    config, _ = whole
    folder = RunFolder(tmp_path)
    run_in(config, folder, StopAfter(9), quiet=True)
    state, _ = folder.load_checkpoint()
    assert state is not None
    model = state["training"]["model"]
    model[next(iter(model))] = model[next(iter(model))][..., :1]
    folder.save_checkpoint(state["progress"]["step"] + 1, state, keep=2)
    with pytest.raises(ConfigError, match=r"does not fit its configuration: "):
        run_in(config, folder, NO_STOP, quiet=True)


def test_checkpoints_hold_no_pictures(whole: tuple[Config, Path], tmp_path: Path) -> None:
    """Batches are row numbers: a trajectory does not carry its images along."""
    config, _ = whole
    run = Run(config, build(config), RunFolder(tmp_path))
    batch = run.parts.train_order.batch(0)
    assert batch.dtype.is_floating_point is False
    assert batch.dim() == 1


# ---- real processes ----------------------------------------------------------------------------------------


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments),
        env=SURROUNDINGS,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def wait_for(there: Iterator[bool], process: subprocess.Popen[str]) -> bool:
    """Whether it came true before the process ended."""
    for is_there in there:
        if is_there:
            return True
        if process.poll() is not None:
            return False
    return False


def training_goes_on(folder: Path) -> Iterator[bool]:
    while True:
        yield (folder / "metrics.jsonl").exists()
        time.sleep(0.002)


def checkpoint_is_written(folder: Path) -> Iterator[bool]:
    while True:
        yield any(name.endswith(".tmp") for name in os.listdir(folder)) if folder.exists() else False


def kill_and_resume(config: Path, run: Path, num_kills: int, seed: int) -> int:
    """Kills training ``num_kills`` times, every other time while it writes a checkpoint;
    how often it was writing."""
    moments, killed, writing = random.Random(seed), 0, 0
    arguments: list[object] = ["train", "--config", config, "--output.folder", run]
    while killed < num_kills:
        process = start(*arguments)
        if wait_for(training_goes_on(run), process):
            if killed % 2:
                wait_for(checkpoint_is_written(run / "checkpoints"), process)
            else:
                time.sleep(moments.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (run / "summary.json").exists(), "the run ended before it was killed: make it longer"
        writing += any(path.suffix == ".tmp" for path in (run / "checkpoints").glob("*"))
        killed += 1
        arguments = ["resume", run]
    done = run_command(*arguments)
    assert done.returncode == 0, done.stderr
    return writing


def kill_test(name: str, longer: str, num_kills: int, tmp_path: Path) -> int:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIGURATIONS[name])
    printed = run_command("train", "--config", config, longer, "--print_config")
    assert printed.returncode == 0, printed.stderr
    config.write_text(printed.stdout)
    done = run_command("train", "--config", config, "--output.folder", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    writing = kill_and_resume(config, tmp_path / "killed", num_kills, seed=num_kills)
    check_equal_runs(tmp_path / "killed", tmp_path / "whole")
    return writing


@pytest.mark.slow  # tests/test_kept_runs.py kills at each of the first accesses
def test_a_killed_process_ends_the_same(tmp_path: Path) -> None:
    kill_test("unrolled", "--train.steps=200", 1, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "longer"), [("unrolled", "--train.steps=1200"), ("implicit", "--train.epochs=400")]
)
def test_a_process_killed_twenty_times_ends_the_same(name: str, longer: str, tmp_path: Path) -> None:
    assert kill_test(name, longer, 20, tmp_path) >= 3, "killed while writing a checkpoint"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number: signal.Signals, tmp_path: Path) -> None:
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(CONFIGURATIONS["unrolled"])
    process = start("train", "--config", config, "--train.steps", 100_000, "--output.folder", run)
    assert wait_for(training_goes_on(run), process)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + number, told
    assert f"torch-hypergrad resume {run}" in told
    assert "Traceback" not in told
    step = max(int(path.name.split("-")[1]) for path in checkpoints(run))
    assert metrics_of(run)[-1]["step"] <= step
