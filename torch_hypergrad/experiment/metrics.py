"""What a run tells while it trains: JSON lines, loggers, and the tuned values in brief."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..hyper_optimizer import HyperReport
from .loggers import LOGGERS
from .run_folder import RunFolder

QUANTILES = {"min": 0.0, "q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "max": 1.0}
MOST_SORTED = 1_000_000  # torch.quantile takes 16 million numbers at most; of more, every k-th stands for all
MOST_SHOWN = 3  # settings in a progress bar
NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]\d+)?|\b(nan|inf)\b")


class MetricsLog:
    """Writes rows to ``metrics.jsonl``, and tells loggers their numbers.

    Args:
        folder: the run folder.
        step: of the checkpoint that the run goes on from; 0 of a new one.
        names: of :data:`.loggers.LOGGERS`.
        config: the configuration of the run.
    """

    def __init__(self, folder: RunFolder, step: int, names: Sequence[str], config: Mapping[str, Any]) -> None:
        self._folder = folder
        self._loggers = [LOGGERS[name][0](folder.path, step, config) for name in names]

    def log(self, row: dict[str, Any]) -> None:
        """One row, with its ``"kind"`` and ``"step"``."""
        self._folder.log(row)
        numbers = {f"{row['kind']}/{name}": number for name, number in _numbers(row)}
        for logger in self._loggers:
            logger.log(row["step"], numbers)

    def hyper_step(self, step: int, report: HyperReport, values: dict[str, Tensor]) -> None:
        """One row for a hyper step, with the values after it."""
        self.log(
            {
                "kind": "hyper",
                "step": step,
                "val_loss": report.val_loss,
                "hypergradient_norm": report.hypergradient_norm,
                "num_matvecs": report.num_matvecs,
                "residual": report.residual,
                "adjoint_growth": report.adjoint_growth,
                "product_error": report.product_error,
                "clipped": report.clipped,
                "warnings": by_kind(report.warnings),
                "values": {name: spread_of(value) for name, value in values.items()},
            }
        )

    def flush(self) -> None:
        """Hands everything to the operating system."""
        for logger in self._loggers:
            logger.flush()

    def close(self) -> None:
        """Ends what the loggers write."""
        for logger in self._loggers:
            logger.close()


def by_kind(warnings: Sequence[str]) -> dict[str, str]:
    """Sentences by what is left of them without their numbers, in which alone those of one kind differ.

    >>> by_kind(["Adjoints grew 1.2e+03 times.", "Solve: nan% left."])
    {'Adjoints grew # times.': 'Adjoints grew 1.2e+03 times.', 'Solve: #% left.': 'Solve: nan% left.'}
    """
    return {NUMBER.sub("#", warning): warning for warning in warnings}


def spread_of(values: Tensor) -> float | dict[str, float]:
    """A number as it is; of many their quantiles and mean."""
    flat = values.detach().flatten().float()
    if flat.numel() == 1:
        return flat.item()
    some = flat[:: -(-flat.numel() // MOST_SORTED)]
    found = torch.quantile(some, torch.tensor(list(QUANTILES.values()), device=flat.device)).tolist()
    return dict(zip(QUANTILES, found)) | {
        "min": flat.min().item(),
        "max": flat.max().item(),
        "mean": flat.mean().item(),
    }


def in_brief(values: dict[str, Tensor]) -> dict[str, str]:
    """The tuned values for a progress bar: by setting, a number or the range of many."""
    by_setting: dict[str, list[Tensor]] = {}
    for name, value in values.items():
        by_setting.setdefault(name.split("/")[0], []).append(value.detach().flatten())
    ranges = {
        name: torch.stack([torch.cat(v).min(), torch.cat(v).max()]).tolist() for name, v in by_setting.items()
    }
    shown = {
        name: f"{low:.3g}" if low == high else f"{low:.1e}..{high:.1e}"
        for name, (low, high) in list(ranges.items())[:MOST_SHOWN]
    }
    return shown | ({"and": f"{len(ranges) - MOST_SHOWN} more"} if len(ranges) > MOST_SHOWN else {})


def _numbers(row: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """The numbers in a row, by path, without its step."""
    found = []
    for name, value in row.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and (prefix or name not in ("step", "seconds")):
            found.append((prefix + name, float(value)))
    return found
