"""The schema of a configuration: every key with its type, default and meaning."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import restricted_number_type, restricted_string_type

if TYPE_CHECKING:
    Count = int
    Whole = int
    Seed = int
    Threads = int
    Norm = float
    Words = str
else:  # a name says in messages and in the help what is expected
    Count = restricted_number_type("int of at least 1", int, (">=", 1))
    Whole = restricted_number_type("int of at least 0", int, (">", -1))
    Seed = restricted_number_type("int from 0 to 2**32 - 1", int, [(">=", 0), ("<", 2**32)])
    Threads = restricted_number_type("int from 1 to 1024", int, [(">=", 1), ("<=", 1024)])
    Norm = restricted_number_type("positive, finite number", float, [(">", 0), ("<", float("inf"))])
    Words = restricted_string_type("non-empty str", r"(?s).*\S")

Named = dict[str, Any]
"""A class by its name, and arguments beside it, as in ``{name: SGD, lr: 0.1}``; an argument may be such a
thing itself."""


class ConfigError(ValueError):
    """A configuration that cannot be run. One line: the key, what came, what was expected, the remedy."""


@dataclass(frozen=True)
class Tune:
    """What is tuned under one name of the section tune, and how.

    Args:
        per: one value for each group of parameters, each tensor, each element (every single weight), or each
            training step (a schedule); of example_weights there is always one for each training example
        init: the start: a number, or a file of tuned values (values.yaml or values.safetensors of a run, or
            its folder). null takes the optimizer's value; for example_weights a weight between 0 and 1, null
            takes 0.5
        low: lower bound. null takes the setting's legal range
        high: upper bound, likewise
        log: optimize the logarithm, which needs a positive start
    """

    per: Literal["group", "tensor", "element", "step"] = "group"
    init: float | str | None = None
    low: float | None = None
    high: float | None = None
    log: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Args:
        part: which examples to train on. Others than train are for rivals of a tuned model
        steps: training steps of an episode; give this or epochs
        epochs: passes over the training examples
        episodes: trainings from the same initial weights, with a hyper step after each but the last
        batch_size: examples of a training step. null takes all
        warmup: training steps before the first hyper step
        fixed: a file of tuned values, as for init: these are used as they are, and nothing is tuned; start
            takes the values at their start
        patience: training ends when so many evaluations in a row have not lowered the validation loss. null
            trains to the end
        keep_best: keep the weights, and the tuned values, of the evaluation with the least validation loss
        hyper_every: training steps from one hyper step to the next. null takes one after each episode
        val_batch_size: validation examples of a hyper step, drawn anew for each. null takes all
        scheduler_every: when the learning-rate scheduler steps
        clip_norm: gradients are scaled down to this norm. null does not
        precision: bf16 runs the network under autocast in training; the results at its end are in float32
        device: auto takes a GPU where there is one; or cpu, cuda, cuda:1
        threads: threads of the CPU. null leaves them to torch. Bitwise the same results need the same number
        seed: of the split, the label noise, the initial weights, the order of the examples and all noise
    """

    part: Literal["train", "val", "train_and_val"] = "train"
    steps: Count | None = None
    epochs: Count | None = None
    episodes: Count = 1
    batch_size: Count | None = 128
    warmup: Whole = 0
    fixed: str | None = None
    patience: Count | None = None
    keep_best: bool = False
    hyper_every: Count | None = None
    val_batch_size: Count | None = None
    scheduler_every: Literal["step", "epoch"] = "step"
    clip_norm: Norm | None = None
    precision: Literal["float32", "bf16"] = "float32"
    device: str = "auto"
    threads: Threads | None = None
    seed: Seed = 0


@dataclass(frozen=True)
class OutputConfig:
    """What a run writes, and where.

    Args:
        folder: the folder of the run. null takes a new one in runs/, with the configuration's
            name, the seed, date and time
        log_every: training steps between two lines of the training loss
        eval_every: training steps between two evaluations on the training and validation sets. null takes a
            fiftieth of the run
        eval_size: examples of each set in such an evaluation, always the same; null takes all. The end of the
            run takes all, but of training examples 100,000 at most
        checkpoint_every: training steps between two checkpoints. null takes a tenth of the run
        keep_checkpoints: how many of the last checkpoints stay
        loggers: who is told the metrics as well: tensorboard (event files in the folder), wandb, mlflow
        baseline: train the same again with all values fixed at their start, for the report. null does if
            training took less than a minute
    """

    folder: Words | None = None
    log_every: Count = 10
    eval_every: Count | None = None
    eval_size: Count | None = 2000
    checkpoint_every: Count | None = None
    keep_checkpoints: Count = 2
    loggers: list[str] = field(default_factory=lambda: ["tensorboard"])
    baseline: bool | None = None


@dataclass(frozen=True)
class CompareConfig:
    """The rivals of the command compare: searches over one value, or some, for the whole model.

    Args:
        space: what they search, by keys of the configuration, written as the key space
        samplers: each is a search that costs what the tuned run costs; a grid costs what its points do
        grid_points: values of each range in a grid
    """

    space: dict[str, Any] = field(
        default_factory=lambda: {
            "optimizer.weight_decay": {"type": "float", "low": 1e-5, "high": 1e-1, "log": True}
        }
    )
    samplers: list[str] = field(default_factory=lambda: ["grid", "random"])
    grid_points: Count = 5


@dataclass(frozen=True)
class Config:
    """One run. Where a class is named, its arguments stand beside the name, as in --optimizer SGD
    --optimizer.lr 0.1 and {name: SGD, lr: 0.1}; --optimizer.help SGD lists them.

    Args:
        task: what is learned: ImageClassification, TabularClassification, TabularRegression or TextBytes, or
            the import path of a Task of one's own, such as my_package.MyTask
        model: the network: Linear, MLP, CNN, ResNet18, ByteMLP, or the import path of an nn.Module
        optimizer: of the weights: a class of torch.optim
        scheduler: a class of torch.optim.lr_scheduler, whose factor multiplies a tuned learning rate. null
            takes none
        tune: what is tuned, by name: a setting of the optimizer (weight_decay, lr, momentum, betas.0, ...),
            example_weights, or what the task has (augmentation of images). Under each name, with their
            defaults: per (group, tensor, element or step; group), init (a number; null: the optimizer's
            value), low and high (bounds; null: the legal range), log (tune the logarithm; false), as in
            --tune.weight_decay.per element
        method: how hypergradients are computed: Implicit, with a solver (Neumann, CG, Nystrom, Cholesky,
            Identity), for what moves the training optimum (weight decay, example weights, augmentation);
            Unrolled or ForwardMode for what shapes the way (lr, momentum, betas, schedules). null trains
            without tuning
        hyper_optimizer: of the hyperparameters: a class of torch.optim
        space: what the command search chooses, by keys of the configuration: a list of choices, or a range
            such as {type: float, low: 1e-4, high: 1, log: true}; types are float and int. What is under tune
            is tuned by hypergradients inside each trial
    """

    task: Named = field(default_factory=lambda: {"name": "ImageClassification", "data": "digits"})
    model: Named = field(default_factory=lambda: {"name": "MLP"})
    optimizer: Named = field(default_factory=lambda: {"name": "SGD", "lr": 0.1})
    scheduler: Named | None = None
    tune: dict[str, Tune] = field(default_factory=dict)
    method: Named | None = field(default_factory=lambda: {"name": "Implicit", "solver": {"name": "Neumann"}})
    hyper_optimizer: Named = field(default_factory=lambda: {"name": "Adam", "lr": 0.1, "betas": [0.5, 0.9]})
    space: dict[str, Any] = field(default_factory=dict)
    train: TrainConfig = field(default_factory=TrainConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)


NAMED = ("task", "model", "optimizer", "scheduler", "method", "hyper_optimizer")
"""The keys that name a class."""


def setting_of(name: str) -> str:
    """What a value belongs to in the section tune: weight_decay of weight_decay/layers.0.weight."""
    setting, slash, _ = name.partition("/")
    return setting if slash else name.partition(".")[0]
