"""What the command can run, and what it must show."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from .cases import Case
from .contestants import MAX_GRAPHS
from .models import WIDTHS

QUICK = [
    Case("unrolled", "mlp", 20),
    Case("unrolled", "mlp", 20, per="element"),
    Case("implicit", "mlp", 10),
    Case("steps", "mlp", 50),
]

MLP, CNN = Case("unrolled", "mlp", MAX_GRAPHS), Case("unrolled", "cnn", MAX_GRAPHS)
MLP_PER_ELEMENT = replace(MLP, per="element")
LONG = replace(MLP, size=1000, only=("plain", "few snapshots", "higher", "TorchOpt, penalty"))
LONGEST = replace(MLP, size=10_000, only=("plain", "few snapshots"))
IMPLICIT = [Case("implicit", model, num_terms) for model in ("mlp", "cnn") for num_terms in (10, 50)]
STEPS = [Case("steps", "mlp", 300), Case("steps", "cnn", 50)]

TARGETS_SUITE = [MLP, MLP_PER_ELEMENT, CNN, *STEPS, *IMPLICIT, LONG, LONGEST]

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

# All are exact.
SCALING_ROWS = ("plain", "unrolled", "few snapshots", "graphs", "higher", "TorchOpt, penalty")
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
        against: the best of the peers, the same contestant with one decay for all weights,
            or a yardstick by name. None bounds the megabytes or the error itself.
    """

    case: Case
    contestant: str
    quantity: Literal["time", "memory", "error"]
    limit: float
    against: str | None = "best peer"


TARGETS = [
    Target(MLP, "graphs", "time", 0.6),
    Target(CNN, "graphs", "time", 1.0),
    Target(MLP, "graphs", "memory", 1.0),
    Target(CNN, "graphs", "memory", 1.0),
    Target(MLP, "unrolled", "time", 0.85),
    Target(CNN, "unrolled", "time", 1.1),
    Target(MLP, "unrolled", "memory", 0.35),
    Target(CNN, "unrolled", "memory", 0.15),
    Target(MLP, "few snapshots", "time", 1.2),
    Target(CNN, "few snapshots", "time", 1.2),
    Target(MLP, "few snapshots", "memory", 0.15),
    Target(CNN, "few snapshots", "memory", 0.15),
    Target(LONG, "few snapshots", "memory", 0.05),
    Target(LONGEST, "few snapshots", "memory", 1000, None),
    Target(MLP, "finite difference", "time", 0.6),
    Target(CNN, "finite difference", "time", 0.85),
    Target(MLP, "finite difference", "error", 0.01, None),
    Target(CNN, "finite difference", "error", 0.01, None),
    *(Target(case, "implicit", "time", 1.15, "double backwards") for case in IMPLICIT),
    *(Target(case, "implicit", "time", 1.10, "plain") for case in STEPS),
    *(Target(case, "unrolled", "time", 1.35, "plain") for case in STEPS),
    Target(MLP_PER_ELEMENT, "unrolled", "time", 1.15, "per group"),
]
