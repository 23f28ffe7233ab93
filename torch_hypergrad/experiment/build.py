"""From a configuration to the objects that train: device, data, network, optimizers."""

from __future__ import annotations

import difflib
import inspect
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from ..errors import HypergradientError
from ..hyper_optimizer import HyperOptimizer
from ..methods import Method
from ..transforms import clip_grad_norm
from ..tune.hyperparameter import Hyperparameter
from .checks import LOSS_TENSORS, METHODS, SOLVERS, method_keys
from .config import Config, ConfigError, DataConfig
from .data import Data, load_data
from .models import Augmenter, make_model
from .objective import Objective
from .options import call_with_options
from .order import Shuffled
from .plain import PlainTraining


@lru_cache(maxsize=2)
def _load_data(config: DataConfig, seed: int, device: torch.device) -> Data:
    """The trials of a search share their images."""
    return load_data(config, seed).to(device)


@dataclass
class Parts:
    """What the training loop drives."""

    device: torch.device
    data: Data
    objective: Objective
    model: nn.Module
    training: HyperOptimizer | PlainTraining
    scheduler: lr_scheduler.LRScheduler | None
    train_order: Shuffled
    val_order: Shuffled
    steps: int
    """Training steps of an episode."""


def build(config: Config) -> Parts:
    """Makes everything that a run needs; nothing is written, nothing trained.

    Raises:
        ConfigError: one line, for data that are missing or parts that do not go together.
    """
    train = config.train
    device = choose_device(train.device)
    data = _load_data(config.data, train.seed, device)
    order = Shuffled(len(data.train), train.batch_size, train.seed)
    steps = train.steps if train.steps is not None else train.epochs * order.batches_per_epoch  # type: ignore[operator]
    _check_length(config, steps)
    torch.manual_seed(train.seed)
    model = make_model(config.model, tuple(data.train.images.shape[1:]), len(data.classes)).to(device)  # type: ignore[arg-type]
    augmenter = Augmenter(data.train.images.shape[1]).to(device) if "augmentation" in config.tune else None
    objective = Objective(
        data, config.data.augment, train.precision == "bf16", _example_logits(config, data), augmenter
    )
    optimizer = make_optimizer(
        config.optimizer.name, config.optimizer.options, "optimizer", list(model.parameters())
    )
    training = _training(config, model, optimizer, objective, steps)
    return Parts(
        device,
        data,
        objective,
        model,
        training,
        _scheduler(config, optimizer),
        order,
        Shuffled(len(data.val), train.val_batch_size, train.seed + 1),
        steps,
    )


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


def _check_length(config: Config, steps: int) -> None:
    train = config.train
    first = train.warmup + (train.hyper_every or 0)
    if config.method.name != "none" and first > steps:
        raise ConfigError(
            "The first hyper step would be at train.warmup + train.hyper_every "
            f"= {first}, and train.epochs={train.epochs} makes {steps} training "
            "steps: nothing would be tuned. Train longer, or lower one of them."
        )


def _example_logits(config: Config, data: Data) -> Tensor | None:
    tune = config.tune.get("example_weights")
    if tune is None:
        return None
    start = torch.logit(torch.tensor(0.5 if tune.init is None else tune.init))
    return start.repeat(len(data.train)).to(data.train.images.device).requires_grad_()


def make_optimizer(name: str, options: dict[str, Any], section: str, params: list[Tensor]) -> Optimizer:
    """An optimizer of torch by name.

    Raises:
        ConfigError: one line that names the key under ``section``.
    """
    kind = _class_in(torch.optim, name, Optimizer, f"{section}.name")
    if name in NOT_FOR_NETWORKS:
        raise ConfigError(f"{section}.name={name} {NOT_FOR_NETWORKS[name]}. Take SGD, Adam or another one.")
    for key, value in options.items():
        reason = _why_not(key, value)
        if reason is not None:
            raise ConfigError(f"{section}.options.{key}={value}: {reason}")
    return call_with_options(kind, options, f"{section}.options", params, skip={"params"})


NOT_FOR_NETWORKS = {
    "SparseAdam": "needs sparse gradients, which no network here has",
    "LBFGS": "evaluates the loss several times a step, which this loop does once",
}


def _why_not(key: str, value: Any) -> str | None:
    """What torch takes for an option, and would not train."""
    if key == "differentiable" and value:
        return "hypergradients do not need it. Leave it out."
    if key == "maximize" and value:
        return "it would make the loss as large as possible. Leave it out."
    if key == "momentum" and isinstance(value, (int, float)) and value >= 1:
        return "steps would grow without end. It must be below 1."
    if key == "lr" and isinstance(value, (int, float)) and abs(value) > torch.finfo(torch.float32).max:
        return "it is beyond what float32 can hold. Take a smaller one."
    return None


def _scheduler(config: Config, optimizer: Optimizer) -> lr_scheduler.LRScheduler | None:
    scheduler = config.scheduler
    if scheduler.name is None:
        return None
    if scheduler.name == "ReduceLROnPlateau":
        raise ConfigError(
            "scheduler.name=ReduceLROnPlateau needs a metric at each step, which the loop does not give it."
        )
    kind = _class_in(lr_scheduler, scheduler.name, lr_scheduler.LRScheduler, "scheduler.name")
    return call_with_options(kind, scheduler.options, "scheduler.options", optimizer, skip={"optimizer"})


def _class_in(module: ModuleType, name: str, base: type, key: str) -> Any:
    classes = {n: thing for n, thing in vars(module).items() if inspect.isclass(thing)}
    known = [n for n, thing in classes.items() if issubclass(thing, base) and thing is not base]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise ConfigError(f"{key}={name} is no class of {module.__name__}. The nearest is {near}.")
    return classes[name]


def _training(
    config: Config, model: nn.Module, optimizer: Optimizer, objective: Objective, steps: int
) -> HyperOptimizer | PlainTraining:
    clip = None if config.train.clip_norm is None else clip_grad_norm(config.train.clip_norm)
    if config.method.name == "none":
        return PlainTraining(model, optimizer, objective.train_loss, clip)
    hyper = config.hyper_optimizer
    try:
        return HyperOptimizer(
            model,
            optimizer,
            objective.train_loss,
            tune=_tune(config, objective, steps),
            method=make_method(config),
            hyper_optimizer=partial(make_optimizer, hyper.name, hyper.options, "hyper_optimizer"),
            val_loss=objective.val_loss,
            grad_transform=clip,
        )
    except ConfigError:
        raise
    except (TypeError, ValueError, HypergradientError) as error:
        raise ConfigError(f"tune or method: {' '.join(str(error).split())}") from error


def _tune(config: Config, objective: Objective, steps: int) -> list[Any]:
    settings: list[Any] = [
        Hyperparameter(
            name, tune.per, tune.init, tune.low, tune.high, tune.log, steps if tune.per == "step" else None
        )
        for name, tune in config.tune.items()
        if name not in LOSS_TENSORS
    ]
    loss_tensors = {"example_weights": objective.example_logits, "augmentation": objective.augmenter}
    return settings + [(name, loss_tensors[name]) for name in config.tune if name in LOSS_TENSORS]


def make_method(config: Config) -> Method:
    """The method of a configuration, and its solver.

    Raises:
        TypeError, ValueError: for numbers that it refuses.
    """
    method = config.method
    taken = method_keys(method)
    given = {f.name: getattr(method, f.name) for f in fields(method) if getattr(method, f.name) is not None}
    arguments = {key: value for key, value in given.items() if key in taken["method"] and key != "solver"}
    if method.name == "implicit":
        solver = SOLVERS[method.solver or "neumann"]
        arguments["solver"] = solver(**{key: value for key, value in given.items() if key in taken["solver"]})
    if method.name == "unrolled" and config.train.hyper_every is not None:
        arguments.setdefault("truncation", config.train.hyper_every)
    return METHODS[method.name](**arguments)
