"""The training loop: steps, hyper steps, metrics, checkpoints, and the way on after a stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ..errors import HypergradientError, SolverError
from ..hyper_optimizer import HyperOptimizer
from .build import Parts
from .config import Config
from .edits import Change, check_edits, told
from .metrics import MetricsLog, by_kind, in_brief
from .old import today
from .parsing import config_of
from .results import pictures_of, summary_of, tuned_of, words_of
from .run_folder import RunFolder, as_dict
from .stopping import StopRequest, TrainingError

REMEDY = "Lower the learning rate, or set train.clip_norm."


Watch = Callable[[int, float, float], None]


@dataclass
class Progress:
    """Where a run is, apart from the weights."""

    step: int = 0
    seconds: float = 0.0
    cost: float = 0.0
    num_hyper_steps: int = 0
    num_skipped: int = 0
    metrics_size: int = 0
    best_step: int = 0
    best_val_loss: float = math.inf
    num_no_better: int = 0


@dataclass(frozen=True)
class Loaded:
    """What was found on the way to a checkpoint.

    Args:
        damaged: newer checkpoints that were passed over.
        missing: bytes of the metrics that were there when it was written, and are not.
        changes: of the configuration since then.
    """

    damaged: list[Path]
    missing: int
    changes: dict[str, Change]


class Run:
    """One run of a configuration in its folder, from the start or from its newest checkpoint.

    Args:
        config: the configuration, checked.
        parts: what :func:`build` made of it.
        folder: an existing run folder.
        watch: is told of each evaluation: step, validation loss and cost so far.
    """

    def __init__(self, config: Config, parts: Parts, folder: RunFolder, watch: Watch | None = None) -> None:
        self.config, self.parts, self.folder, self._watch = config, parts, folder, watch
        self.progress = Progress()
        self.total = parts.steps * config.train.episodes
        self._eval_every = config.output.eval_every or max(1, self.total // 50)
        self._checkpoint_every = config.output.checkpoint_every or max(1, self.total // 10)
        self._start = parts.training.values()
        self._losses = {"train": float("nan"), "val": float("nan")}
        self._told: set[str] = set()

    # ---- training ------------------------------------------------------------------------------------------

    def train(self, stop: StopRequest, quiet: bool = False) -> bool:
        """Trains to the end, or until a stop is requested: then it finishes the step and saves a checkpoint.

        Returns:
            Whether the run is finished.

        Raises:
            TrainingError: if the training loss is no longer finite, or a hypergradient is not.
        """
        with tqdm(
            total=self.total,
            initial=self.progress.step,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            disable=quiet,
        ) as bar:
            loggers = self.config.output.loggers
            self._metrics = MetricsLog(self.folder, self.progress.step, loggers, as_dict(self.config))
            try:
                self._train(stop, bar)
            finally:
                self._metrics.close()
        if not self._over:
            return False
        self._finish()
        return True

    def _train(self, stop: StopRequest, bar: tqdm) -> None:
        progress, began = self.progress, time.monotonic() - self.progress.seconds
        if progress.step == 0:
            self.folder.log({"kind": "task", "step": 0, **words_of(self.parts.task)})
            self._evaluate(bar)
        while progress.step < self.total and not self._patience_is_over and not stop.requested:
            self._step(bar)
            progress.seconds = time.monotonic() - began
            if progress.step % self._eval_every == 0 or progress.step == self.total:
                self._evaluate(bar)
            if is_hyper_step(self.config, self.parts.steps, progress.step):
                self._hyper_step(bar)
            bar.update()
            if progress.step % self._checkpoint_every == 0 and progress.step < self.total:
                self._save()
        if not self._over:
            self._save()

    @property
    def _patience_is_over(self) -> bool:
        patience = self.config.train.patience
        return patience is not None and self.progress.num_no_better >= patience

    @property
    def _over(self) -> bool:
        return self.progress.step >= self.total or self._patience_is_over

    def _step(self, bar: tqdm) -> None:
        config, progress, parts = self.config, self.progress, self.parts
        rows = parts.train_order.batch(progress.step).to(parts.device)
        loss = self._guarded(lambda: parts.training.step(rows))
        progress.step += 1
        progress.cost += 1
        parts.objective.prepare(parts.train_order.batch(progress.step))
        self._step_scheduler()
        if progress.step % config.output.log_every == 0:
            self._log_train_loss(float(loss), bar)

    def _step_scheduler(self) -> None:
        scheduler, order = self.parts.scheduler, self.parts.train_order
        every_step = self.config.train.scheduler_every == "step"
        if scheduler is not None and (every_step or self.progress.step % order.batches_per_epoch == 0):
            scheduler.step()

    def _hyper_step(self, bar: tqdm) -> None:
        hyper, progress, order = self.parts.training, self.progress, self.parts.val_order
        assert isinstance(hyper, HyperOptimizer)
        rows = order.batch(progress.num_hyper_steps + progress.num_skipped).to(self.parts.device)
        try:
            report = self._guarded(lambda: hyper.hyper_step(rows))
        except SolverError as error:
            progress.num_skipped += 1
            reason = " ".join(str(error).split())
            self._metrics.log({"kind": "skipped", "step": progress.step, "reason": reason})
            self._say(f"hyper step skipped. {reason}", bar)
        else:
            progress.num_hyper_steps += 1
            window = self.config.train.hyper_every or self.parts.steps
            num_values = sum(value.numel() for value in hyper.values().values())
            progress.cost += hyper.method.cost(window, num_values, report.num_matvecs)
            self._metrics.hyper_step(progress.step, report, hyper.values())
            self._tell(report.warnings, bar)
        if self.config.train.episodes > 1:
            hyper.restart()

    def _tell(self, warnings: Sequence[str], bar: tqdm) -> None:
        """Prints each kind of warning once; how often it came is told at the end, from the metrics."""
        for kind, warning in by_kind(warnings).items():
            if kind not in self._told:
                self._say(f"warning. {warning}", bar)
            self._told.add(kind)

    def _say(self, message: str, bar: tqdm) -> None:
        """A line beside the progress bar; a quiet run leaves it to the metrics and whoever started it."""
        if not bar.disable:
            bar.write(f"step {self.progress.step}: {message}")

    def _guarded(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except SolverError:
            raise
        except HypergradientError as error:
            self._fail(" ".join(str(error).split()))

    def _fail(self, reason: str) -> None:
        raise TrainingError(
            f"Training stopped after step {self.progress.step}: "
            f"{reason} The metrics are in {self.folder.path}."
        )

    # ---- metrics -------------------------------------------------------------------------------------------

    def _log_train_loss(self, loss: float, bar: tqdm) -> None:
        if not math.isfinite(loss):
            self._fail(f"the training loss is {loss}. {REMEDY}")
        self._metrics.log({"kind": "train", "step": self.progress.step, "loss": loss})
        self._losses["train"] = loss
        self._show(bar)

    def _evaluate(self, bar: tqdm) -> None:
        parts, most = self.parts, self.config.output.eval_size
        train, val = (
            parts.objective.evaluate(parts.model, part, most) for part in (parts.split.train, parts.split.val)
        )
        if not math.isfinite(train["loss"] + val["loss"]):
            self._fail(
                f"the loss is {train['loss']} on the training set "
                f"and {val['loss']} on the validation set. {REMEDY}"
            )
        row = {"kind": "eval", "step": self.progress.step, "seconds": round(self.progress.seconds, 2)}
        self._metrics.log({**row, "train": train, "val": val})
        self._losses.update(train=train["loss"], val=val["loss"])
        self._show(bar)
        self._compare_with_best(val["loss"])
        if self._watch is not None:
            self._watch(self.progress.step, val["loss"], self.progress.cost)

    def _compare_with_best(self, val_loss: float) -> None:
        progress = self.progress
        if val_loss < progress.best_val_loss:
            progress.best_val_loss, progress.best_step, progress.num_no_better = val_loss, progress.step, 0
            if self.config.train.keep_best:
                best = {"model": self.parts.model.state_dict(), "values": self.parts.training.values()}
                self.folder.save_best(best)
        else:
            progress.num_no_better += 1

    def _show(self, bar: tqdm) -> None:
        losses = {f"{name} loss": f"{loss:.4f}" for name, loss in self._losses.items()}
        bar.set_postfix(losses | in_brief(self.parts.training.values()), refresh=False)

    # ---- checkpoints and results ---------------------------------------------------------------------------

    def _save(self) -> None:
        self._metrics.flush()
        self.progress.metrics_size = self.folder.sync_metrics()
        scheduler = self.parts.scheduler
        state = {
            "progress": asdict(self.progress),
            "training": self.parts.training.state_dict(),
            "scheduler": scheduler.state_dict() if scheduler else None,
            "losses": self._losses,
            "config": as_dict(self.config),
        }
        self.folder.save_checkpoint(self.progress.step, state, self.config.output.keep_checkpoints)

    def load(self) -> Loaded:
        """Goes back to the newest checkpoint that is whole, or to the start where there is none.

        Raises:
            ConfigError: if the configuration was edited in what may not change.
        """
        state, damaged = self.folder.load_checkpoint()
        changes: dict[str, Change] = {}
        if state is not None:
            if "config" in state:
                trained, where = as_dict(config_of(today(state["config"]))), str(self.folder.config_file)
                changes = check_edits(trained, as_dict(self.config), where)
            _check_dtypes(state["training"]["model"], self.parts.model.state_dict())
            self.progress = Progress(**state["progress"])
            self.parts.training.load_state_dict(state["training"])
            if self.parts.scheduler is not None:
                self.parts.scheduler.load_state_dict(state["scheduler"])
            self._losses = state["losses"]
        missing = self.folder.open_metrics(self.progress.metrics_size)
        if changes:
            self.folder.log({"kind": "edited", "step": self.progress.step, "changes": told(changes)})
        return Loaded(damaged, missing, changes)

    def _finish(self) -> None:
        values: dict[str, Tensor] = self.parts.training.values()
        if self.config.train.keep_best:
            best = self.folder.load_best()
            self.parts.model.load_state_dict(best["model"])
            values = best["values"]
            if isinstance(self.parts.training, HyperOptimizer):
                self.parts.training.begin_window()
                self.parts.training.set_values(values)
        tuned = tuned_of(self.parts, self._start, values)
        summary = summary_of(self.parts, asdict(self.progress), values)
        summary["config"] = {key: part for key, part in as_dict(self.config).items() if key != "output"}
        pictures = pictures_of(self.parts, values)
        summary["best_step"] = self.progress.best_step
        summary["kept_best"] = self.config.train.keep_best
        summary["stopped_early"] = self.progress.step < self.total
        self.folder.finish(summary, tuned, self.parts.model.state_dict(), pictures)


def _check_dtypes(saved: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> None:
    """torch would convert them in silence."""
    for name, tensor in saved.items():
        if name in here and tensor.dtype != here[name].dtype:
            raise ValueError(f"{name} is of {tensor.dtype}, and the network's of {here[name].dtype}.")


def is_hyper_step(config: Config, steps: int, step: int) -> bool:
    """Whether a hyper step follows training step ``step``, counted from 1, with ``steps`` to an episode."""
    train = config.train
    if config.method is None or train.fixed is not None:
        return False
    if train.episodes > 1:
        return step % steps == 0 and step < steps * train.episodes
    return (
        train.hyper_every is not None
        and step > train.warmup
        and (step - train.warmup) % train.hyper_every == 0
    )
