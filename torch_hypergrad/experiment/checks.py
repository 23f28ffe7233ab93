"""What a configuration must fulfil beyond the types of its keys, found before any data is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from typing import Any, get_args, get_type_hints

from .config import NAMED, Config, ConfigError, Tune

MOST_THREADS = 1024
LOSS_TENSORS = ("example_weights", "augmentation")  # which have a shape of their own

AT_LEAST_ONE = {
    "train": (
        "steps",
        "epochs",
        "episodes",
        "batch_size",
        "hyper_every",
        "val_batch_size",
        "threads",
        "patience",
    ),
    "output": ("log_every", "eval_every", "eval_size", "checkpoint_every", "keep_checkpoints"),
    "compare": ("grid_points",),
}


def check(config: Config) -> None:
    """Refuses what cannot be run, with the first reason.

    Raises:
        ConfigError: one line with the key, what came, what was expected and the remedy.
    """
    for reason in _reasons(config):
        raise ConfigError(reason)


def _reasons(config: Config) -> Iterator[str]:
    yield from _nulls(config)
    yield from _named(config)
    yield from _small_numbers(config)
    yield from _length(config)
    yield from _method(config)
    yield from _tune(config)
    yield from _hyper_steps(config)
    yield from _parts(config)


def _nulls(section: Any, path: str = "") -> Iterator[str]:
    """Keys that are null and may not be."""
    for name, hint in get_type_hints(type(section)).items():
        value = getattr(section, name)
        if value is None and type(None) not in get_args(hint):
            yield f"{path}{name} must not be null."
        elif is_dataclass(value):
            yield from _nulls(value, f"{path}{name}.")
        elif name == "tune":
            for tuned, tune in value.items():
                yield from _nulls(tune, f"tune.{tuned}.")


def _small_numbers(config: Config) -> Iterator[str]:
    for section, keys in AT_LEAST_ONE.items():
        for key in keys:
            value = getattr(getattr(config, section), key)
            if value is not None and value < 1:
                yield f"{section}.{key} must be at least 1, got {value}."
    train = config.train
    if train.threads is not None and train.threads > MOST_THREADS:
        yield f"train.threads must be at most {MOST_THREADS}, got {train.threads}."
    if train.warmup < 0:
        yield f"train.warmup must be at least 0, got {train.warmup}."
    if not 0 <= train.seed < 2**32:
        yield f"train.seed must be in [0, 2**32), got {train.seed}."
    if train.clip_norm is not None and not 0 < train.clip_norm < float("inf"):
        yield f"train.clip_norm must be positive and finite, got {train.clip_norm}. null does not clip."
    if config.output.folder is not None and not config.output.folder.strip():
        yield "output.folder is empty. Name a folder, or set it to null for a new one in runs/."


def _length(config: Config) -> Iterator[str]:
    train = config.train
    if (train.steps is None) == (train.epochs is None):
        yield (
            "Give either train.steps or train.epochs: got "
            f"train.steps={train.steps} and train.epochs={train.epochs}."
        )
    if train.episodes > 1 and config.scheduler is not None:
        yield (
            f"scheduler={config.scheduler['name']} with "
            f"train.episodes={train.episodes}: a scheduler goes on where an episode "
            "begins anew. Tune a schedule (tune.lr.per=step), or set train.episodes to 1."
        )


def _named(config: Config) -> Iterator[str]:
    for section in NAMED:
        named = getattr(config, section)
        if named is not None and not isinstance(named.get("name"), str):
            yield f"{section} needs the name of a class, such as {section}: {getattr(Config(), section)}."


def _method(config: Config) -> Iterator[str]:
    if config.method is None and config.tune:
        yield (
            f"method=null trains without tuning, and tune has {', '.join(config.tune)}. Choose a method, or "
            "empty tune."
        )
    if config.method is not None and not config.tune:
        yield (
            f"tune is empty, and method={config.method['name']} needs something to tune. Name it there, or "
            "set method to null."
        )


def _tune(config: Config) -> Iterator[str]:
    for name, tune in config.tune.items():
        if name in LOSS_TENSORS:
            allowed = Tune(init=tune.init) if name == "example_weights" else Tune()
            for key, value in asdict(tune).items():
                if value != getattr(allowed, key):
                    yield (
                        f"tune.{name}.{key}={value}: {name} takes "
                        f"{'no key but init' if tune.init else 'no keys'}."
                    )
        elif tune.per == "step" and config.train.episodes == 1 and config.train.fixed is None:
            yield (
                f"tune.{name}.per=step tunes a schedule over an episode, which must be trained several "
                "times: set train.episodes to 20 or more, got 1."
            )
    weights = config.tune.get("example_weights")
    if weights and isinstance(weights.init, float) and not 0 < weights.init < 1:
        yield f"tune.example_weights.init must lie between 0 and 1, got {weights.init}."


def _hyper_steps(config: Config) -> Iterator[str]:
    train = config.train
    if config.method is None:
        if train.episodes > 1:
            yield (
                f"train.episodes={train.episodes} with method=null: "
                "nothing changes between episodes. Set it to 1."
            )
        return
    if train.fixed is not None:
        if train.episodes > 1 or train.hyper_every is not None:
            yield (
                f"train.fixed={train.fixed} tunes nothing, and train.episodes={train.episodes}, "
                f"train.hyper_every={train.hyper_every} say when to tune. Set them to 1 and null, as --fixed "
                "does."
            )
        return
    if train.episodes > 1 and (train.patience is not None or train.keep_best):
        yield (
            f"train.patience={train.patience} and train.keep_best={train.keep_best} with train.episodes="
            f"{train.episodes}: each episode begins anew. Set them to null and false."
        )
    if train.episodes == 1 and train.hyper_every is None:
        yield (
            "train.hyper_every is null and train.episodes is 1, so "
            "there would be no hyper step. Set train.hyper_every."
        )
    if train.episodes > 1 and (train.hyper_every is not None or train.warmup):
        yield (
            f"train.hyper_every={train.hyper_every} and train.warmup={train.warmup} "
            f"with train.episodes={train.episodes}: with several episodes there is "
            "one hyper step after each. Set them to null and 0."
        )
    if (
        train.steps is not None
        and train.hyper_every is not None
        and train.warmup + train.hyper_every > train.steps
    ):
        yield (
            "The first hyper step would be at train.warmup + train.hyper_every = "
            f"{train.warmup + train.hyper_every}, and train.steps is {train.steps}: nothing would be tuned. "
            "Train longer, or lower one of them."
        )


def _parts(config: Config) -> Iterator[str]:
    if config.train.part != "train" and config.method is not None:
        yield (
            f"train.part={config.train.part} with method={config.method['name']}: tuning on examples that "
            "are trained on overfits them. Set train.part=train, or method to null and an empty tune."
        )
