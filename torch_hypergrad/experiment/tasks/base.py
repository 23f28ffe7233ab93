"""What a task is: data, losses, metrics and pictures of one problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..config import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Batch(NamedTuple):
    """Some examples."""

    inputs: Tensor
    """(n, ...), as they are stored: :meth:`Task.inputs` makes of them what a network sees."""
    targets: Tensor
    """(n, ...)."""


class Examples(ABC):
    """A set of examples that are taken by their row numbers, in any order, as often as is asked."""

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def take(self, rows: Tensor) -> Batch:
        """The examples of these rows, int64, on the device of the set."""

    @abstractmethod
    def to(self, device: torch.device) -> Examples:
        """The same set, whose examples come on ``device``."""

    def prepare(self, rows: Tensor) -> None:  # noqa: B027 - most sets have nothing to prepare
        """A hint that these rows will be taken next."""


@dataclass(frozen=True)
class InMemory(Examples):
    """Examples that lie in the memory of the device.

    Args:
        inputs: (n, ...).
        targets: (n, ...).
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(
                f"InMemory: {len(self.inputs)} inputs and {len(self.targets)} targets do not fit."
            )

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: Tensor) -> Batch:
        return Batch(self.inputs[rows], self.targets[rows])

    def to(self, device: torch.device) -> InMemory:
        return InMemory(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class Joined(Examples):
    """One set after the other."""

    first: Examples
    second: Examples

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def take(self, rows: Tensor) -> Batch:
        of_second = rows >= len(self.first)
        parts = (self.first.take(rows[~of_second]), self.second.take(rows[of_second] - len(self.first)))
        order = torch.cat([(~of_second).nonzero(), of_second.nonzero()]).flatten().argsort()
        return Batch(*(torch.cat(pair)[order] for pair in zip(*parts)))

    def prepare(self, rows: Tensor) -> None:
        of_second = rows >= len(self.first)
        self.first.prepare(rows[~of_second])
        self.second.prepare(rows[of_second] - len(self.first))

    def to(self, device: torch.device) -> Joined:
        return Joined(self.first.to(device), self.second.to(device))


@dataclass(frozen=True)
class Split:
    """Three sets that share no example.

    Args:
        train: to train on.
        val: to tune on.
        test: looked at once, at the end.
        wrong: (len(train),) bool, which training targets were replaced by wrong ones; None where none was.
    """

    train: Examples
    val: Examples
    test: Examples
    wrong: Tensor | None = None

    def to(self, device: torch.device) -> Split:
        """The same sets on a device."""
        wrong = None if self.wrong is None else self.wrong.to(device)
        return Split(self.train.to(device), self.val.to(device), self.test.to(device), wrong)

    def part(self, name: str) -> Split:
        """With another set to train on: ``"train"``, ``"val"`` or ``"train_and_val"``."""
        if name == "train":
            return self
        nothing = torch.zeros(len(self.val), dtype=torch.bool)
        if name == "val":
            return replace(self, train=self.val, wrong=None if self.wrong is None else nothing)
        wrong = None if self.wrong is None else torch.cat([self.wrong.cpu(), nothing])
        return replace(self, train=Joined(self.train, self.val), wrong=wrong)


@dataclass(frozen=True)
class Metric:
    """A number that tells how good a network is.

    Args:
        function: of all targets and all that was told, as arrays; those of ``sklearn.metrics`` are such.
        told: makes of a batch of outputs, and its targets, what ``function`` takes.
        higher_is_better: which way is up.
        percent: whether it is a fraction, shown in percent.
    """

    function: Callable[[np.ndarray, np.ndarray], float]
    told: Callable[[Tensor, Tensor], Tensor]
    higher_is_better: bool = True
    percent: bool = False


def most_likely(logits: Tensor, targets: Tensor) -> Tensor:
    """(n, classes) to (n,): the class of the highest logit."""
    return logits.argmax(1)


class Task(ABC):
    r"""A problem: which examples there are, and what a network loses on each.

    Training minimizes :math:`\frac1n \sum_i w_i\, \ell(f(x_i), y_i)` with :math:`w_i = 1`, or with tuned
    weights (``tune: {example_weights: {}}``); validation and test losses are plain means. A task of one's own
    is a subclass of this one, named in a configuration by its import path; its constructor's arguments are
    keys there.

    >>> class Line(Task):
    ...     examples, loss = "points", "squared error"
    ...     def __init__(self, num: int = 30) -> None:
    ...         self.num = num
    ...     def load(self, seed: int) -> Split:
    ...         x = torch.linspace(-1, 1, self.num)[torch.randperm(self.num)].unsqueeze(1)
    ...         self.input_shape, self.num_outputs = (1,), 1
    ...         return Split(*(InMemory(part, 2 * part) for part in x.chunk(3)))
    ...     def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
    ...         return (outputs - targets).square().flatten(1).mean(1)
    """

    data: str = "data"
    """What its data are called."""
    examples: ClassVar[str] = "examples"
    """What one calls them, in the plural."""
    loss: ClassVar[str] = "loss"
    """What the loss is called."""

    input_shape: tuple[int, ...]
    """Of one input as a network sees it; set by :meth:`load`."""
    num_outputs: int
    """Numbers that a network gives for one example; set by :meth:`load`."""
    input_dtype: torch.dtype = torch.float32
    classes: tuple[str, ...] = ()
    """Names of the outputs, where they are classes."""

    @abstractmethod
    def load(self, seed: int) -> Split:
        """Reads and splits the data; a seed always gives the same.

        Raises:
            ConfigError: data that are missing or damaged, or sizes that do not fit. One line.
        """

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(n,): the loss of each example."""

    def metrics(self) -> Mapping[str, Metric]:
        """By name; the first is what runs are compared by. None: the loss alone."""
        return {}

    def inputs(self, inputs: Tensor) -> Tensor:
        """What a network sees of stored inputs."""
        return inputs

    def train_inputs(self, inputs: Tensor) -> Tensor:
        """The same in training, with random changes where :attr:`random` says so."""
        return self.inputs(inputs)

    @property
    def random(self) -> bool:
        """Whether inputs are changed at random in training."""
        return False

    def loss_tensor(self, name: str) -> Tensor | nn.Module | None:
        """What ``tune`` may name beside settings of the optimizer: a tensor or network that the training loss
        reads from then on; None if there is none of that name."""
        return None

    def to(self, device: torch.device) -> None:  # noqa: B027 - most tasks have no tensors
        """Moves tensors of the task's own, such as means, to the device where its examples are."""

    # ---- what is kept of a run -----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs to use a trained network without the data; of JSON's types."""
        return {"input_shape": list(self.input_shape), "num_outputs": self.num_outputs}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up what :meth:`state` gave."""
        self.input_shape, self.num_outputs = tuple(state["input_shape"]), state["num_outputs"]

    def predict(self, network: nn.Module, files: Sequence[Path]) -> list[Sequence[str]]:
        """A line of cells for each thing in the files: what it is, and what the network says.

        Raises:
            ConfigError: for files that cannot be read, or where the task has no such thing.
        """
        raise ConfigError(
            f"{type(self).__name__} cannot predict from files. Give it a method predict(network, files), or "
            "use load_run(folder), which is a network on tensors."
        )

    def keepsakes(self, split: Split, weights: Tensor | None) -> dict[str, Any]:
        """Tensors, lists and numbers that a report draws; ``weights`` are the tuned ones of examples."""
        return {}

    def figures(self, network: nn.Module, split: Split, values: Mapping[str, Tensor]) -> Mapping[str, Figure]:
        """Pictures of a trained network, by their captions; ``values`` are the tuned ones, by name."""
        return {}
