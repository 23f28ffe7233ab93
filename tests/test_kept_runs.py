"""No run is lost, mixed up with another or reported as what it was not; what goes wrong is one line."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from PIL import Image

import torch_hypergrad
import waiting_workers
from runs import CONFIGURATIONS, SURROUNDINGS, check_equal_runs, command, metrics_of, run_command
from test_configurations import refused
from test_resume import NO_STOP, StopAfter
from torch_hypergrad.cli import main
from torch_hypergrad.experiment.config import Config, ConfigError
from torch_hypergrad.experiment.loop import Run
from torch_hypergrad.experiment.options import one_line
from torch_hypergrad.experiment.parsing import read_config
from torch_hypergrad.experiment.report import write_report
from torch_hypergrad.experiment.report.read import read_run
from torch_hypergrad.experiment.run_folder import RunFolder
from torch_hypergrad.experiment.start import folder_of, last_run, resume, run_in, train


@pytest.fixture
def config(tmp_path: Path) -> Config:
    file = tmp_path / "unrolled.yaml"
    file.write_text(CONFIGURATIONS["unrolled"])
    return read_config(file)


def in_folder(config: Config, folder: Path, **training: Any) -> Config:
    return replace(
        config,
        output=replace(config.output, folder=str(folder)),
        train=replace(config.train, **training),
    )


def edit(folder: Path, section: str, **values: Any) -> None:
    """As a user does, with an editor."""
    file = folder / "config.yaml"
    content = yaml.safe_load(file.read_text())
    content[section] |= values
    file.write_text(yaml.safe_dump(content))


# ---- whose folder it is ------------------------------------------------------------------------------------


def test_nothing_is_written_to_a_folder_that_another_process_has(config: Config, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked(), pytest.raises(ConfigError, match="Another process is training"):
        train(in_folder(config, folder.path, seed=1), "run")
    assert not folder.config_file.exists()


def test_a_run_that_began_in_the_meantime_is_not_taken_over(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process trains seed 0 to its end between our first look and our lock."""
    folder = tmp_path / "run"
    ours, theirs = (in_folder(config, folder, seed=seed, steps=30) for seed in (1, 0))

    def looked_too_early(self: RunFolder) -> None:
        monkeypatch.undo()
        run_in(theirs, RunFolder(folder), StopAfter(3), quiet=True)

    monkeypatch.setattr(RunFolder, "check_new", looked_too_early)
    with pytest.raises(ConfigError, match=r"holds a run (already|of another configuration)"):
        train(ours, "run")
    assert read_config(folder / "config.yaml").train.seed == 0
    resume(folder)
    run_in(theirs, RunFolder(tmp_path / "whole"), NO_STOP, quiet=True)
    check_equal_runs(folder, tmp_path / "whole")


def test_four_runs_of_one_second_have_four_folders(config: Config) -> None:
    folders = {folder_of(replace(config, train=replace(config.train, seed=7)), "digits") for _ in range(4)}
    assert len(folders) == 4
    assert all(folder.name.startswith("digits-seed7-") for folder in folders)


def test_a_home_folder_is_meant_by_a_tilde(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder_of(in_folder(config, Path("~/run")), "run") == tmp_path / "run"
    (tmp_path / "there.yaml").write_text(CONFIGURATIONS["unrolled"])
    assert main(["train", "--config=~/there.yaml", "--dry_run=true"]) == 0


def test_the_folder_is_named_when_training_starts(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_in(in_folder(config, tmp_path / "run"), RunFolder(tmp_path / "run"), StopAfter(1))
    assert f"Training in {tmp_path / 'run'}" in capsys.readouterr().err


@pytest.mark.usefixtures("no_report")
def test_the_last_run_goes_on(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"There is no run in .*runs"):
        last_run()
    for name in ("first", "second"):
        stopped(config, tmp_path / "runs" / name)
    os.utime(tmp_path / "runs" / "second" / "metrics.jsonl", (1, 1))
    assert main(["resume", "--last"]) == 0
    assert RunFolder(tmp_path / "runs" / "first").finished
    assert not RunFolder(tmp_path / "runs" / "second").finished


@pytest.mark.parametrize("arguments", [["resume"], ["resume", "run", "--last"]])
def test_resume_takes_one_run(arguments: list[str]) -> None:
    assert "takes the folder of a run, or --last" in refused(*arguments)


@pytest.mark.parametrize("argument", ["--help", "--version", "train --help", "train --tuen=3"])
def test_help_and_errors_do_without_torch(argument: str) -> None:
    """Which takes seconds to import."""
    code = (
        "import contextlib, sys\nfrom torch_hypergrad.cli import main\n"
        f"with contextlib.suppress(SystemExit):\n    main({argument.split()})\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout or "Unknown key tuen" in done.stderr


def test_public_names_are_found_when_they_are_asked_for() -> None:
    assert set(torch_hypergrad.__all__) <= set(dir(torch_hypergrad))
    for name in torch_hypergrad.__all__:
        assert getattr(torch_hypergrad, name).__module__.startswith("torch_hypergrad.")
    assert torch_hypergrad.solvers.CG is torch_hypergrad.CG
    with pytest.raises(AttributeError, match="no attribute 'CGG'"):
        _ = torch_hypergrad.CGG


# ---- edited configurations ---------------------------------------------------------------------------------


def stopped(config: Config, folder: Path, num_steps: int = 20) -> None:
    assert not run_in(in_folder(config, folder), RunFolder(folder), StopAfter(num_steps), quiet=True)


def test_an_edited_learning_rate_is_refused_with_the_difference(config: Config, tmp_path: Path) -> None:
    stopped(config, tmp_path / "run")
    edit(tmp_path / "run", "optimizer", lr=0.02)
    with pytest.raises(ConfigError, match=r"edited after .*optimizer\.lr was 0\.003, is 0\.02"):
        resume(tmp_path / "run")


def test_more_steps_and_other_output_are_taken_over_and_recorded(config: Config, tmp_path: Path) -> None:
    stopped(config, tmp_path / "run")
    edit(tmp_path / "run", "train", steps=60)
    edit(tmp_path / "run", "output", keep_checkpoints=1)
    assert resume(tmp_path / "run") == (tmp_path / "run", None)
    (edited,) = (row for row in metrics_of(tmp_path / "run") if row["kind"] == "edited")
    assert edited["step"] == 20
    assert edited["changes"] == "train.steps was 50, is 60; output.keep_checkpoints was 2, is 1"
    longer = in_folder(config, tmp_path / "longer", steps=60)
    run_in(longer, RunFolder(tmp_path / "longer"), NO_STOP, quiet=True)
    ours, theirs = (torch.load(tmp_path / name / "model.pt") for name in ("run", "longer"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("steps", [30, None])
def test_an_earlier_end_is_refused(config: Config, tmp_path: Path, steps: int | None) -> None:
    stopped(config, tmp_path / "run")
    edit(tmp_path / "run", "train", steps=steps, epochs=None if steps else 30)
    with pytest.raises(ConfigError, match=r"train\.steps was 50, is (30|None)"):
        resume(tmp_path / "run")


def test_a_finished_run_that_was_given_more_steps_is_refused(config: Config, tmp_path: Path) -> None:
    """It has no checkpoint of its end to go on from, and is not as its configuration says."""
    assert run_in(config, RunFolder(tmp_path / "run"), NO_STOP, quiet=True)
    edit(tmp_path / "run", "output", log_every=1)
    resume(tmp_path / "run")
    edit(tmp_path / "run", "train", steps=99)
    assert "is finished, and" in refused("resume", tmp_path / "run")
    assert "train.steps was 50, is 99" in refused("resume", tmp_path / "run")


def test_a_checkpoint_of_another_dtype_is_refused(config: Config, tmp_path: Path) -> None:
    """torch would load it, and convert it in silence."""
    folder = RunFolder(tmp_path / "run")
    run_in(config, folder, StopAfter(9), quiet=True)
    state, _ = folder.load_checkpoint()
    assert state is not None
    name = next(iter(state["training"]["model"]))
    state["training"]["model"][name] = state["training"]["model"][name].double()
    folder.save_checkpoint(state["progress"]["step"] + 1, state, keep=2)
    told = refused("resume", tmp_path / "run")
    assert f"{name} is of torch.float64, and the network's of torch.float32." in told


def killed_at(number: int, config: Config, folder: Path) -> bool:
    """Trains in a process that is killed at its so-manyth access to files of the folder; whether it was."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of newer Pythons, for processes with threads
        pid = os.fork()
    if pid == 0:
        seen = 0

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in ACCESSES and arguments and str(folder) in str(arguments[0]):
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        signal.alarm(60)
        sys.addaudithook(count)
        code = 1
        try:
            code = 0 if run_in(config, RunFolder(folder), NO_STOP, quiet=True) else 1
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


ACCESSES = ("open", "os.mkdir", "os.rename", "os.remove", "os.truncate", "os.scandir", "os.listdir")


@pytest.mark.parametrize("numbers", [range(1, 9), pytest.param(range(9, 41), marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_any_access_to_its_folder_goes_on(
    config: Config, tmp_path: Path, numbers: range
) -> None:
    """The first accesses make the folder, the lock and the configuration; all of them are hit, one by one."""
    config = replace(config, train=replace(config.train, steps=24, hyper_every=8))
    whole = RunFolder(tmp_path / "whole")
    assert run_in(config, whole, NO_STOP, quiet=True)
    killed = 0
    for number in numbers:
        folder = tmp_path / f"killed-{number}"
        killed += killed_at(number, config, folder)
        assert run_in(config, RunFolder(folder), NO_STOP, quiet=True)
        check_equal_runs(folder, whole.path)
    assert killed == len(numbers)


def test_a_run_of_version_0_1_is_reported_and_goes_on(tmp_path: Path) -> None:
    """Its files are in the spelling of before: the configuration, the one in the checkpoint, the summary."""
    content = yaml.safe_load(CONFIGURATIONS["unrolled"])
    config = read_config_of(content, tmp_path)
    assert run_in(config, RunFolder(tmp_path / "whole"), NO_STOP, quiet=True)
    folder = RunFolder(tmp_path / "old")
    run_in(config, folder, StopAfter(20), quiet=True)
    state, _ = folder.load_checkpoint()
    assert state is not None
    state["config"] = in_old_spelling(state["config"])
    for key in ("best_step", "best_val_loss", "num_no_better"):
        del state["progress"][key]
    folder.save_checkpoint(state["progress"]["step"], state, keep=1)
    folder.config_file.write_text(
        yaml.safe_dump(in_old_spelling(yaml.safe_load(folder.config_file.read_text())))
    )
    resume(folder.path)
    ours, theirs = (torch.load(path / "model.pt") for path in (folder.path, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    summary = json.loads(folder.summary_file.read_text())
    summary["config"] = in_old_spelling(summary["config"])
    del summary["words"]
    folder.summary_file.write_text(json.dumps(summary))
    resume(folder.path)
    run = read_run(folder.path)
    assert run.config["train"]["fixed"] is None
    assert run.config["optimizer"] == {"name": "Adam", "lr": 0.003, "eps": 1e-4}
    page = write_report([folder.path]).read_text()
    assert "digits: 60 training, 40 validation and 50 test images" in page


def read_config_of(content: dict[str, Any], folder: Path) -> Config:
    (folder / "new.yaml").write_text(yaml.safe_dump(content))
    return read_config(folder / "new.yaml")


def in_old_spelling(content: dict[str, Any]) -> dict[str, Any]:
    """As version 0.1 wrote it, with the keys that it had."""
    task, train = dict(content["task"]), dict(content["train"])
    data = {"name": "digits", **{key: value for key, value in task.items() if key != "name"}}
    old = {"data": {**data, "train_on": train.pop("part")}}
    for section in ("model", "optimizer", "hyper_optimizer"):
        options = {key: value for key, value in content[section].items() if key != "name"}
        old[section] = {"name": content[section]["name"], "options": options}
    old["model"]["name"] = {"CNN": "cnn"}[old["model"]["name"]]
    options = {key: value for key, value in content["scheduler"].items() if key != "name"}
    scheduler = {"name": content["scheduler"]["name"], "options": options}
    old["scheduler"] = {**scheduler, "every": train.pop("scheduler_every")}
    old["method"] = {"name": "unrolled", "solver": None, "truncation": None, **{
        key: value for key, value in content["method"].items() if key != "name"
    }}  # fmt: skip
    for key in ("fixed", "patience", "keep_best"):
        del train[key]
    output = {
        key: value for key, value in content.get("output", {}).items() if key not in ("loggers", "baseline")
    }
    return {**old, "tune": content["tune"], "train": train, "output": {**output, "tensorboard": False}}


def test_a_report_tells_how_a_finished_run_was_trained(config: Config, tmp_path: Path) -> None:
    run_in(in_folder(config, tmp_path / "run"), RunFolder(tmp_path / "run"), NO_STOP, quiet=True)
    edit(tmp_path / "run", "optimizer", lr=0.02)
    assert read_run(tmp_path / "run").config["optimizer"]["lr"] == 0.003
    with pytest.raises(ConfigError, match=r"of a finished run was edited .*lr was 0\.003, is 0\.02"):
        resume(tmp_path / "run")


# ---- metrics and checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 150, None])
def test_lost_metrics_are_not_filled_with_zeros(
    config: Config, tmp_path: Path, left: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped(config, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    before = metrics.read_bytes()
    metrics.unlink() if left is None else os.truncate(metrics, left)
    resume(tmp_path / "run")
    assert "metrics.jsonl has lost" in capsys.readouterr().err
    content = metrics.read_bytes()
    assert b"\0" not in content
    kept = before[: before[: left or 0].rfind(b"\n") + 1]
    assert content.startswith(kept)
    assert metrics_of(tmp_path / "run")[-1]["step"] == 50, "each line can be read"


class Code:
    """What a pickle may do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo ran > ran",)


def test_code_in_a_checkpoint_is_refused_and_not_run(config: Config, tmp_path: Path) -> None:
    stopped(config, tmp_path / "run")
    buffer = io.BytesIO()
    torch.save({"progress": Code()}, buffer, pickle_module=pickle)
    content = buffer.getvalue()
    name = f"step-00000040-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    (tmp_path / "run" / "checkpoints" / name).write_bytes(content)
    with pytest.raises(ConfigError, match=r"is whole but holds something else.*Delete it"):
        resume(tmp_path / "run")
    assert not Path("ran").exists()


# ---- what the machine lacks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device. Make room"),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            "Permission denied. Make room, or allow",
        ),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory.*Take a smaller train.batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "Take a smaller train.batch"),
        (KeyboardInterrupt(), "what came after the last checkpoint is lost"),
    ],
)
def test_training_that_the_machine_ends_says_so_in_one_line(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    error: BaseException, message: str,
) -> None:  # fmt: skip
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Run, "_save", fail)
    (tmp_path / "c.yaml").write_text(CONFIGURATIONS["unrolled"])
    code = main(["train", "--config", str(tmp_path / "c.yaml"), f"--output.folder={tmp_path / 'run'}"])
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, last), last


@pytest.mark.parametrize("folder", ["x" * 300, "/dev/null/run", "nul\0byte"])
def test_a_folder_that_cannot_be_is_refused(config: Config, folder: str) -> None:
    with pytest.raises(ConfigError, match=r"output\.folder\) cannot be used"):
        train(in_folder(config, Path(folder)), "run")


def test_results_are_printed_though_the_report_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(CONFIGURATIONS["plain"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report").write_text("a file where the report should go")
    code = main(["train", "--config", str(tmp_path / "c.yaml"), f"--output.folder={tmp_path / 'run'}"])
    told = capsys.readouterr()
    assert code == 1
    assert "| test       |" in told.out
    assert "The report could not be written" in told.err
    assert "Traceback" not in told.err


@pytest.mark.usefixtures("no_report")
def test_a_run_whose_hyper_steps_were_all_skipped_ends_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(CONFIGURATIONS["implicit"])
    arguments = ["--method.solver={name: Neumann, scale: 1e6, num_terms: 60}", "--train.epochs=10"]
    code = main(
        ["train", "--config", str(tmp_path / "c.yaml"), f"--output.folder={tmp_path / 'run'}", *arguments]
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["num_hyper_steps"] == 0
    assert code == 3
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("Nothing was tuned: all")


# ---- configurations ----------------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{n}: &{n} [{', '.join([f'*{m}'] * 10)}]\n" for m, n in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 10000 values, with its aliases written out"),
        ("train: " + "[" * 5000, "nested too deeply"),
        ("train: {steps: 3}\ntask: {}\ntrain: {seed: 1}\n", "line 3: train is given twice"),
        ("train: {steps: 3, steps: 4}", "steps is given twice"),
        ("a: &a [*a]", "nested too deeply"),
    ],
    ids=["bomb", "brackets", "section", "key", "circle"],
)
def test_a_malicious_or_careless_file_is_refused_at_once(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert message in refused("train", "--config", str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--optimizer={name: SparseAdam, lr: 0.1}", "needs sparse gradients"),
        ("--optimizer={name: LBFGS, lr: 0.1}", "evaluates the loss several times"),
        ("--optimizer.differentiable=true", "hypergradients do not need it"),
        ("--optimizer={name: SGD, lr: 0.1, momentum: 2}", "must be below 1"),
        ("--optimizer.lr=.nan", "finite"),
        ("--hyper_optimizer.lr=1.0e+60", "beyond what float32 can hold"),
        ("--hyper_optimizer.maximize=true", "as large as possible"),
        ("--hyper_optimizer.differentiable=true", "do not need it"),
        ("--model.dropout=.nan", "finite"),
        ("--model.width=0", "width must be at least 1"),
        ("--output.folder=", "output.folder: got '', expected non-empty str or null."),
        ("--tune=" + "[" * 5000, "[[[..."),
    ],
    ids=lambda value: value[:50],
)
def test_options_that_train_nothing_are_refused(argument: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIGURATIONS["unrolled"])
    told = refused("train", "--config", str(tmp_path / "c.yaml"), argument)
    assert message in told


def pictures(root: Path) -> Path:
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(root / name / f"{number}.png")
    return root


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_what_is_no_picture_of_its_class_is_refused(kind: str, tmp_path: Path) -> None:
    root = pictures(tmp_path / "root")
    if kind == "pipe":
        os.mkfifo(root / "a" / "x.png")
    elif kind == "link":
        (root / "a" / "x.png").symlink_to(root / "b" / "0.png")
    else:
        (root / "a" / "more").symlink_to(root / "b")
    arguments = ["--task.data=image_folder", f"--task.root={root}", "--train.steps=1", "--method=null"]
    told = refused("train", *arguments)
    assert ("is no file" if kind == "pipe" else "leads out of its class") in told


def test_a_link_within_its_class_is_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = pictures(tmp_path / "root")
    (root / "a" / "x.png").symlink_to(root / "a" / "0.png")
    arguments = [
        "--task.data=image_folder", f"--task.root={root}", "--task.val_size=2", "--train.steps=1",
        "--method=null", "--dry_run=true",
    ]  # fmt: skip
    assert main(["train", *arguments]) == 0, capsys.readouterr().err


# ---- processes ---------------------------------------------------------------------------------------------


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    check_that_workers_end(
        [sys.executable, waiting_workers.__file__, str(tmp_path / "begun")],
        lambda: len(list((tmp_path / "begun").iterdir())) == 2,
    )


@pytest.mark.slow
def test_workers_of_compare_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIGURATIONS["implicit"])
    output = ("--output.folder", tmp_path / "run")
    check_that_workers_end(
        command("compare", "--config", tmp_path / "c.yaml", "--jobs=2", "--train.epochs=100000", *output),
        lambda: list(tmp_path.rglob("metrics.jsonl")) != [],
    )


def check_that_workers_end(arguments: Sequence[str], have_begun: Callable[[], bool]) -> None:
    """Starts a process and kills it when its two workers have begun."""
    process = subprocess.Popen(arguments, env=SURROUNDINGS, stderr=subprocess.DEVNULL)
    parent = psutil.Process(process.pid)
    try:
        while not have_begun():
            assert process.poll() is None
            time.sleep(0.05)
        workers = parent.children(recursive=True)
        assert len(workers) >= 2
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_four_processes_at_once_in_one_folder_are_one_run(tmp_path: Path) -> None:
    """Ten times; each time with another seed, and killed at random moments from the first on."""
    (tmp_path / "c.yaml").write_text(CONFIGURATIONS["unrolled"])
    for attempt in range(10):
        run = tmp_path / f"run{attempt}"
        started = [
            subprocess.Popen(
                command(
                    "train", "--config", tmp_path / "c.yaml", f"--train.seed={seed}", f"--output.folder={run}"
                ),
                env=SURROUNDINGS,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                encoding="utf-8",
            )
            for seed in range(4)
        ]
        if attempt % 2:
            time.sleep(2 + 0.3 * attempt)
            for process in started:
                process.kill()
        for process in started:
            _, told = process.communicate()
            assert "Traceback" not in told or process.returncode < 0, told
        if (run / "config.yaml").exists():
            done = run_command("resume", run)
            assert done.returncode == 0, done.stderr
            seed = read_config(run / "config.yaml").train.seed
            whole = run_command(
                "train",
                "--config",
                tmp_path / "c.yaml",
                f"--train.seed={seed}",
                f"--output.folder={tmp_path / f'whole{attempt}'}",
            )
            assert whole.returncode == 0, one_line(whole.stderr)
            check_equal_runs(run, tmp_path / f"whole{attempt}")
