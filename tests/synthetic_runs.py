"""Folders of runs that nobody trained, for the tests of the report."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from sklearn.datasets import load_digits
from torch import Tensor

from torch_hypergrad.experiment.config import Config, Tune

MLP = {"hidden.weight": (32, 64), "hidden.bias": (32,), "out.weight": (10, 32), "out.bias": (10,)}
CNN = {"conv.weight": (8, 1, 3, 3), "conv.bias": (8,), "out.weight": (10, 512), "out.bias": (10,)}


def resnet_shapes() -> dict[str, tuple[int, ...]]:
    """The 62 tensors of a ResNet-18, with few channels."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (4, 3, 3, 3)} | _norm("bn1", 4)
    for stage, width in enumerate((4, 8, 8, 8), start=1):
        for block in range(2):
            name = f"layer{stage}.{block}"
            for i in (1, 2):
                shapes |= {f"{name}.conv{i}.weight": (width, width, 3, 3)} | _norm(f"{name}.bn{i}", width)
            if stage > 1 and block == 0:
                shapes |= {f"{name}.downsample.0.weight": (width, width, 1, 1)} | _norm(
                    f"{name}.downsample.1", width
                )
    return shapes | {"fc.weight": (10, 8), "fc.bias": (10,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def decays(
    shapes: Mapping[str, Sequence[int]], start: float = 1e-3
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Start and final weight decays per element."""
    torch.manual_seed(0)
    first = {f"weight_decay/{name}": torch.full(tuple(shape), start) for name, shape in shapes.items()}
    last = {
        name: value * (torch.randn(value.shape) + i / 20).exp()
        for i, (name, value) in enumerate(first.items())
    }
    if "weight_decay/hidden.weight" in last:
        last["weight_decay/hidden.weight"] *= (2 - 4 * mean_digit().flatten()).exp()
    return first, last


@functools.cache
def mean_digit() -> Tensor:
    return torch.tensor(load_digits().images / 16, dtype=torch.float32).mean(0, keepdim=True)


def quantiles(value: Tensor) -> Any:
    if value.numel() == 1:
        return value.item()
    array = value.double().numpy()
    levels = {"min": 0, "q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "max": 1}
    return {name: float(np.quantile(array, level)) for name, level in levels.items()} | {
        "mean": float(array.mean())
    }


def make_run(
    folder: Path,
    start: Mapping[str, Tensor] | None = None,
    final: Mapping[str, Tensor] | None = None,
    *,
    tune: Mapping[str, Tune] | None = None,
    config: Mapping[str, Mapping[str, Any] | None] | None = None,
    num_hyper: int = 20,
    hyper: Mapping[str, Any] | None = None,  # lists with one entry for each hyper step, or one for all
    skipped: Sequence[int] = (),
    finished: bool = True,
    steps: int = 500,
    accuracy: float = 0.9,
    tuned: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the folder of a run that went from ``start`` to ``final``."""
    start, final = dict(start or {}), dict(final or {})
    folder.mkdir(parents=True)
    complete = asdict(Config())
    for section, value in (config or {}).items():
        complete[section] = value if value is None or "name" in value else complete[section] | dict(value)
    complete["tune"] = {name: asdict(entry) for name, entry in (tune or {}).items()}
    (folder / "config.yaml").write_text(
        yaml.dump(complete, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper))
    )
    lines = [*_training_lines(steps, accuracy), *_hyper_lines(start, final, num_hyper, steps, hyper or {})]
    lines += [{"kind": "skipped", "step": step, "reason": "Neumann diverged."} for step in skipped]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        part = {"loss": 2 * (1 - accuracy), "accuracy": accuracy}
        summary = {
            "steps": steps,
            "cost": 10 * steps,
            "num_hyper_steps": num_hyper,
            "num_skipped": len(skipped),
        }
        summary |= {"seconds": 12.5, "test": part, "val": part, "train": {"loss": 0.01, "accuracy": 1.0}}
        summary |= {"num_parameters": 2410, "num_values": sum(value.numel() for value in final.values())}
        summary |= {
            "versions": {"torch": "2.6.0"},
            "device": "cpu",
            "started": "2026-01-01T12:00:00",
            "command": "run it",
        }
        (folder / "summary.json").write_text(json.dumps(summary))
        saved = {
            "start": start,
            "values": final,
            "mean_image": mean_digit(),
            "classes": [str(i) for i in range(10)],
        }
        shapes = {name.partition("/")[2]: tuple(value.shape) for name, value in final.items()}
        torch.save({**saved, "model": shapes, **(tuned or {})}, folder / "tuned.pt")
    return folder


def _training_lines(steps: int, accuracy: float) -> list[dict[str, Any]]:
    rng, lines = np.random.default_rng(0), []
    for step in range(10, steps + 1, 10):
        loss = 2.3 * np.exp(-4 * step / steps)
        lines.append({"kind": "train", "step": step, "loss": loss * rng.uniform(0.7, 1.3)})
    for step in range(50, steps + 1, 50):
        part = {"loss": 2.3 * np.exp(-4 * step / steps), "accuracy": 1 - np.exp(-5 * step / steps)}
        val = {"loss": 2 * (1 - accuracy) + part["loss"], "accuracy": accuracy * part["accuracy"]}
        lines.append({"kind": "eval", "step": step, "seconds": step / 40, "train": part, "val": val})
    return lines


def _hyper_lines(
    start: Mapping[str, Tensor], final: Mapping[str, Tensor], count: int, steps: int, given: Mapping[str, Any]
) -> list[dict[str, Any]]:
    lines = []
    for i in range(count):
        share = (i + 1) / count
        values = {name: quantiles((1 - share) * start[name] + share * final[name]) for name in final}
        line = {
            "kind": "hyper",
            "step": steps // 5 + i * (4 * steps // 5) // max(count, 1),
            "val_loss": 0.5,
            "clipped": {},
        }
        line |= {
            "hypergradient_norm": 0.3 / (1 + i),
            "num_matvecs": 20,
            "residual": 0.1 / (1 + i),
            "values": values,
        }
        lines.append(
            line | {key: value[i] if isinstance(value, list) else value for key, value in given.items()}
        )
    return lines


PER_ELEMENT = {"weight_decay": Tune(per="element", init=1e-3, log=True)}


def cleaning_run(folder: Path, **others: Any) -> Path:
    """Weights of 300 images, of which 60 have wrong labels."""
    rng = np.random.default_rng(1)
    wrong = torch.tensor(rng.permutation(300) < 60)
    weights = torch.tensor(np.where(wrong, rng.beta(2, 5, 300), rng.beta(6, 2, 300)))
    order = weights.argsort()[:10]
    digits = load_digits()
    images = torch.tensor(digits.images[:300] / 16 * 255).to(torch.uint8)[:, None]
    lowest = {"images": images[order], "labels": torch.tensor(digits.target[:300])[order]}
    lowest |= {"weights": weights[order], "wrong": wrong[order]}
    saved = {"example_weights": weights, "wrong": wrong, "lowest": lowest}
    values = {"example_weights": (weights / (1 - weights)).log()}
    config = {"task": {"label_noise": 0.2, "train_size": 300}}
    start = {"example_weights": torch.zeros(300)}
    return make_run(
        folder, start, values, tune={"example_weights": Tune()}, config=config, tuned=saved, **others
    )


def augmentation_run(folder: Path) -> Path:
    before = torch.tensor(load_digits().images[:3] / 16, dtype=torch.float32)[:, None]
    draws = torch.stack([before.roll(shift, -1) for shift in (-1, 1)])
    start = {"augmentation.magnitude": torch.zeros(5), "augmentation.bias": torch.zeros(1)}
    final = {"augmentation.magnitude": torch.arange(5.0) / 9, "augmentation.bias": torch.ones(1)}
    saved = {"augmented": {"before": before, "after": draws}}
    return make_run(folder, start, final, tune={"augmentation": Tune()}, tuned=saved)


def schedule_run(folder: Path) -> Path:
    time = torch.linspace(0, 1, 500, dtype=torch.float64)
    final = {
        "lr/group0": 0.1 + 0.4 * torch.sin(3.14 * time),
        "weight_decay/group0": torch.tensor(3e-3, dtype=torch.float64),
    }
    start = {
        "lr/group0": torch.full((500,), 0.1).double(),
        "weight_decay/group0": torch.tensor(1e-4).double(),
    }
    tune = {"lr": Tune(per="step", init=0.1), "weight_decay": Tune(init=1e-4, log=True)}
    return make_run(folder, start, final, tune=tune, hyper={"residual": None, "num_matvecs": None},
                    config={"method": {"name": "Unrolled"},
                            "train": {"steps": 500, "episodes": 20}})  # fmt: skip
