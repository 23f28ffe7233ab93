"""What a run leaves for others: values in files, networks in other formats, the best evaluation, a
baseline."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

from image_data import images_of
from runs import processes_in_this_one
from test_configurations import refused
from test_resume import NO_STOP
from test_training_loop import configured, rows_of, summary_of
from torch_hypergrad import load_run
from torch_hypergrad.cli import main
from torch_hypergrad.experiment.build import build
from torch_hypergrad.experiment.config import Config
from torch_hypergrad.experiment.report import table_of, write_report
from torch_hypergrad.experiment.run_folder import RunFolder
from torch_hypergrad.experiment.start import run_in

TUNED = """
task: {name: ImageClassification, train_size: 60, val_size: 40, test_size: 50}
model: {name: MLP, hidden: [8]}
optimizer: {name: SGD, lr: 0.1, momentum: 0.9}
tune: {weight_decay: {per: element, init: 1.0e-2, log: true}}
method: {name: Implicit, solver: {name: CG, damping: 0.1, max_steps: 5}, curvature: gauss_newton}
train: {steps: 30, batch_size: 20, hyper_every: 10, threads: 1}
output: {loggers: [], eval_every: 10}
"""
SCHEDULE = """
task: {name: ImageClassification, train_size: 60, val_size: 40, test_size: 50}
model: {name: Linear}
optimizer: {name: SGD, lr: 0.05, momentum: 0.5}
tune: {lr: {per: step, log: true}}
method: {name: Unrolled}
train: {steps: 12, episodes: 3, batch_size: 20, threads: 1}
output: {loggers: []}
"""


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The configuration's file, and the folder of its run, trained from the command line."""
    folder = tmp_path_factory.mktemp("tuned")
    configured(TUNED, folder)
    assert (
        main(["train", "--config", str(folder / "given.yaml"), "--output.folder", str(folder / "run")]) == 0
    )
    return folder / "given.yaml", folder / "run"


def untuned(text: str, folder: Path) -> Config:
    content = yaml.safe_load(text)
    train = {key: value for key, value in content["train"].items() if key not in ("episodes", "hyper_every")}
    return configured(yaml.safe_dump({**content, "tune": {}, "method": None, "train": train}), folder)


def trained_by_hand(config: Config, decays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A plain loop whose decay is written into the gradients."""
    parts = build(config)
    images, labels = (getattr(images_of(parts.split.train), name) for name in ("images", "labels"))
    inputs, order = parts.task.inputs(images), parts.train_order
    params = dict(parts.model.named_parameters())
    momenta = {name: torch.zeros_like(p) for name, p in params.items()}
    for step in range(config.train.steps or 0):
        rows = order.batch(step)
        loss = F.cross_entropy(parts.model(inputs[rows]), labels[rows])
        with torch.no_grad():
            for (name, p), grad in zip(params.items(), torch.autograd.grad(loss, list(params.values()))):
                momenta[name] = 0.9 * momenta[name] + grad + decays[f"weight_decay/{name}"] * p
                p.sub_(0.1 * momenta[name])
    return {name: p.detach() for name, p in params.items()}


# ---- values ------------------------------------------------------------------------------------------------


def test_fixed_values_train_a_new_network_and_stay(tuned: tuple[Path, Path], tmp_path: Path) -> None:
    file, run = tuned
    values = load_file(run / "values.safetensors")
    assert values["weight_decay/hidden.0.weight"].unique().numel() > 1, "it was tuned"
    arguments = ["train", "--config", str(file), "--output.folder", str(tmp_path / "run")]
    assert main([*arguments, "--fixed", str(run)]) == 0
    assert not rows_of(tmp_path / "run", "hyper")
    kept = load_file(tmp_path / "run" / "values.safetensors")
    assert all(torch.allclose(kept[name], values[name], rtol=1e-6) for name in values)
    expected = trained_by_hand(
        untuned(TUNED, tmp_path), {name: value.float() for name, value in values.items()}
    )
    for name, saved in torch.load(tmp_path / "run" / "model.pt", weights_only=True).items():
        torch.testing.assert_close(saved, expected[name], rtol=1e-4, atol=1e-6)
    page = (tmp_path / "run" / "report" / "report.html").read_text()
    assert f"Trained with weight_decay fixed at the values in {run}." in page


@pytest.mark.parametrize("name", ["values.safetensors", "tuned.pt", ""])
def test_tuning_starts_from_a_file(tuned: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    file, run = tuned
    config = configured(
        file.read_text(),
        tmp_path,
        tune={"weight_decay": {"per": "element", "log": True, "init": str(run / name)}},
    )
    values = build(config).training.values()
    for key, value in load_file(run / "values.safetensors").items():
        assert torch.allclose(values[key], value, rtol=1e-6)


@pytest.mark.usefixtures("no_report")
def test_few_values_are_written_as_yaml_and_read_back(tmp_path: Path) -> None:
    config = configured(SCHEDULE, tmp_path)
    assert run_in(config, RunFolder(tmp_path / "run"), NO_STOP, quiet=True)
    written = yaml.safe_load((tmp_path / "run" / "values.yaml").read_text())
    learned = torch.load(tmp_path / "run" / "tuned.pt", weights_only=True)["values"]["lr/group0"]
    assert written == {"lr/group0": pytest.approx(learned.tolist(), rel=1e-12)}
    again = ["train", "--config", str(tmp_path / "given.yaml"), "--output.folder", str(tmp_path / "again")]
    assert main([*again, "--fixed", str(tmp_path / "run" / "values.yaml")]) == 0
    ours, theirs = (torch.load(tmp_path / each / "model.pt") for each in ("again", "run"))
    assert not torch.equal(ours["out.weight"], theirs["out.weight"]), "other batches: the first episode's"
    parts = build(untuned(SCHEDULE, tmp_path))
    examples = images_of(parts.split.train)
    inputs = parts.task.inputs(examples.images)
    optimizer = torch.optim.SGD(parts.model.parameters(), lr=0.05, momentum=0.5)
    for step, lr in enumerate(learned.tolist()):
        rows = parts.train_order.batch(step)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        F.cross_entropy(parts.model(inputs[rows]), examples.labels[rows]).backward()
        optimizer.step()
    for name, saved in ours.items():
        torch.testing.assert_close(saved, parts.model.state_dict()[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no file of tuned values"),
        ("{}", "tuned nothing"),
        ("a: [1", "holds no tuned values"),
        ("- 1", "holds no tuned values"),
        ("lr/group0: 0.1", "has no weight_decay. It has lr/group0"),
        ("weight_decay/hidden.0.weight: 0.1", "has no weight_decay/hidden.0.bias"),
    ],
)
def test_a_file_without_these_values_is_refused(
    tuned: tuple[Path, Path], tmp_path: Path, content: str | None, message: str
) -> None:
    file = tmp_path / "values.yaml"
    if content is not None:
        file.write_text(content)
    told = refused("train", "--config", tuned[0], "--output.folder", tmp_path / "run", "--fixed", file)
    assert message in told
    assert not (tmp_path / "run").exists()


def test_values_of_another_network_are_refused(tuned: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ["train", "--config", tuned[0], "--output.folder", tmp_path / "run", "--fixed", tuned[1]]
    assert "weight_decay/hidden.0.weight" in refused(*arguments, "--model.hidden=[9]")
    assert "has no weight_decay/out.weight" not in refused(*arguments, "--model=CNN")
    assert "its ending is none of" in refused(*arguments[:-1], tuned[1] / "metrics.jsonl")
    assert "Set them to 1 and null" in refused(*arguments[:-2], f"--train.fixed={tuned[1]}")


# ---- networks in other formats -----------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["torchscript", "state_dict"])
def test_an_exported_network_gives_the_same(tuned: tuple[Path, Path], tmp_path: Path, to: str) -> None:
    _, run = tuned
    file = tmp_path / "sub" / "network"
    assert main(["export", str(run), "--to", to, "--out", str(file)]) == 0
    model, images = load_run(run), torch.rand(5, 1, 8, 8)
    if to == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is no longer developed
            again = torch.jit.load(str(file))
        assert torch.allclose(again(images), model(images), rtol=1e-5, atol=1e-6)
    else:
        weights = torch.load(file, weights_only=True)
        assert all(torch.equal(value, weights[name]) for name, value in model.network.state_dict().items())


def test_an_onnx_file_gives_the_same(tuned: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the exporter's own package is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="nothing here runs ONNX")
    assert main(["export", str(tuned[1]), "--out", str(tmp_path / "n.onnx")]) == 0
    images = torch.rand(5, 1, 8, 8)
    (found,) = runtime.InferenceSession(str(tmp_path / "n.onnx")).run(None, {"inputs": images.numpy()})
    np.testing.assert_allclose(found, load_run(tuned[1])(images).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported_is_refused(tuned: tuple[Path, Path], tmp_path: Path) -> None:
    assert "--to must be one of onnx, torchscript, state_dict" in refused("export", tuned[1], "--to", "tf")
    assert "expected the folder of a finished run" in refused("export", tmp_path)


# ---- the end of a run --------------------------------------------------------------------------------------


def test_the_best_evaluation_is_kept_and_training_ends_early(tmp_path: Path) -> None:
    """At a learning rate that overfits, the validation loss rises after its least value."""
    config = configured(
        yaml.safe_dump({**yaml.safe_load(TUNED), "tune": {}}),
        tmp_path,
        optimizer={"name": "SGD", "lr": 0.5, "momentum": 0.9},
        method=None,
        train={"steps": 400, "hyper_every": None, "patience": 4, "keep_best": True},
        output={"eval_every": 3},
    )
    assert run_in(config, RunFolder(tmp_path / "run"), NO_STOP, quiet=True)
    evaluated = {row["step"]: row["val"]["loss"] for row in rows_of(tmp_path / "run", "eval")}
    best = min(evaluated, key=lambda step: evaluated[step])
    summary = summary_of(tmp_path / "run")
    assert summary["best_step"] == best
    assert summary["val"]["loss"] == pytest.approx(evaluated[best], rel=1e-6), "all 40 images in both"
    assert summary["stopped_early"]
    assert summary["steps"] == max(evaluated) == best + 4 * 3
    text = write_report([tmp_path / "run"]).read_text()
    assert f"The results are those of step {best:,}" in text
    assert f"Training ended after {best + 12:,} steps, as 4 evaluations in a row" in text


def test_patience_and_episodes_do_not_go_together(tuned: tuple[Path, Path], tmp_path: Path) -> None:
    configured(SCHEDULE, tmp_path)
    assert "each episode begins anew" in refused(
        "train", "--config", tmp_path / "given.yaml", "--train.patience=3"
    )
    told = refused("train", "--config", tuned[0], "--train.patience=0")
    assert "train.patience: got 0, expected int of at least 1 or null." in told


def test_a_short_run_says_whether_tuning_helped(tuned: tuple[Path, Path]) -> None:
    file, run = tuned
    baseline, summary = summary_of(run / "baseline"), summary_of(run)
    plain = {name: torch.tensor(1e-2) for name in load_file(run / "values.safetensors")}
    expected = trained_by_hand(untuned(TUNED, file.parent / "x"), plain)
    for name, saved in torch.load(run / "baseline" / "model.pt", weights_only=True).items():
        torch.testing.assert_close(saved, expected[name], rtol=1e-4, atol=1e-6)
    assert f"{baseline['test']['loss']:.3f}" in table_of([run])
    page = (run / "report" / "report.html").read_text()
    before, after = (f"{100 * each['test']['accuracy']:.1f} %" for each in (baseline, summary))
    assert f"has a test accuracy of {before}; with tuning it is {after}." in page
    assert "only the test set tells how good they are" in page


@pytest.mark.usefixtures("no_report")
def test_a_finished_baseline_is_not_announced_again(
    tuned: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["resume", str(tuned[1])]) == 0
    told = capsys.readouterr()
    assert "is finished already" in told.out
    assert told.err == ""


@pytest.mark.usefixtures("no_report")
def test_a_baseline_can_be_left_out(tuned: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ["train", "--config", str(tuned[0]), "--output.folder", str(tmp_path / "run")]
    assert main([*arguments, "--baseline=false"]) == 0
    assert not (tmp_path / "run" / "baseline").exists()
    assert "without tuning" not in table_of([tmp_path / "run"])


def test_several_seeds_are_one_report(
    tuned: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--config", str(tuned[0]), "--output.folder", str(tmp_path / "out"), "--seeds=3"]
    assert main(arguments) == 0
    runs = [tmp_path / "out" / "given" / f"seed-{seed}" for seed in range(3)]
    accuracies = [100 * summary_of(run)["test"]["accuracy"] for run in runs]
    told = capsys.readouterr().out
    assert f"{np.mean(accuracies):.1f} ± {np.std(accuracies, ddof=1):.1f}" in told
    assert (tmp_path / "out" / "report" / "report.html").exists()
    alone = RunFolder(tmp_path / "alone")
    config: Any = configured(TUNED, tmp_path, train={"seed": 2})
    assert run_in(config, alone, NO_STOP, quiet=True)
    ours, theirs = (torch.load(path / "model.pt") for path in (runs[2], alone.path))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    shutil.rmtree(runs[1])
    before = json.loads((runs[0] / "summary.json").read_text())
    with processes_in_this_one(2):
        assert main([*arguments, "--jobs=2"]) == 0, "what is there is not trained again"
    assert json.loads((runs[0] / "summary.json").read_text()) == before
    assert (runs[1] / "summary.json").exists()
    assert "--seeds and --jobs must be at least 1" in refused(*arguments[:-1], "--seeds=0")
