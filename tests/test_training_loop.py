"""What the training loop does, against loops written out by hand, and the commands from end to end."""

from __future__ import annotations

import contextlib
import html
import io
import json
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from image_data import images_of
from runs import (
    CONFIGS,
    CONFIGURATIONS,
    SURROUNDINGS,
    command,
    metrics_of,
    processes_in_this_one,
    run_command,
)
from torch_hypergrad.cli import main
from torch_hypergrad.experiment.build import build
from torch_hypergrad.experiment.config import Config
from torch_hypergrad.experiment.loop import TrainingError
from torch_hypergrad.experiment.parsing import read_config
from torch_hypergrad.experiment.report import write_report
from torch_hypergrad.experiment.run_folder import RunFolder
from torch_hypergrad.experiment.start import run_in
from torch_hypergrad.experiment.stopping import StopRequest

SMALL = """
task: {name: ImageClassification, train_size: 60, val_size: 40, test_size: 50}
model: {name: Linear}
optimizer: {name: SGD, lr: 0.1, momentum: 0.9}
tune: {weight_decay: {init: 1.0e-2, log: true}}
method: {name: Implicit, solver: {name: CG, damping: 0.1}}
train: {steps: 40, batch_size: 20, warmup: 10, hyper_every: 10, threads: 1}
output: {loggers: [], baseline: false}
"""


def configured(text: str, folder: Path, **sections: dict[str, Any] | None) -> Config:
    """Keys are laid over those of the text; what names a class or is None takes their place."""
    content = yaml.safe_load(text)
    for section, values in sections.items():
        anew = values is None or "name" in values
        content[section] = values if anew else content.get(section, {}) | values
    folder.mkdir(exist_ok=True)
    (folder / "given.yaml").write_text(yaml.safe_dump(content))
    return read_config(folder / "given.yaml")


def run(config: Config, folder: Path) -> Path:
    assert run_in(config, RunFolder(folder / "run"), StopRequest(), quiet=True)
    return folder / "run"


def rows_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in metrics_of(folder) if row["kind"] == kind]


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def inputs_of(config: Config) -> tuple[nn.Module, Tensor, Tensor, Any]:
    """A fresh model, the standardized training images and their labels, and the order of the batches."""
    parts = build(config)
    data = images_of(parts.split.train)
    images = data.images.double() / 255
    mean = images.mean(dim=(0, 2, 3), keepdim=True)
    std = images.std(dim=(0, 2, 3), keepdim=True, unbiased=False)
    return parts.model, ((images - mean) / std).float(), data.labels, parts.train_order


# ---- against loops by hand ---------------------------------------------------------------------------------


def test_untuned_training_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    schedule = {"name": "StepLR", "step_size": 7, "gamma": 0.5}
    train = {"clip_norm": 0.3, "hyper_every": None, "warmup": 0}
    config = configured(
        SMALL.replace("{weight_decay: {init: 1.0e-2, log: true}}", "{}"),
        tmp_path,
        method=None,
        train=train,
        scheduler=schedule,
    )
    folder = run(config, tmp_path)

    model, images, labels, order = inputs_of(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.5)
    losses = []
    for step in range(40):
        rows = order.batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())

    for name, saved in torch.load(folder / "model.pt", weights_only=True).items():
        torch.testing.assert_close(saved, model.state_dict()[name], rtol=1e-5, atol=1e-6)
    logged = {row["step"]: row["loss"] for row in rows_of(folder, "train")}
    assert logged == pytest.approx({step: losses[step - 1] for step in (10, 20, 30, 40)}, rel=1e-4)


def test_the_last_episode_trains_with_the_learned_schedule(tmp_path: Path) -> None:
    config = configured(CONFIGURATIONS["schedule"], tmp_path)
    folder = run(config, tmp_path)
    assert [row["step"] for row in rows_of(folder, "hyper")] == [12, 24, 36, 48, 60]
    learned = torch.load(folder / "tuned.pt", weights_only=True)["values"]["lr/group0"]
    assert learned.shape == (12,)
    assert learned.unique().numel() == 12

    model, images, labels, order = inputs_of(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    for step, lr in enumerate(learned.tolist()):
        optimizer.param_groups[0]["lr"] = lr
        rows = order.batch(60 + step)
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    for name, saved in torch.load(folder / "model.pt", weights_only=True).items():
        torch.testing.assert_close(saved, model.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_hyper_steps_come_after_the_warm_up(tmp_path: Path) -> None:
    folder = run(configured(SMALL, tmp_path, train={"warmup": 12, "hyper_every": 7}), tmp_path)
    assert [row["step"] for row in rows_of(folder, "hyper")] == [19, 26, 33, 40]


def test_results_are_those_of_the_saved_model(tmp_path: Path) -> None:
    config = configured(SMALL, tmp_path)
    folder = run(config, tmp_path)
    parts = build(config)
    parts.model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    mean, std = parts.task.mean, parts.task.std
    for name in ("train", "val", "test"):
        part = images_of(getattr(parts.split, name))
        logits = parts.model((part.images / 255 - mean) / std)
        result = summary_of(folder)[name]
        assert result["loss"] == pytest.approx(F.cross_entropy(logits, part.labels).item(), rel=1e-5)
        assert result["accuracy"] == pytest.approx((logits.argmax(1) == part.labels).float().mean().item())


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    first, second = (
        run(configured(SMALL, tmp_path / str(seed), train={"seed": seed}), tmp_path / str(seed))
        for seed in (0, 1)
    )
    assert metrics_of(first) != metrics_of(second)


@pytest.mark.parametrize("name", ["unrolled", "implicit"])
def test_bf16_stays_close_to_float32(name: str, tmp_path: Path) -> None:
    losses = []
    for precision in ("float32", "bf16"):
        folder = run(
            configured(CONFIGURATIONS[name], tmp_path / precision, train={"precision": precision}),
            tmp_path / precision,
        )
        losses.append(summary_of(folder)["val"]["loss"])
        dtypes = {tensor.dtype for tensor in torch.load(folder / "model.pt", weights_only=True).values()}
        assert dtypes == {torch.float32}
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.2)


def short_form(file: Path) -> dict[str, Any]:
    task = yaml.safe_load(file.read_text())["task"]
    if task["name"] == "ImageClassification":
        task = {key: task[key] for key in ("name", "label_noise", "augment") if key in task}
    return {"task": {**task, "train_size": 60, "val_size": 40, "test_size": 50}}


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(f, id=f.stem, marks=[pytest.mark.slow] * ("resnet" in f.stem))
        for f in sorted(CONFIGS.glob("*.yaml"))
    ],
)
def test_a_shipped_configuration_trains_and_tunes(file: Path, tmp_path: Path) -> None:
    """In a short form, with digits in place of images that must be downloaded, and without bf16, which takes
    half an hour on a processor that has to emulate it."""
    episodes = yaml.safe_load(file.read_text())["train"].get("episodes", 1)
    pace = {"warmup": 60, "hyper_every": 5} if episodes == 1 else {"episodes": 3}
    config = configured(
        file.read_text(),
        tmp_path,
        **short_form(file),
        train={
            **{"epochs": None, "steps": 70, "batch_size": 20, "val_batch_size": 20},
            **{"precision": "float32", **pace},
        },
        output={"loggers": []},
    )
    folder = run(config, tmp_path)
    tuned = torch.load(folder / "tuned.pt", weights_only=True)
    assert len(rows_of(folder, "hyper")) == 2, rows_of(folder, "skipped")
    assert all(not torch.equal(value, tuned["start"][name]) for name, value in tuned["values"].items())
    assert write_report([folder]).exists()


# ---- what goes wrong ---------------------------------------------------------------------------------------


def test_a_solver_that_fails_skips_the_hyper_step_and_says_so(tmp_path: Path) -> None:
    """A series with a scale far above 2 / eigenvalue diverges;
    training goes on with the values as they are."""
    method = {"solver": {"name": "Neumann", "scale": 1e4, "num_terms": 10, "damping": 0.1}}
    folder = run(configured(SMALL, tmp_path, method=method), tmp_path)
    skipped = rows_of(folder, "skipped")
    assert [row["step"] for row in skipped] == [20, 30, 40]
    assert "Neumann" in skipped[0]["reason"]
    assert summary_of(folder)["num_skipped"] == 3
    tuned = torch.load(folder / "tuned.pt", weights_only=True)
    assert torch.equal(tuned["values"]["weight_decay/group0"], tuned["start"]["weight_decay/group0"])


def test_a_run_with_nystrom_gauss_newton_and_second_moments(tmp_path: Path) -> None:
    solver = {"name": "Nystrom", "rank": 4, "damping": 0.1}
    method = {"solver": solver, "curvature": "gauss_newton", "preconditioner": "second_moments"}
    optimizer = {"name": "AdamW", "lr": 0.01, "weight_decay": 0.1}
    config = configured(
        SMALL, tmp_path, method=method, optimizer=optimizer, tune={"weight_decay": {"init": 0.1, "log": True}}
    )
    folder = run(config, tmp_path)
    steps = rows_of(folder, "hyper")
    assert len(steps) == 3
    assert all(step["residual"] < 0.1 for step in steps)
    assert not rows_of(folder, "skipped")


def test_training_that_diverges_stops_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(SMALL, tmp_path, optimizer={"lr": 1e30})
    with pytest.raises(TrainingError, match=r"Training stopped after step \d+: .* learning rate"):
        run(config, tmp_path)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert main(["resume", str(tmp_path / "run")]) == 1
    assert "Training stopped after step" in capsys.readouterr().err.splitlines()[-1]


def test_hypergradients_that_explode_are_warned_of_once_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A decay of 5 at a learning rate of 1 multiplies weights and adjoints by about -4 in each step."""
    configured(
        SMALL,
        tmp_path,
        optimizer={"name": "SGD", "lr": 1.0},
        tune={"weight_decay": {"init": 5.0, "log": True}},
        method={"name": "Unrolled"},
        train={"steps": 20, "warmup": 0},
    )
    folder = tmp_path / "run"
    assert main(["train", "--config", str(tmp_path / "given.yaml"), "--output.folder", str(folder)]) == 0
    told = capsys.readouterr().out
    first, last = (list(row["warnings"].values()) for row in rows_of(folder, "hyper"))
    assert len(first) == len(last) == 2
    assert all("adjoints grew" in warning for warning in first)
    page = html.unescape((folder / "report" / "report.html").read_text())
    assert [line for line in told.splitlines() if line.startswith("step ")] == [
        f"step 10: warning. {warning}" for warning in first
    ]
    for warning in last:
        counted = f"2 of 2 hyper steps gave a warning, the last at training step 20: {warning}"
        assert counted in told
        assert counted in page


def test_a_healthy_run_warns_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configured(SMALL, tmp_path)
    folder = tmp_path / "run"
    assert main(["train", "--config", str(tmp_path / "given.yaml"), "--output.folder", str(folder)]) == 0
    assert "warning" not in capsys.readouterr().out
    assert [row["warnings"] for row in rows_of(folder, "hyper")] == [{}, {}, {}]
    assert "gave a warning" not in (folder / "report" / "report.html").read_text()


@pytest.mark.parametrize(
    ("method", "cost"),
    [
        ({"name": "Unrolled"}, 1 + 3 * 10),
        ({"name": "Unrolled", "truncation": 4}, 1 + 3 * 4),
        ({"name": "ForwardMode"}, 1 + 2 * 10 * 2),
    ],
    ids=str,
)
def test_the_cost_of_hyper_steps(method: dict[str, Any], cost: int, tmp_path: Path) -> None:
    """In forward mode each of the two values has a derivative of its own, carried along with each step."""
    text = SMALL.replace("{name: Implicit, solver: {name: CG, damping: 0.1}}", str(method)).replace(
        "weight_decay", "lr"
    )
    config = configured(text, tmp_path, tune={"momentum": {}})
    assert summary_of(run(config, tmp_path))["cost"] == 40 + 3 * cost


# ---- commands ----------------------------------------------------------------------------------------------


def test_train_ends_with_a_table_and_a_report(tmp_path: Path) -> None:
    (tmp_path / "my_net.py").write_text(
        "from torch import nn\n\nclass MyNet(nn.Sequential):\n"
        "    def __init__(self, width: int = 8):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))\n"
    )
    configured(
        SMALL,
        tmp_path,
        model={"name": "my_net.MyNet", "width": 12},
        output={"loggers": ["tensorboard"]},
    )
    done = run_command("train", "--config", "given.yaml", "--train.seed", 3, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert done.stderr.splitlines()[-1].startswith("Nothing was tuned: all 3 hyper steps were skipped")
    assert re.search(r"train loss=\d\.\d+, val loss=\d\.\d+, weight_decay=0\.0\d+", done.stderr), "the bar"
    assert re.search(r"\| test +\| +\d+\.\d \| +\d\.\d+ \|", done.stdout), done.stdout
    named = re.search(r"Report: (runs/given-seed3-\d+-\d+-[0-9a-f]{4}/report/report\.html)", done.stdout)
    assert named is not None
    assert (tmp_path / named[1]).exists()
    folder = (tmp_path / named[1]).parent.parent
    assert torch.load(folder / "model.pt", weights_only=True)["1.weight"].shape == (12, 64)
    assert main(["report", str(folder), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "report.html").exists()


def test_tensorboard_holds_the_metrics(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run(configured(SMALL, tmp_path, output={"loggers": ["tensorboard"]}), tmp_path)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    written = {event.step: event.value for event in events.Scalars("train/loss")}
    assert written == pytest.approx({row["step"]: row["loss"] for row in rows_of(folder, "train")})
    written = {event.step: event.value for event in events.Scalars("hyper/values/weight_decay/group0")}
    assert written == pytest.approx(
        {row["step"]: row["values"]["weight_decay/group0"] for row in rows_of(folder, "hyper")}
    )


SPACE = "{optimizer.weight_decay: {type: float, low: 1e-4, high: 1, log: true}}"
COMPARE = [f"--compare.space={SPACE}", "--compare.grid_points=3", "--seeds=2"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """The folder of a comparison, the arguments that made it, and what was printed."""
    folder = tmp_path_factory.mktemp("compare")
    configured(SMALL, folder, task={"label_noise": 0.3})
    given = ["--config", str(folder / "given.yaml"), "--output.folder", str(folder / "out")]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["compare", *given, *COMPARE]) == 0
    return folder / "out", ["compare", *given, *COMPARE], printed.getvalue()


def test_compare_trains_every_rival_for_every_seed(compared: Any) -> None:
    folder, _, printed = compared
    assert (folder / "report" / "report.html").exists()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in printed.splitlines()
        if line.startswith("| ")
    ]
    names = [row[0] for row in cells[1:]]
    assert names == [
        "fixed default",
        "best of a grid",
        "best of a random search",
        "tuned by hypergradients",
        "best of the grid, on validation set",
        "best of the grid, on both sets",
    ]
    for name in names:
        for seed in (0, 1):
            config = yaml.safe_load((folder / name / f"seed-{seed}" / "config.yaml").read_text())
            assert config["train"]["seed"] == seed
            assert (config["method"] is not None) == (name == "tuned by hypergradients")
    trained_on = [
        yaml.safe_load((folder / name / "seed-0/config.yaml").read_text())["train"]["part"] for name in names
    ]
    assert trained_on == ["train"] * 4 + ["val", "train_and_val"]


def test_a_search_costs_all_its_trials_and_takes_the_least_validation_loss(compared: Any) -> None:
    folder, _, _ = compared
    for row in ("best of a grid", "best of a random search"):
        trials = [
            summary_of(trial.parent) for trial in (folder / "trials" / row / "seed-1").glob("*/summary.json")
        ]
        chosen = summary_of(folder / row / "seed-1")
        assert chosen["cost"] == sum(trial["cost"] for trial in trials) == 40 * len(trials)
        assert chosen["val"]["loss"] == min(trial["val"]["loss"] for trial in trials)
    tuned = summary_of(folder / "tuned by hypergradients" / "seed-1")
    assert len(trials) == round(tuned["cost"] / 40), "a random search of equal cost"
    values = [
        yaml.safe_load(file.read_text())["optimizer"]["weight_decay"]
        for file in (folder / "trials" / "best of a grid" / "seed-1").glob("*/config.yaml")
    ]
    assert sorted(values) == pytest.approx([1e-4, 1e-2, 1])


def test_compare_goes_on_where_it_was(compared: Any) -> None:
    folder, arguments, _ = compared
    before = {path: path.stat().st_mtime_ns for path in (folder / "trials").rglob("model.pt")}
    assert before
    with processes_in_this_one(2):
        assert main([*arguments, "--jobs=2"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "trials").rglob("model.pt")}


def test_compare_does_not_take_the_runs_of_another_configuration_for_its_own(
    compared: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _, arguments, _ = compared
    assert main([*arguments, "--train.batch_size=10"]) == 2
    assert "holds a run of another configuration" in capsys.readouterr().err


def test_a_stopped_comparison_says_how_to_go_on(tmp_path: Path) -> None:
    configured(SMALL, tmp_path, train={"steps": 100_000})
    arguments = [
        "compare",
        "--config",
        tmp_path / "given.yaml",
        "--output.folder",
        tmp_path / "out",
        *COMPARE,
    ]
    process = subprocess.Popen(
        command(*arguments), env=SURROUNDINGS, stderr=subprocess.PIPE, encoding="utf-8"
    )
    for _ in range(600):
        if list(tmp_path.glob("out/*/seed-*/metrics.jsonl")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, told
    assert f"--output.folder {tmp_path / 'out'}" in told
    assert "Traceback" not in told
    assert list(tmp_path.glob("out/*/seed-*/checkpoints/*.pt")), "the run that was going on was saved"
