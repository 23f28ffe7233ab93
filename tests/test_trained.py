"""The network of a run can be used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from image_data import load_images
from runs import CONFIGURATIONS, PLAIN
from test_configurations import refused
from test_resume import NO_STOP
from torch_hypergrad import load_run
from torch_hypergrad.cli import main
from torch_hypergrad.experiment import results
from torch_hypergrad.experiment.config import Config, ConfigError
from torch_hypergrad.experiment.parsing import read_config
from torch_hypergrad.experiment.report import table_of
from torch_hypergrad.experiment.run_folder import RunFolder
from torch_hypergrad.experiment.start import run_in


@pytest.fixture(
    scope="module",
    params=[("unrolled", "float32"), ("implicit", "float32"), ("implicit", "bf16")],
    ids="-".join,
)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    name, precision = request.param
    folder = tmp_path_factory.mktemp(name)
    (folder / "c.yaml").write_text(CONFIGURATIONS[name])
    config = read_config(folder / "c.yaml")
    config = replace(config, train=replace(config.train, precision=precision))
    assert run_in(config, RunFolder(folder / "run"), NO_STOP, quiet=True)
    return config, folder / "run"


def test_it_is_the_network_that_was_tested(finished: tuple[Config, Path]) -> None:
    """Also where training computed in bf16: the report's numbers are those of the weights in float32."""
    config, run = finished
    test = load_images(config.train.seed, **config.task).test
    model = load_run(run)
    with torch.no_grad():
        logits = model(test.images / 255)
    summary = json.loads((run / "summary.json").read_text())
    assert F.cross_entropy(logits, test.labels).item() == pytest.approx(summary["test"]["loss"], rel=1e-5)
    assert (logits.argmax(1) == test.labels).double().mean().item() == summary["test"]["accuracy"]


def test_of_many_training_examples_some_are_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of a run, the first 7 of 60 would be 7 others; all 40 and 50 of the other sets."""
    monkeypatch.setattr(results, "MOST_TRAINING", 7)
    (tmp_path / "c.yaml").write_text(PLAIN.replace("part: train_and_val, ", ""))
    config = read_config(tmp_path / "c.yaml")
    config = replace(config, output=replace(config.output, eval_size=5))
    assert run_in(config, RunFolder(tmp_path / "run"), NO_STOP, quiet=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["sizes"] == {"train": 60, "val": 40, "test": 50}
    assert summary["evaluated"] == {"train": 7, "val": 40, "test": 50}
    assert "| training (7 of 60) |" in table_of([tmp_path / "run"])
    sets, model = load_images(config.train.seed, **config.task), load_run(tmp_path / "run")
    for name, rows in (("train", [0, 8, 17, 25, 34, 42, 51]), ("val", range(40)), ("test", range(50))):
        part = getattr(sets, name)
        with torch.no_grad():
            loss = F.cross_entropy(model(part.images[list(rows)] / 255), part.labels[list(rows)])
        assert summary[name]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_pictures_are_given_their_classes(
    finished: tuple[Config, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = finished
    images, files = load_images(config.train.seed, **config.task).test.images[:5], []
    for number, image in enumerate(images):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(image[0].numpy()).save(files[-1])
    model = load_run(run)
    with torch.no_grad():
        best = model(images / 255).softmax(1).max(1)
    assert main(["predict", str(run), *map(str, files)]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == [str(file) for file in files]
    assert [line[1] for line in lines] == [model.classes[place] for place in best.indices.tolist()]
    assert [float(line[2]) for line in lines] == pytest.approx(best.values.tolist(), abs=1e-3)


def test_what_cannot_be_used_is_refused(finished: tuple[Config, Path], tmp_path: Path) -> None:
    _, run = finished
    assert "got no config.yaml in it" in refused("predict", tmp_path, "picture.png")
    assert "got no such folder" in refused("predict", tmp_path / "nowhere", "picture.png")
    (tmp_path / "config.yaml").touch()
    assert f"Go on with: torch-hypergrad resume {tmp_path}" in refused("predict", tmp_path, "picture.png")
    assert "no readable picture" in refused("predict", run, tmp_path / "nothing.png")


def test_weights_of_another_network_are_refused(finished: tuple[Config, Path], tmp_path: Path) -> None:
    _, run = finished
    summary = json.loads((run / "summary.json").read_text())
    summary["config"]["model"] = {"name": "Linear"}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "model.pt").write_bytes((run / "model.pt").read_bytes())
    with pytest.raises(ConfigError, match="does not fit the network of the run"):
        load_run(tmp_path)
