"""Says in plain sentences whether the hypergradient of a run can be trusted."""

from __future__ import annotations

from collections import Counter

import numpy as np

from .read import Run, setting_of
from .style import finite, number, percent

MAX_RESIDUAL = 0.5  # median over the last half of the hyper steps
MAX_GROWTH = 1e3  # greatest norm over the median
MAX_ADJOINT_GROWTH = 1e3  # median over the last half of the hyper steps, as the next: see docs/results/precision.md
MAX_PRODUCT_ERROR = 0.5
MAX_SKIPPED = 0.1  # of all hyper steps
MAX_CLIPPED = 0.5  # of the values of a setting, at the last hyper step

_REMEDIES = {
    "neumann": "Raise method.num_terms, or take method.solver: cg.",
    "nystrom": "Raise method.max_steps, method.rank or method.damping.",
    "cg": "Raise method.max_steps, or method.damping.",
    "cholesky": "Raise method.damping.",
}
_CALMER = {
    "implicit": "Train longer before tuning (train.warmup), or raise method.damping.",
    "unrolled": "Lower the learning rate of training, or look back on fewer steps (method.truncation).",
}
_EXACTNESS = {
    "implicit": "No number here can tell how far training is from its optimum, where alone this hypergradient is exact.",
    "unrolled": "It is the exact derivative of the training steps that it looks back on.",
    "forward": "It is the exact derivative of the training steps so far.",
}


def doubts(run: Run) -> list[str]:
    """What speaks against the hypergradient, one sentence or two for each; empty where nothing does."""
    checks = (_large_residual, _growth, _chaotic, _poor_products, _many_skipped, _at_bounds)
    return [sentence for check in checks if (sentence := check(run))]


def trust_sentences(run: Run) -> list[str]:
    """The doubts, or that there are none, and what no number can tell."""
    method = run.config["method"]["name"]
    if method == "none":
        return ["Nothing was tuned in this run."]
    if not run.hyper and not run.skipped:
        return ["No hyper step has been taken, so there is nothing to judge."]
    found = doubts(run) or [f"Nothing in the numbers of this run speaks against the hypergradient{_solved(run)}."]
    return [*found, _EXACTNESS[method]]


def _method(run: Run) -> str:
    return run.config["method"]["solver"] or "neumann"


def late_residual(run: Run) -> float | None:
    """Median of the solver's relative residual over the last half of the hyper steps."""
    return _late(run, "residual")


def _late(run: Run, key: str) -> float | None:
    found = finite([line[key] for line in run.hyper if line.get(key) is not None])
    return float(np.median(found[len(found) // 2 :])) if len(found) else None


def _solved(run: Run) -> str:
    residual = late_residual(run)
    return "" if residual is None else f": the solver left {_share(residual)} of the linear system unsolved"


def _share(residual: float) -> str:
    return f"{number(100 * residual, 2)} %"


def _large_residual(run: Run) -> str | None:
    residual = late_residual(run)
    if residual is None or residual <= MAX_RESIDUAL:
        return None
    return (
        f"The solver left {_share(residual)} of the linear system unsolved (median over the last half of the hyper steps): "
        f"do not trust the hypergradient. {_REMEDIES.get(_method(run), 'Take method.solver: cg.')}"
    )


def _growth(run: Run) -> str | None:
    norms = {line["step"]: line["hypergradient_norm"] for line in run.hyper if len(finite(line.get("hypergradient_norm")))}
    if not norms:
        return None
    worst, median = max(norms, key=lambda step: norms[step]), float(np.median(list(norms.values())))
    if median == 0 and len(norms) > 1:
        return "More than half of the hypergradients are 0: the validation loss does not feel what is tuned."
    if norms[worst] <= MAX_GROWTH * median:
        return None
    return (
        f"The norm of the hypergradient rose to {number(norms[worst])} at training step {worst:,}, "
        f"{number(norms[worst] / median, 2)} times its median: a few hyper steps outweigh all others. "
        + _CALMER.get(run.config["method"]["name"], "Lower the learning rate of training.")
    )


def _chaotic(run: Run) -> str | None:
    growth = _late(run, "adjoint_growth")
    if growth is None or growth <= MAX_ADJOINT_GROWTH:
        return None
    return (
        f"Adjoints grew {number(growth, 2)} times over the sweep (median over the last half of the hyper steps): training is "
        f"so sensitive that the hypergradient holds for tiny changes alone. {_CALMER['unrolled']}"
    )


def _poor_products(run: Run) -> str | None:
    error = _late(run, "product_error")
    if error is None or error <= MAX_PRODUCT_ERROR:
        return None
    return (
        f"Products by finite differences are uncertain by {percent(error)} (median over the last half of the hyper steps). "
        "Take method.second_order: reverse."
    )


def _many_skipped(run: Run) -> str | None:
    skipped, tried = len(run.skipped), len(run.hyper) + len(run.skipped)
    if not skipped or skipped <= MAX_SKIPPED * tried:
        return None
    reason, count = Counter(str(line.get("reason", "no reason given")) for line in run.skipped).most_common(1)[0]
    often = "each time" if count == skipped else f"{count} times"
    return f"{skipped} of {tried} hyper steps were skipped ({percent(skipped / tried)}), {often} for this reason: {reason}"


def _at_bounds(run: Run) -> str | None:
    clipped: Counter[str] = Counter()
    for label, count in (run.hyper[-1].get("clipped") or {}).items() if run.hyper else ():
        clipped[setting_of(label)] += count
    found = []
    for setting, count in clipped.items():
        total = _num_values(run, setting)
        if total and count > MAX_CLIPPED * total:
            found.append(
                f"{count:,} of {total:,} values of {setting} ({percent(count / total)}) would have left their bounds at the "
                f"last hyper step: the bounds decide, not the hypergradient. Widen tune.{setting}.low or high."
            )
    return " ".join(found) or None


def _num_values(run: Run, setting: str) -> int | None:
    """How many values a setting has; None where that is not known yet."""
    ours = {name: value for name, value in run.hyper[-1].get("values", {}).items() if setting_of(name) == setting}
    tensors = run.tuned.get("values", {})
    if all(name in tensors for name in ours):
        return sum(tensors[name].numel() for name in ours)
    return len(ours) if all(isinstance(value, (int, float)) for value in ours.values()) else None
