"""What the task of a run calls its examples, its loss and its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .style import fixed, listing, percent


@dataclass(frozen=True)
class Measure:
    """A number by which networks are judged.

    Args:
        name: its key in metrics and summaries.
        percent: whether it is a fraction, shown in percent.
        higher_is_better: which way is up.
    """

    name: str
    percent: bool = False
    higher_is_better: bool = False

    @property
    def header(self) -> str:
        """With its unit."""
        return f"{self.name} (%)" if self.percent else self.name

    @property
    def factor(self) -> float:
        """From the recorded number to the shown one."""
        return 100.0 if self.percent else 1.0

    @property
    def digits(self) -> int:
        """After the point."""
        return 1 if self.percent else 3

    def shown(self, value: float | None) -> str:
        """With its unit; a dash for none."""
        return percent(value) if self.percent else fixed(value, self.digits)

    def in_table(self, value: float | None) -> str:
        """In the unit of the header; a dash for none."""
        return fixed(None if value is None else self.factor * value, self.digits)

    def best(self, values: Mapping[str, float]) -> str:
        """The name of the best value."""
        return (max if self.higher_is_better else min)(values, key=lambda name: values[name])


LOSS = Measure("loss")


@dataclass(frozen=True)
class Words:
    """Of one task.

    Args:
        data: what the data are called; None where that is not recorded.
        examples: what they are called, in the plural.
        loss: what the loss is.
        metrics: beside the loss; the first is what runs are compared by.
    """

    data: str | None
    examples: str
    loss: str
    metrics: tuple[Measure, ...]

    @property
    def main(self) -> Measure:
        """What runs are compared by."""
        return self.metrics[0] if self.metrics else LOSS

    @property
    def in_brief(self) -> str:
        """The loss and the metrics."""
        return listing([self.loss, *(measure.name for measure in self.metrics)])

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The metrics and the loss."""
        return (*self.metrics, LOSS)


def words_of(record: Mapping[str, Any] | None) -> Words:
    """Of a run's record of its task; runs of version 0.1 have none, and classified images."""
    if record is None or "metrics" not in record:
        return Words(
            None, "images", "cross-entropy", (Measure("accuracy", percent=True, higher_is_better=True),)
        )
    metrics = (
        Measure(name, **{key: bool(flag) for key, flag in of.items()})
        for name, of in record["metrics"].items()
    )
    return Words(str(record["data"]), str(record["examples"]), str(record["loss"]), tuple(metrics))
