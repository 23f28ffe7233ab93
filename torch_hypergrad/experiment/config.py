"""The schema of a configuration: every key with its type, default and meaning."""

from dataclasses import dataclass, field
from typing import Any, Literal


class ConfigError(ValueError):
    """A configuration that cannot be run. One line: the key, what came, what was expected, the remedy."""


@dataclass(frozen=True)
class DataConfig:
    """Images, and how they are split into training, validation and test sets that never overlap.

    Args:
        name: the dataset. digits come with scikit-learn and need no file; image_folder are pictures of one's
            own in one folder for each class: ROOT/train/CLASS/* and ROOT/test/CLASS/*, or ROOT/CLASS/*, of
            which a test set is split off.
        root: folder of the data; also where download puts it
        download: fetch a missing dataset of torchvision into root
        image_size: image_folder alone: pictures are resized to so many pixels a side. null takes the size of
            the first picture, which all must have
        train_size: number of training images. null takes what is left
        val_size: number of validation images, split off the training images
        test_size: number of test images. null takes the whole test set, or where the data has none of its
            own, what is left
        train_on: which images to train on. Others than train are for rivals of a tuned model
        label_noise: this fraction of the training labels is replaced by wrong ones
        augment: random changes to training images: horizontal flips, or shifts by up to 4 pixels and flips
    """

    name: Literal["digits", "mnist", "fashion_mnist", "cifar10", "image_folder"] = "digits"
    root: str = "data"
    download: bool = False
    image_size: int | None = None
    train_size: int | None = None
    val_size: int = 500
    test_size: int | None = None
    train_on: Literal["train", "val", "train_and_val"] = "train"
    label_noise: float = 0.0
    augment: Literal["none", "flip", "crop_flip"] = "none"


@dataclass(frozen=True)
class ModelConfig:
    """The network, which maps images to one logit for each class.

    Args:
        name: one of the networks that come with the package: linear; mlp (options hidden, dropout); cnn
            (options width, dropout); resnet18, with a stem for small pictures (option norm)
        module: instead of name, the import path of an nn.Module, such as my_package.MyNet; called with
            options alone
        options: keyword arguments of the network
    """

    name: Literal["linear", "mlp", "cnn", "resnet18"] = "mlp"
    module: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer of the weights.

    Args:
        name: a class of torch.optim
        options: its keyword arguments, such as lr, momentum, weight_decay
    """

    name: str = "SGD"
    options: dict[str, Any] = field(default_factory=lambda: {"lr": 0.1})


@dataclass(frozen=True)
class SchedulerConfig:
    """A learning-rate scheduler. Its factor multiplies a tuned learning rate.

    Args:
        name: a class of torch.optim.lr_scheduler. null takes none
        options: its keyword arguments
        every: when it steps
    """

    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    every: Literal["step", "epoch"] = "step"


@dataclass(frozen=True)
class Tune:
    """What is tuned under one name of the section tune, and how.

    Args:
        per: one value for each group of parameters, each tensor, each element (every single weight), or each
            training step (a schedule); of example_weights there is always one for each training image
        init: the start. null takes the optimizer's value; for example_weights a weight between 0 and 1, null
            takes 0.5
        low: lower bound. null takes the setting's legal range
        high: upper bound, likewise
        log: optimize the logarithm, which needs a positive start
    """

    per: Literal["group", "tensor", "element", "step"] = "group"
    init: float | None = None
    low: float | None = None
    high: float | None = None
    log: bool = False


@dataclass(frozen=True)
class MethodConfig:
    """How the hypergradient is computed.

    Args:
        name: implicit for what moves the training optimum (weight decay, example weights, augmentation);
            unrolled or forward for what shapes the way (lr, momentum, betas, schedules); none trains without
            tuning
        solver: of implicit: how its linear system is solved. null takes neumann
        num_terms: of neumann: terms of the series (null: 20)
        scale: of neumann: its step, null estimates it; of identity: its factor (null: 1)
        damping: of neumann, cg, nystrom and cholesky: added to the diagonal of the Hessian (null: 0)
        max_steps: of cg and nystrom (null: 50)
        rtol: of cg and nystrom: the relative residual at which they stop (null: 1e-6)
        rank: of nystrom: random directions (null: 20)
        curvature: of implicit: hessian is exact; gauss_newton leaves out what can make it negative (null:
            hessian)
        preconditioner: of implicit: second_moments solves in the units of Adam and its family. Take it with
            AdamW (null: none)
        num_batches: of implicit: the training loss is the mean over so many of the last batches (null: 1)
        truncation: of unrolled: only the last so many steps count. null takes train.hyper_every, or the whole
            episode
        max_snapshots: of unrolled: keep at most so many states and recompute the others. null keeps all
        offload: of unrolled: keep states in the memory of the CPU
        memory: of unrolled: how much memory graphs of steps may take, which saves the time of replaying them:
            bytes (an integer), or a part of all memory (a number up to 1); 0 replays all; not with offload.
            null keeps light ones, and others within a tenth of the memory, if max_snapshots is null
        max_graphs: of unrolled: in the place of memory, keep the graphs of the last so many steps
        second_order: of unrolled and implicit: how products with second derivatives are computed: reverse
            (double backward) or forward (dual numbers), both exact, or finite_difference (two gradients).
            null takes reverse
    """

    name: Literal["implicit", "unrolled", "forward", "none"] = "implicit"
    solver: Literal["neumann", "cg", "nystrom", "cholesky", "identity"] | None = None
    num_terms: int | None = None
    scale: float | None = None
    damping: float | None = None
    max_steps: int | None = None
    rtol: float | None = None
    rank: int | None = None
    curvature: Literal["hessian", "gauss_newton"] | None = None
    preconditioner: Literal["second_moments"] | None = None
    num_batches: int | None = None
    truncation: int | None = None
    max_snapshots: int | None = None
    offload: Literal["cpu"] | None = None
    memory: int | float | None = None
    max_graphs: int | None = None
    second_order: Literal["reverse", "forward", "finite_difference"] | None = None


@dataclass(frozen=True)
class HyperOptimizerConfig:
    """The optimizer of the hyperparameters.

    Args:
        name: a class of torch.optim
        options: its keyword arguments
    """

    name: str = "Adam"
    options: dict[str, Any] = field(default_factory=lambda: {"lr": 0.1, "betas": [0.5, 0.9]})


@dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Args:
        steps: training steps of an episode; give this or epochs
        epochs: passes over the training images
        episodes: trainings from the same initial weights, with a hyper step after each but the last
        batch_size: images of a training step. null takes all
        warmup: training steps before the first hyper step
        hyper_every: training steps from one hyper step to the next. null takes one after each episode
        val_batch_size: validation images of a hyper step, drawn anew for each. null takes all
        clip_norm: gradients are scaled down to this norm. null does not
        precision: bf16 runs the network under autocast
        device: auto takes a GPU where there is one; or cpu, cuda, cuda:1
        threads: threads of the CPU. null leaves them to torch. Bitwise the same results need the same number
        seed: of the split, the label noise, the initial weights, the order of the images and all noise
    """

    steps: int | None = None
    epochs: int | None = None
    episodes: int = 1
    batch_size: int | None = 128
    warmup: int = 0
    hyper_every: int | None = None
    val_batch_size: int | None = None
    clip_norm: float | None = None
    precision: Literal["float32", "bf16"] = "float32"
    device: str = "auto"
    threads: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class OutputConfig:
    """What a run writes, and where.

    Args:
        folder: the folder of the run. null takes a new one in runs/, with the configuration's
            name, the seed, date and time
        log_every: training steps between two lines of the training loss
        eval_every: training steps between two evaluations on the training and validation images. null takes a
            fiftieth of the run
        eval_size: images of each set in such an evaluation, always the same; the end of the run takes all.
            null takes all
        checkpoint_every: training steps between two checkpoints. null takes a tenth of the run
        keep_checkpoints: how many of the last checkpoints stay
        tensorboard: write event files for TensorBoard
    """

    folder: str | None = None
    log_every: int = 10
    eval_every: int | None = None
    eval_size: int | None = 2000
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    tensorboard: bool = True


@dataclass(frozen=True)
class CompareConfig:
    """The rivals of the command compare: a grid and a random search over one value for the whole model.

    Args:
        setting: the setting of the optimizer that they search
        low: the least value that is tried
        high: the greatest value that is tried
        log: space and draw values on a log scale
        grid_size: values of the grid
    """

    setting: str = "weight_decay"
    low: float = 1e-5
    high: float = 1e-1
    log: bool = True
    grid_size: int = 5


@dataclass(frozen=True)
class Config:
    """One run.

    Args:
        tune: what is tuned, by name: a setting of the optimizer (weight_decay, lr, momentum, betas.0, ...),
            example_weights or augmentation. Under each name, with their defaults: per (group, tensor, element
            or step; group), init (a number; null: the optimizer's value), low and high (bounds; null: the
            legal range), log (tune the logarithm; false), as in --tune.weight_decay.per element. More with
            --tune.help
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    tune: dict[str, Tune] = field(default_factory=dict)
    method: MethodConfig = field(default_factory=MethodConfig)
    hyper_optimizer: HyperOptimizerConfig = field(default_factory=HyperOptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
