"""What the command can run, and what it must show."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .cases import Case
from .contestants import MAX_GRAPHS
from .models import WIDTHS
from .results import Quantity

QUICK = [
    Case("unrolled", "mlp", 20),
    Case("unrolled", "mlp", 20, per="element"),
    Case("implicit", "mlp", 10),
    Case("steps", "mlp", 50),
]

MLP, CNN = Case("unrolled", "mlp", MAX_GRAPHS), Case("unrolled", "cnn_strided", 30)
MLP_PER_ELEMENT, MLP_ADAM = replace(MLP, per="element"), replace(MLP, optimizer="adam")
LONG_ROWS = ("plain", "unrolled", "graphs", "few snapshots", "higher", "TorchOpt, penalty")
LONG = replace(MLP, size=1000, only=LONG_ROWS)
LONGEST = replace(MLP, size=10_000, only=("plain", "few snapshots"))
IMPLICIT = [Case("implicit", model, num_terms) for model in ("mlp", "cnn_strided") for num_terms in (10, 50)]
STEPS = [Case("steps", "mlp", 300), Case("steps", "cnn_strided", 100)]

TARGETS_SUITE = [MLP, MLP_PER_ELEMENT, MLP_ADAM, CNN, *STEPS, *IMPLICIT, LONG, LONGEST]

GRID = [
    *(
        Case("unrolled", model, num_steps, optimizer, per)  # type: ignore[arg-type]
        for model, optimizer, per, num_steps in itertools.product(
            ("mlp", "cnn", "transformer", "resnet18"), ("sgd", "adam"), ("group", "element"), (10, 100, 1000)
        )
    ),
    *(
        Case("implicit", model, num_terms)
        for model, num_terms in itertools.product(("mlp", "cnn", "transformer", "resnet18"), (10, 50))
    ),
]

SMALL = [
    *(
        Case("unrolled", model, 10, optimizer)
        for model in ("mlp", "cnn", "transformer")
        for optimizer in ("sgd", "adam")
    ),
    Case("unrolled", "cnn", 10, per="element"),
    Case("unrolled", "transformer", 10, "adam", "element"),
    Case("implicit", "transformer", 10),
]

RESNET18 = [Case("implicit", "resnet18", 10), Case("unrolled", "resnet18", 10)]

SCALING_ROWS = (*LONG_ROWS, "replay")
SCALING = [
    *(Case("unrolled", "mlp", num_steps, only=SCALING_ROWS) for num_steps in (10, 30, 100, 300, 1000)),
    *(Case("unrolled", f"mlp{width}", 30, only=SCALING_ROWS) for width in WIDTHS),
    *(Case("implicit", "mlp", num_terms) for num_terms in (5, 10, 20, 50)),
]

SUITES = {
    "quick": QUICK,
    "targets": TARGETS_SUITE,
    "small": SMALL,
    "resnet18": RESNET18,
    "grid": GRID,
    "scaling": SCALING,
}


def blocks(cases: list[Case]) -> Iterator[list[Case]]:
    """Cases that are compared with each other, and so take turns."""
    for _, block in itertools.groupby(cases, key=lambda case: replace(case, per="group")):
        yield list(block)


@dataclass(frozen=True)
class Target:
    """A bound on what one contestant measures, as a part of something else in the same run.

    Args:
        against: the best of the peers by this quantity, the same contestant with one decay for all weights,
            or a yardstick by name. None bounds the megabytes or the error itself.
    """

    case: Case
    contestant: str
    quantity: Quantity
    limit: float
    against: str | None = "best peer"


TARGETS = [
    Target(MLP, "unrolled", "time", 1.0),
    Target(MLP, "unrolled", "memory", 0.45),
    Target(MLP_ADAM, "unrolled", "time", 0.85),
    Target(MLP_ADAM, "unrolled", "memory", 0.35),
    Target(CNN, "unrolled", "time", 1.0),
    Target(CNN, "unrolled", "memory", 0.5),
    Target(CNN, "budget", "time", 1.2),
    Target(CNN, "budget", "memory", 0.25),
    Target(LONG, "unrolled", "time", 0.75),
    Target(LONG, "few snapshots", "memory", 0.05),
    Target(LONGEST, "few snapshots", "memory", 1000, None),
    *(Target(case, "implicit", "time", 1.15, "double backwards") for case in IMPLICIT),
    *(Target(case, "implicit", "time", 1.10, "plain") for case in STEPS),
    *(Target(case, "unrolled", "time", 1.35, "plain") for case in STEPS),
    Target(MLP_PER_ELEMENT, "unrolled", "time", 1.15, "per group"),
]
