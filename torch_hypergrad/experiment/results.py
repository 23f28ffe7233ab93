"""What a finished run leaves for its report: test results, tuned values, pictures that explain them."""

from __future__ import annotations

import io
import platform
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from .build import Parts
from .objective import evaluating
from .stopping import TrainingError
from .tasks import Task
from .tasks.checked import blamed

MOST_TRAINING = 100_000
"""Training examples that the network of a finished run is evaluated on, at most."""


def words_of(task: Task) -> dict[str, Any]:
    """What a report calls things: examples, the loss, the metrics."""
    metrics = {
        name: {"percent": metric.percent, "higher_is_better": metric.higher_is_better}
        for name, metric in task.metrics().items()
    }
    return {"data": task.data, "examples": task.examples, "loss": task.loss, "metrics": metrics}


def summary_of(parts: Parts, progress: dict[str, Any], values: dict[str, Tensor]) -> dict[str, Any]:
    """The numbers of a finished run, in float32, as :func:`load_run` computes; only here is the test set
    looked at. It and the validation set are evaluated whole; of training examples :data:`MOST_TRAINING`,
    spread evenly over them."""
    sets = {"train": parts.split.train, "val": parts.split.val, "test": parts.split.test}
    sizes = {name: len(examples) for name, examples in sets.items()}
    evaluated = {**sizes, "train": min(sizes["train"], MOST_TRAINING)}
    objective = parts.objective.in_float32()
    counts = {
        "steps": progress["step"],
        **{k: progress[k] for k in ("cost", "num_hyper_steps", "num_skipped", "seconds")},
    }
    return {
        **counts,
        **{
            name: objective.evaluate(parts.model, examples, evaluated[name])
            for name, examples in sets.items()
        },
        "words": words_of(parts.task),
        "inputs": parts.task.state(),
        "sizes": sizes,
        "evaluated": evaluated,
        "num_parameters": sum(p.numel() for p in parts.model.parameters()),
        "num_values": sum(value.numel() for value in values.values()),
        "device": torch.cuda.get_device_name(parts.device)
        if parts.device.type == "cuda"
        else parts.device.type,
        "threads": torch.get_num_threads(),
        "versions": {
            **{name: version(name) for name in ("torch_hypergrad", "torch", "torchvision", "scikit-learn")},
            "python": platform.python_version(),
        },
    }


def tuned_of(parts: Parts, start: dict[str, Tensor], values: dict[str, Tensor]) -> dict[str, Any]:
    """First and last values, and what the task's own pictures need."""
    logits = parts.objective.example_logits
    weights = None if logits is None else logits.detach().sigmoid()
    with blamed(f"Training stopped: {type(parts.task).__name__}.keepsakes", TrainingError):
        kept = parts.task.keepsakes(parts.split, weights)
    found: dict[str, Any] = {
        "start": {name: value.cpu() for name, value in start.items()},
        "values": {name: value.cpu() for name, value in values.items()},
        "model": {name: list(param.shape) for name, param in parts.model.named_parameters()},
        **kept,
    }
    if weights is not None:
        wrong = parts.split.wrong
        known = torch.zeros(len(weights), dtype=torch.bool) if wrong is None else wrong.cpu()
        found |= {"example_weights": weights.cpu(), "wrong": known}
    return found


def pictures_of(parts: Parts, values: dict[str, Tensor]) -> list[tuple[str, bytes]]:
    """The task's own pictures: captions, and PNG."""
    found = []
    with (
        blamed(f"Training stopped: {type(parts.task).__name__}.figures", TrainingError),
        evaluating(parts.model),
    ):
        for caption, figure in parts.task.figures(parts.model, parts.split, values).items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=130)
            found.append((caption, buffer.getvalue()))
    return found
