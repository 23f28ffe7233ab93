"""Runs of the command line in tests: where they are started, and what must be equal in two of them."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from torch_hypergrad.experiment import workers
from torch_hypergrad.experiment.stopping import StopRequest
from torch_hypergrad.experiment.workers import Job, ThisProcess

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
SURROUNDINGS = {**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}

# Everything random and every kind of state at once: dropout, flips, momentum, a scheduler, label noise,
# batches, and a trajectory with few snapshots that is open at most checkpoints.
UNROLLED = """
task: {name: ImageClassification, train_size: 60, val_size: 40, test_size: 50, \
label_noise: 0.2, augment: flip}
model: {name: CNN, width: 4, dropout: 0.2}
optimizer: {name: Adam, lr: 0.003, eps: 1.0e-4}
scheduler: {name: CosineAnnealingLR, T_max: 100}
tune:
  lr: {log: true}
  weight_decay: {per: element, init: 1.0e-3, log: true}
method: {name: Unrolled, max_snapshots: 5}
hyper_optimizer: {name: Adam, lr: 0.05}
train: {steps: 50, batch_size: 16, hyper_every: 15, warmup: 7, val_batch_size: 20, \
clip_norm: 1.0, threads: 1, seed: 5}
output: {checkpoint_every: 9, log_every: 3, loggers: [], baseline: false}
"""
IMPLICIT = """
task: {name: ImageClassification, train_size: 60, val_size: 40, test_size: 50, label_noise: 0.3}
model: {name: MLP, hidden: [16], dropout: 0.1}
optimizer: {name: SGD, lr: 0.05, momentum: 0.9}
scheduler: {name: StepLR, step_size: 2}
tune:
  weight_decay: {per: tensor, init: 1.0e-2, log: true}
  example_weights: {init: 0.6}
  augmentation: {}
method: {name: Implicit, solver: {name: Neumann, num_terms: 4, damping: 1.0}, num_batches: 3}
train: {epochs: 20, batch_size: 20, hyper_every: 10, warmup: 5, scheduler_every: epoch, threads: 1}
output: {checkpoint_every: 9, log_every: 3, loggers: [], baseline: false}
"""
SCHEDULE = """
task: {name: ImageClassification, train_size: 60, val_size: 40, test_size: 50}
model: {name: Linear}
optimizer: {name: SGD, lr: 0.05, momentum: 0.5}
tune: {lr: {per: step, log: true}}
method: {name: Unrolled}
train: {steps: 12, episodes: 6, batch_size: 20, threads: 1}
output: {checkpoint_every: 5, log_every: 3, loggers: [], baseline: false}
"""
PLAIN = """
task: {name: ImageClassification, train_size: 60, val_size: 40, test_size: 50, augment: crop_flip}
model: {name: CNN, width: 4, dropout: 0.2}
optimizer: {name: SGD, lr: 0.05, momentum: 0.9}
method: null
train: {steps: 30, batch_size: 8, part: train_and_val, clip_norm: 0.5, threads: 1}
output: {checkpoint_every: 7, log_every: 1, loggers: [tensorboard], baseline: false}
"""
CONFIGURATIONS = {"unrolled": UNROLLED, "implicit": IMPLICIT, "schedule": SCHEDULE, "plain": PLAIN}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-W", "error::FutureWarning", "-m", "torch_hypergrad", *map(str, arguments)]


def run_command(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, encoding="utf-8", env=SURROUNDINGS, cwd=cwd, timeout=300
    )


class SentJobs(ThisProcess):
    """In the place of several processes: this one, to which jobs come as bytes."""

    def __init__(self, num_jobs: int, stop: StopRequest) -> None:
        super().__init__(stop)

    def results(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, str | None]]:
        return super().results(pickle.loads(pickle.dumps(jobs)))


@contextmanager
def processes_in_this_one(num_jobs: int) -> Iterator[None]:
    """Jobs for several processes are done here; and so many processes are asked for."""
    with mock.patch.object(workers, "Processes", side_effect=SentJobs) as processes:
        yield
    assert [call.args[0] for call in processes.call_args_list] == [num_jobs]


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The rows of a run, without the times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def check_equal_runs(run: Path, other: Path) -> None:
    """Bit for bit the same weights, tuned values, pictures, metrics and results; only times may differ."""
    for name in ("model.pt", "tuned.pt"):
        ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (run, other))
        check_equal(ours, theirs, name)
    assert metrics_of(run) == metrics_of(other)
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (run, other))
    assert ours | {"seconds": 0} == theirs | {"seconds": 0}


def check_equal(ours: Any, theirs: Any, path: str) -> None:
    assert type(ours) is type(theirs), path
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype, path
        assert torch.equal(ours, theirs), path
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs), path
        for key in ours:
            check_equal(ours[key], theirs[key], f"{path}/{key}")
    else:
        assert ours == theirs, path
