"""What a finished run leaves for its report: test results, tuned values, pictures that explain them."""

from __future__ import annotations

import platform
from typing import Any

import sklearn
import torch
import torchvision
from torch import Tensor

from .build import Parts
from .data import pixels

NUM_LOWEST = 40
NUM_AUGMENTED = 8
NUM_DRAWS = 4


def summary_of(parts: Parts, progress: dict[str, Any], values: dict[str, Tensor]) -> dict[str, Any]:
    """The numbers of a finished run; only here is the test set looked at."""
    from .. import __version__

    sets = {"train": parts.data.train, "val": parts.data.val, "test": parts.data.test}
    counts = {
        "steps": progress["step"],
        **{k: progress[k] for k in ("cost", "num_hyper_steps", "num_skipped", "seconds")},
    }
    return {
        **counts,
        **{name: parts.objective.evaluate(parts.model, images) for name, images in sets.items()},
        "inputs": {
            "shape": list(parts.data.train.images.shape[1:]),
            "classes": list(parts.data.classes),
            "mean": parts.data.mean.tolist(),
            "std": parts.data.std.tolist(),
        },
        "sizes": {name: len(images) for name, images in sets.items()},
        "num_parameters": sum(p.numel() for p in parts.model.parameters()),
        "num_values": sum(value.numel() for value in values.values()),
        "device": torch.cuda.get_device_name(parts.device)
        if parts.device.type == "cuda"
        else parts.device.type,
        "threads": torch.get_num_threads(),
        "versions": {
            "torch_hypergrad": __version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "scikit-learn": sklearn.__version__,
            "python": platform.python_version(),
        },
    }


def tuned_of(parts: Parts, start: dict[str, Tensor], values: dict[str, Tensor]) -> dict[str, Any]:
    """First and last values, and the pictures that a report draws beside them."""
    found: dict[str, Any] = {
        "start": {name: value.cpu() for name, value in start.items()},
        "values": {name: value.cpu() for name, value in values.items()},
        "mean_image": pixels(parts.data.train.images.float().mean(0).cpu()),
        "classes": list(parts.data.classes),
        "model": {name: list(param.shape) for name, param in parts.model.named_parameters()},
    }
    if parts.objective.example_logits is not None:
        found |= _example_weights(parts)
    if parts.objective.augmenter is not None:
        found["augmented"] = _augmented(parts)
    return found


def _example_weights(parts: Parts) -> dict[str, Any]:
    assert parts.objective.example_logits is not None
    weights, data = parts.objective.example_logits.detach().sigmoid().cpu(), parts.data
    lowest = weights.argsort(stable=True)[:NUM_LOWEST]
    images = data.train.to(torch.device("cpu"))[lowest]
    wrong = data.wrong.cpu()
    return {
        "example_weights": weights,
        "wrong": wrong,
        "lowest": {
            "images": images.images,
            "labels": images.labels,
            "weights": weights[lowest],
            "wrong": wrong[lowest],
        },
    }


@torch.no_grad()
def _augmented(parts: Parts) -> dict[str, Tensor]:
    assert parts.objective.augmenter is not None
    before = pixels(parts.data.train.images[:NUM_AUGMENTED])
    after = torch.stack([parts.objective.augmenter(before) for _ in range(NUM_DRAWS)])
    return {"before": before.cpu(), "after": after.clamp(0, 1).cpu()}
