"""Says in plain sentences whether the hypergradient of a run can be trusted."""

from __future__ import annotations

import pandas as pd

from .read import RecordedRun
from .style import count_of, number, percent

# For what no single hyper step can tell; what one can, it has warned of itself, and the run has logged.
MAX_OVER_MEDIAN = 1e3  # of the norm of a hypergradient
MAX_SKIPPED = 0.1  # of all hyper steps
ROUGH = 0.05  # of a linear system, unsolved
MAX_CLIPPED = 0.5  # of the values of a setting, at the last hyper step

_CALMER = {
    "Implicit": "Train longer before tuning (train.warmup), or raise method.solver.damping.",
    "Unrolled": "Lower the learning rate of training, or look back on fewer steps (method.truncation).",
}
_EXACTNESS = {
    "Implicit": "No number here can tell how far training is from its optimum, "
    "where alone this hypergradient is exact.",
    "Unrolled": "It is the exact derivative of the training steps that it looks back on.",
    "ForwardMode": "It is the exact derivative of the training steps so far.",
}


def doubts(run: RecordedRun) -> list[str]:
    """What speaks against the hypergradient, one sentence or two for each; empty where nothing does."""
    checks = (_outlier, _many_skipped, _at_bounds)
    return [*logged_warnings(run), *(sentence for check in checks if (sentence := check(run)))]


def trust_sentences(run: RecordedRun) -> list[str]:
    """The doubts, or that there are none, and what no number can tell."""
    if run.method is None:
        return ["Nothing was tuned in this run."]
    if run.hyper.empty and run.skipped.empty:
        return ["No hyper step has been taken, so there is nothing to judge."]
    found = [*doubts(run), *_not_logged(run)] or [
        f"No hyper step warned, and no number of this run is out of the ordinary.{_solved(run)}"
    ]
    return [*found, *filter(None, [_EXACTNESS.get(run.method)])]


def logged_warnings(run: RecordedRun) -> list[str]:
    """What hyper steps warned of, each kind once: how many of them did, and how the last one put it."""
    logged = run.hyper.dropna(subset="warnings")
    found = pd.DataFrame(
        [
            (kind, step, text)
            for step, warnings in zip(logged["step"], logged["warnings"])
            for kind, text in warnings.items()
        ],
        columns=["kind", "step", "text"],
    )
    return [
        f"{len(rows)} of {count_of(len(logged), 'hyper step')} gave a warning, the last at training step "
        f"{rows['step'].iloc[-1]:,}: {rows['text'].iloc[-1]}"
        for _, rows in found.groupby("kind", sort=False)
    ]


def _not_logged(run: RecordedRun) -> list[str]:
    """A word on runs of older versions, which logged no warnings."""
    count = int(run.hyper["warnings"].isna().sum())
    return [f"The warnings of {count_of(count, 'hyper step')} were not recorded."] if count else []


def late_residual(run: RecordedRun) -> float | None:
    """Median of the solver's relative residual over the last half of the hyper steps."""
    found = run.hyper["residual"].dropna()
    return float(found.iloc[len(found) // 2 :].median()) if len(found) else None


def _solved(run: RecordedRun) -> str:
    residual = late_residual(run)
    if residual is None:
        return ""
    rough = ", so that it is not the hypergradient of a full solve" if residual > ROUGH else ""
    return f" Solves left {number(100 * residual, 2)} % of the linear system unsolved (median){rough}."


def _outlier(run: RecordedRun) -> str | None:
    norms = run.hyper.set_index("step")["hypergradient_norm"].dropna()
    if norms.empty:
        return None
    worst, median = norms.idxmax(), norms.median()
    if median == 0 and len(norms) > 1:
        return "More than half of the hypergradients are 0: the validation loss does not feel what is tuned."
    if norms[worst] <= MAX_OVER_MEDIAN * median:
        return None
    return (
        f"The norm of the hypergradient rose to {number(norms[worst])} at training step {worst:,}, "
        f"{number(norms[worst] / median, 2)} times its median: a few hyper steps outweigh all others. "
        + _CALMER.get(run.method or "", "Lower the learning rate of training.")
    )


def _many_skipped(run: RecordedRun) -> str | None:
    skipped, tried = len(run.skipped), len(run.hyper) + len(run.skipped)
    if not skipped or skipped <= MAX_SKIPPED * tried:
        return None
    reasons = run.skipped["reason"].fillna("no reason given").value_counts()
    reason, count = reasons.index[0], reasons.iloc[0]
    often = "each time" if count == skipped else "once" if count == 1 else f"{count} times"
    return (
        f"{skipped} of {tried} hyper steps were skipped "
        f"({percent(skipped / tried)}), {often} for this reason: {reason}"
    )


def _at_bounds(run: RecordedRun) -> str | None:
    found = []
    for setting, count in run.clipped.items():
        total = _num_values(run, setting)
        if total and count > MAX_CLIPPED * total:
            found.append(
                f"{count:,} of {total:,} values of {setting} ({percent(count / total)}) "
                "would have left their bounds at the last hyper step: the bounds "
                f"decide, not the hypergradient. Widen tune.{setting}.low or high."
            )
    return " ".join(found) or None


def _num_values(run: RecordedRun, setting: str) -> int | None:
    """How many values a setting has; None where that is not known yet."""
    ours, tensors = run.latest[run.latest["setting"] == setting], run.tuned.get("values", {})
    if ours["name"].isin(tensors).all():
        return sum(tensors[name].numel() for name in ours["name"])
    return None if ours["many"].any() else len(ours)
