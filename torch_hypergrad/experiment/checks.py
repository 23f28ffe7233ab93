"""What a configuration must fulfil beyond the types of its keys, found before any data is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from .config import NAMED, Config, ConfigError, Tune

LOSS_TENSORS = {"example_weights": ("init", "no key but init"), "augmentation": (None, "no keys")}
"""What has a shape of its own, and the key that it takes."""


def check(config: Config) -> None:
    """Refuses what cannot be run, with the first reason.

    Raises:
        ConfigError: one line with the key, what came, what was expected and the remedy.
    """
    for rules in (_classes, _length, _method, _tune, _hyper_steps):
        for reason in rules(config):
            raise ConfigError(reason)
    if config.train.steps is not None:
        check_length(config, config.train.steps)


def check_length(config: Config, steps: int) -> None:
    """Refuses a training of so many steps that has no hyper step. Raises as :func:`check`."""
    first = config.train.warmup + (config.train.hyper_every or 0)
    if config.method is not None and first > steps:
        raise ConfigError(
            f"The first hyper step would be at train.warmup + train.hyper_every = {first}, after the {steps} "
            "training steps: nothing would be tuned. Train longer, or lower one of them."
        )


def _classes(config: Config) -> Iterator[str]:
    for name in NAMED:
        named = getattr(config, name)
        if named is not None and not isinstance(named.get("name"), str):
            example = getattr(Config(), name) or {"name": "StepLR", "step_size": 30}
            yield f"{name} needs the name of a class, such as {name}: {example}; got {named}."


def _length(config: Config) -> Iterator[str]:
    steps, epochs, episodes = config.train.steps, config.train.epochs, config.train.episodes
    if (steps is None) == (epochs is None):
        yield f"Give either train.steps or train.epochs: got train.steps={steps} and train.epochs={epochs}."
    if episodes > 1 and config.scheduler is not None:
        yield (
            f"scheduler={config.scheduler['name']} with train.episodes={episodes}: a scheduler goes on where "
            "an episode begins anew. Tune a schedule (tune.lr.per=step), or set train.episodes to 1."
        )


def _method(config: Config) -> Iterator[str]:
    part = config.train.part
    if config.method is None:
        if config.tune:
            yield (
                f"method=null trains without tuning, and tune has {', '.join(config.tune)}. Choose a method, "
                "or empty tune."
            )
        return
    name = config.method["name"]
    if not config.tune:
        yield f"tune is empty, and method={name} needs something to tune. Name it, or set method to null."
    if part != "train":
        yield (
            f"train.part={part} with method={name}: tuning on examples that are trained on overfits them. "
            "Set train.part=train, or method to null and an empty tune."
        )


def _tune(config: Config) -> Iterator[str]:
    for name, tune in config.tune.items():
        changed = {key: value for key, value in asdict(tune).items() if value != getattr(Tune(), key)}
        if name in LOSS_TENSORS:
            allowed, takes = LOSS_TENSORS[name]
            for key in changed.keys() - {allowed}:
                yield f"tune.{name}.{key}={changed[key]}: {name} takes {takes}."
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
    episodes, every = f"train.episodes={train.episodes}", f"train.hyper_every={train.hyper_every}"
    if config.method is None:
        if train.episodes > 1:
            yield f"{episodes} with method=null: nothing changes between episodes. Set it to 1."
    elif train.fixed is not None:
        if train.episodes > 1 or train.hyper_every is not None:
            yield (
                f"train.fixed={train.fixed} tunes nothing, and {episodes}, {every} say when to tune. "
                "Set them to 1 and null, as --fixed does."
            )
    elif train.episodes > 1:
        if train.patience is not None or train.keep_best:
            yield (
                f"train.patience={train.patience} and train.keep_best={train.keep_best} with {episodes}: "
                "each episode begins anew. Set them to null and false."
            )
        if train.hyper_every is not None or train.warmup:
            yield (
                f"{every} and train.warmup={train.warmup} with {episodes}: with several episodes there is "
                "one hyper step after each. Set them to null and 0."
            )
    elif train.hyper_every is None:
        yield f"{every} and {episodes}: there would be no hyper step. Set train.hyper_every."
