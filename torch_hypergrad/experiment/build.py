"""From a configuration to the objects that train: device, data, network, optimizers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from ..errors import HypergradientError
from ..hyper_optimizer import HyperOptimizer
from ..methods import Method, Unrolled
from ..transforms import clip_grad_norm
from ..tune.hyperparameter import Hyperparameter
from .catalog import BASES, known
from .checks import check_length
from .config import Config, ConfigError, Named, Tune, setting_of
from .loggers import check_loggers
from .messages import one_line
from .networks import make_network
from .objective import Objective
from .options import find, make
from .order import Shuffled
from .plain import PlainTraining
from .tasks import Split, Task
from .tasks.checked import loaded
from .values import read_values


@dataclass
class Parts:
    """What the training loop drives."""

    device: torch.device
    objective: Objective
    model: nn.Module
    training: HyperOptimizer | PlainTraining
    scheduler: lr_scheduler.LRScheduler | None
    train_order: Shuffled
    val_order: Shuffled
    steps: int
    """Training steps of an episode."""

    @property
    def task(self) -> Task:
        return self.objective.task

    @property
    def split(self) -> Split:
        return self.objective.split


def build(config: Config) -> Parts:
    """Makes everything that a run needs; nothing is written, nothing trained.

    Raises:
        ConfigError: one line, for data that are missing or parts that do not go together.
    """
    train = config.train
    check_loggers(config.output.loggers)
    method = None if config.method is None else make_method(config)
    if train.fixed is not None:
        method = Unrolled(truncation=1, memory=0)  # applies values of any kind, and keeps next to nothing
    device = choose_device(train.device)
    task, split = _load(json.dumps(config.task, sort_keys=True), train.seed, device)
    task, split = copy.copy(task), split.part(train.part)
    order = Shuffled(len(split.train), train.batch_size, train.seed)
    steps = train.steps if train.steps is not None else train.epochs * order.batches_per_epoch  # type: ignore[operator]
    check_length(config, steps)
    torch.manual_seed(train.seed)
    model = make_network(config.model, task.input_shape, task.num_outputs, task.input_dtype).to(device)
    tensors = {name: task.loss_tensor(name) for name in config.tune}
    example_logits = _example_logits(config, len(split.train), device)
    objective = Objective(task, split, device, train.precision == "bf16", example_logits)
    objective.check(model)
    optimizer = make_optimizer(config.optimizer, "optimizer", list(model.parameters()))
    tensors |= {"example_weights": example_logits}
    training = (
        PlainTraining(model, optimizer, objective.train_loss, _clip(config))
        if method is None
        else _training(config, model, optimizer, objective, method, lambda: _tune(config, tensors, steps))
    )
    _set_values(config, training)
    val_order = Shuffled(len(split.val), train.val_batch_size, train.seed + 1)
    scheduler = _make(config.scheduler, "scheduler", optimizer, skip={"optimizer"})
    return Parts(device, objective, model, training, scheduler, order, val_order, steps)


@lru_cache(maxsize=2)
def _load(task: str, seed: int, device: torch.device) -> tuple[Task, Split]:
    """The trials of a search share their data."""
    made = make_task(json.loads(task))
    return made, loaded(made, seed, device)


def make_task(task: Named) -> Task:
    """The task of a configuration; its data are not read yet.

    Raises:
        ConfigError: one line.
    """
    return _make(task, "task")


def choose_device(name: str) -> torch.device:
    """The device of that name; ``"auto"`` is a GPU where there is one.

    Raises:
        ConfigError: if there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"train.device={name} cannot be used: {reason} Choose auto, cpu or another device."
        ) from error
    if device.type == "meta":
        raise ConfigError("train.device=meta holds no numbers to train with. Choose auto, cpu or cuda.")
    return device


def _example_logits(config: Config, num: int, device: torch.device) -> Tensor | None:
    tune = config.tune.get("example_weights")
    if tune is None:
        return None
    start = torch.logit(torch.tensor(tune.init if isinstance(tune.init, float) else 0.5))
    return start.repeat(num).to(device).requires_grad_()


def make_optimizer(named: Named, section: str, params: list[Tensor]) -> Optimizer:
    """An optimizer by name, of torch or by its import path.

    Raises:
        ConfigError: one line that names the key under ``section``.
    """
    for key, (trains, reason) in NEEDED_TO_TRAIN.items():
        value = named.get(key, 0)
        if isinstance(value, (int, float)) and not trains(value):
            raise ConfigError(f"{section}.{key}={value}: {reason}")
    return _make(named, section, params, skip={"params"})


LARGEST = torch.finfo(torch.float32).max
NEEDED_TO_TRAIN: dict[str, tuple[Callable[[float], bool], str]] = {
    "differentiable": (lambda value: not value, "hypergradients do not need it. Leave it out."),
    "maximize": (lambda value: not value, "it would make the loss as large as possible. Leave it out."),
    "momentum": (lambda value: not value >= 1, "steps would grow without end. It must be below 1."),
    "lr": (lambda value: not abs(value) > LARGEST, "it is beyond what float32 can hold. Take a smaller one."),
}
"""Of options that torch takes, and that would not train."""


def _make(named: Named | None, section: str, *args: Any, skip: Collection[str] = ()) -> Any:
    """What a section names, None if it is null. Raises as :func:`make`."""
    if named is None:
        return None
    if (reason := NOT_FOR_THIS_LOOP.get(str(named.get("name")))) is not None:
        raise ConfigError(f"{section}={named['name']} {reason}. Take another one.")
    return make(named, known(section), BASES[section], section, *args, skip=skip)


NOT_FOR_THIS_LOOP = {
    "SparseAdam": "needs sparse gradients, which no network here has",
    "LBFGS": "evaluates the loss several times a step, which this loop does once",
    "ReduceLROnPlateau": "needs a metric at each step, which the loop does not give it",
}


def _clip(config: Config) -> Any:
    return None if config.train.clip_norm is None else clip_grad_norm(config.train.clip_norm)


def _training(
    config: Config,
    model: nn.Module,
    optimizer: Optimizer,
    objective: Objective,
    method: Method,
    tune: Callable[[], list[Any]],
) -> HyperOptimizer:
    try:
        return HyperOptimizer(
            model,
            optimizer,
            objective.train_loss,
            tune=tune(),
            method=method,
            hyper_optimizer=partial(make_optimizer, config.hyper_optimizer, "hyper_optimizer"),
            val_loss=objective.val_loss,
            grad_transform=_clip(config),
        )
    except ConfigError:
        raise
    except (TypeError, ValueError, HypergradientError) as error:
        raise ConfigError(f"tune or method: {' '.join(str(error).split())}") from error


def _tune(config: Config, tensors: dict[str, Any], steps: int) -> list[Any]:
    settings: list[Any] = []
    for name, tune in config.tune.items():
        if tensors[name] is None:
            start, num_steps = _start(config, name, tune), steps if tune.per == "step" else None
            settings.append(Hyperparameter(name, tune.per, start, tune.low, tune.high, tune.log, num_steps))
    return settings + [(name, tensors[name]) for name in config.tune if tensors[name] is not None]


def _start(config: Config, name: str, tune: Tune) -> float | None:
    """A number; of values from a file their mean, until they are in their places."""
    file = _file_of(config, tune)
    if file is None:
        return tune.init if isinstance(tune.init, float) else None
    given = read_values(file)
    found = [value.flatten() for key, value in given.items() if setting_of(key) == name]
    if not found:
        raise ConfigError(f"tune.{name}: {file} has no {name}. It has {', '.join(list(given)[:5])}.")
    return float(torch.cat(found).double().mean())


def _set_values(config: Config, training: HyperOptimizer | PlainTraining) -> None:
    """Values from files, in the places that they have there."""
    for setting, tune in config.tune.items():
        file = _file_of(config, tune)
        if file is None or not isinstance(training, HyperOptimizer):
            continue
        given = read_values(file)
        wanted = [name for name in training.values() if setting_of(name) == setting]
        missing = [name for name in wanted if name not in given]
        if missing:
            raise ConfigError(
                f"tune.{setting}: {file} has no {missing[0]}. It has {', '.join(list(given)[:5])}: values of "
                "another network, optimizer or per."
            )
        try:
            training.set_values({name: given[name] for name in wanted})
        except ValueError as error:
            raise ConfigError(
                f"tune.{setting}: the values in {file} do not fit. {one_line(error)}"
            ) from error


def _file_of(config: Config, tune: Tune) -> str | None:
    fixed = config.train.fixed
    if fixed is not None and fixed != START:
        return fixed
    return tune.init if isinstance(tune.init, str) else None


START = "start"
"""For train.fixed: the values where tuning would begin."""


def make_method(config: Config) -> Method:
    """The method of a configuration, and its solver. Unrolled looks back on train.hyper_every steps, if
    nothing else is said.

    Raises:
        ConfigError: one line.
    """
    assert config.method is not None
    method = dict(config.method)
    takes = getattr(find(method, known("method"), Method, "method"), "__dataclass_fields__", {})
    if "truncation" in takes and config.train.hyper_every is not None:
        method.setdefault("truncation", config.train.hyper_every)
    return _make(method, "method")
