"""The tables and the plot of precision.py, from its measurements."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate

Row = dict[str, Any]
ROUNDING = 2.0**-23
"""Machine epsilon of float32."""
WRONG = 0.1
"""From this relative error on a hypergradient should not have been trusted."""
THRESHOLD = 1e-3
"""Warn from this value of growth * epsilon on, the rule that was chosen."""
SIZES = ("params", "params and state", "params, relative", "params and state, relative")


def off(value: float, expected: float) -> float:
    """Relative error; infinite where there is no finite answer."""
    if not math.isfinite(value) or not math.isfinite(expected):
        return math.inf
    return abs(value - expected) / abs(expected) if expected else math.inf


def total(row: Row) -> float:
    return off(row["ours"], row["exact"])


def of_sweep(row: Row) -> float:
    return off(row["ours"], row["same"])


def of_trajectory(row: Row) -> float:
    return off(row["same"], row["exact"])


def growth(row: Row, size: str = "params") -> float:
    value: float = row["growth"][size]
    return value if not math.isnan(value) else math.inf


def cancellation(row: Row) -> float:
    return row["terms"] / abs(row["ours"]) if row["ours"] and math.isfinite(row["terms"]) else math.inf


def setup(row: Row) -> str:
    if "eps" not in row:
        return row["optimizer"]
    root = f", eps_root {row['eps_root']:.0e}" if "eps_root" in row else ""
    return f"{row['optimizer'].split()[0]}, eps {row['eps']:.0e}{root}".replace("eps 0e+00, ", "")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    texts = [[f"{x:.1e}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    align = ["left" if not _numeric([t[i] for t in texts]) else "right" for i in range(len(head))]
    return str(tabulate(texts, head, tablefmt="github", disable_numparse=True, colalign=align))


def _numeric(texts: Sequence[str]) -> bool:
    return all(text[-1:].isdigit() or text in ("-", "inf") for text in texts)


def errors_table(rows: Sequence[Row]) -> str:
    """One line for each run of the first seed: the worse of the two hyperparameters."""
    lines, rows = [], [row for row in rows if row["seed"] == rows[0]["seed"] and row["T"] in (100, 1000)]
    for problem, name in dict.fromkeys((row["problem"], setup(row)) for row in rows):
        chosen = [row for row in rows if (row["problem"], setup(row)) == (problem, name)]
        for lr, t in dict.fromkeys((row["lr"], row["T"]) for row in chosen):
            both = [row for row in chosen if (row["lr"], row["T"]) == (lr, t)]
            worst = [max(map(error, both)) for error in (total, of_trajectory, of_sweep)]
            slope = next(row["slope"] / row["exact"] for row in both if row["tuned"] == "lr")
            lines.append(
                [
                    problem,
                    name,
                    f"{lr:g}",
                    t,
                    f"{both[0]['loss']:.2f}",
                    *worst,
                    growth(both[0]),
                    f"{slope:.1e}",
                ]
            )
    head = [
        "",
        "optimizer",
        "lr",
        "T",
        "val. loss",
        "error",
        "of trajectory",
        "of sweep",
        "growth",
        "slope / derivative",
    ]
    return table(head, lines)


Predictor = Callable[[Row], float]


def predictors() -> dict[str, Predictor]:
    """Numbers that a sweep could report."""
    found: dict[str, Predictor] = {f"growth of {size}": partial(growth, size=size) for size in SIZES}
    found["growth of params x sqrt(T)"] = lambda row: growth(row) * math.sqrt(row["T"])
    found["growth of params x cancellation"] = lambda row: growth(row) * cancellation(row)
    found["cancellation"] = cancellation
    return {name: (lambda row, p=p: p(row) * ROUNDING) for name, p in found.items()}


def verdicts(rows: Sequence[Row], predict: Predictor, threshold: float, wrong: Predictor) -> tuple[int, int]:
    """Misses and false alarms."""
    missed = sum(wrong(row) > WRONG and not predict(row) > threshold for row in rows)
    false = sum(predict(row) > threshold and not wrong(row) > WRONG for row in rows)
    return missed, false


def ranked(values: Sequence[float]) -> list[int]:
    """The place of each value in their order."""
    order = sorted(range(len(values)), key=values.__getitem__)
    return [place for _, place in sorted(zip(order, range(len(values))))]


def rules_table(rows: Sequence[Row]) -> str:
    """Each predictor with the threshold, among half powers of ten, that gives the fewest wrong verdicts."""
    lines: list[list[object]] = []
    for name, predict in predictors().items():
        best = min(
            (10 ** (k / 2) for k in range(-12, 3)), key=lambda x: (sum(verdicts(rows, predict, x, total)), -x)
        )
        finite = [(predict(row), total(row)) for row in rows if max(predict(row), total(row)) < math.inf]
        ranks = statistics.correlation(*(ranked(values) for values in zip(*finite)))
        lines.append([name, best, *verdicts(rows, predict, best, total), f"{ranks:.2f}"])
    return table(["rule: warn if epsilon x", "exceeds", "misses", "false alarms", "rank correlation"], lines)


def thresholds_table(rows: Sequence[Row]) -> str:
    """Misses and false alarms of the rule that was chosen, by threshold,
    over all and without those at the edge."""
    predict = predictors()["growth of params"]
    usual = [row for row in rows if "edge" not in row["problem"]]
    lines = []
    for x in (1e3 * ROUNDING, 3e-4, 5e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0):
        judged = [verdicts(some, predict, x, total) for some in (rows, usual)]
        lines.append([x, f"{x / ROUNDING:,.0f}", *judged[0], *judged[1]])
    numbers = [f"of {len(some)}, {sum(total(row) > WRONG for row in some)} wrong" for some in (rows, usual)]
    head = ["growth x epsilon exceeds", "growth exceeds", f"misses {numbers[0]}", "false alarms"]
    return table([*head, f"without the edge: misses {numbers[1]}", "false alarms"], lines)


def usefulness_table(rows: Sequence[Row]) -> str:
    """By growth, how many hypergradients with respect to lr say what happens
    when lr changes by one per cent."""
    lines: list[list[object]] = []
    for low, high in ((1.0, 10.0), (10.0, 100.0), (100.0, 1e3), (1e3, 1e4), (1e4, math.inf)):
        chosen = [
            row
            for row in rows
            if row["tuned"] == "lr" and low <= growth(row) and (growth(row) < high or high == math.inf)
        ]
        slopes = [row["slope"] / row["exact"] for row in chosen]
        sign, within = sum(s > 0 for s in slopes), sum(0.5 <= s <= 2 for s in slopes)
        right = sum(total(row) <= WRONG for row in chosen)
        lines.append([f"{low:g} to {high:g}", len(chosen), right, sign, within])
    return table(
        ["growth", "hypergradients", "float32 within 10 %", "sign of the slope", "half to twice the slope"],
        lines,
    )


def remedies_table(rows: Sequence[Row]) -> str:
    """Error of the sweep with products in float32 and all else in float64;
    truncation's error and its bias."""
    lines = []
    for row in rows:
        if row["optimizer"] == "Adam" and row["T"] == 1000 and row["seed"] == rows[0]["seed"]:
            short = [row["truncated"].get(k) or row["truncated"].get(str(k)) for k in (10, 100)]
            cut = [
                x
                for pair in short
                for x in ((off(*pair), off(pair[1], row["exact"])) if pair else ("-", "-"))
            ]
            mixed = off(row["mixed"], row["same"])
            lines.append(
                [
                    row["problem"],
                    setup(row),
                    f"{row['lr']:g}",
                    row["tuned"],
                    total(row),
                    of_sweep(row),
                    mixed,
                    *cut,
                ]
            )
    head = ["", "optimizer", "lr", "by", "error", "of sweep", "of mixed sweep"]
    return table([*head, "error, last 10", "bias, last 10", "error, last 100", "bias, last 100"], lines)


def flat_table(rows: Sequence[Row]) -> str:
    """The derivative at weight decay 0 and the slopes beside it."""
    slopes = [key for key in rows[0] if key.startswith("slope")]
    lines = []
    for row in rows:
        name = f"eps {row['eps']:.0e}" if row["eps"] else f"eps_root {row['eps_root']:.0e}"
        lines.append([name, row["exact"], row["ours"], row["growth"], *(row[key] for key in slopes)])
    return table(["Adam with", "derivative", "in float32", "growth", *slopes], lines)


def counts_table(rows: Sequence[Row]) -> str:
    """How often hypergradients were wrong, by optimizer and length."""
    lines = []
    for name, t in product(dict.fromkeys(map(setup, rows)), sorted({row["T"] for row in rows})):
        chosen = [row for row in rows if setup(row) == name and row["T"] == t]
        if chosen:
            errors = sorted(map(total, chosen))
            wrong = [sum(error(row) > WRONG for row in chosen) for error in (total, of_trajectory, of_sweep)]
            judged = verdicts(chosen, predictors()["growth of params"], THRESHOLD, total)
            lines.append([name, t, len(chosen), statistics.median(errors), errors[-1], *wrong, *judged])
    head = ["optimizer", "T", "number", "median error", "largest error", "wrong", "by trajectory", "by sweep"]
    return table([*head, "misses", "false alarms"], lines)


def coordinate_table(rows: Sequence[Row]) -> str:
    """The derivative for one coordinate, beside the formula."""
    return table(list(rows[0]), [[f"{row['c']:g}", *list(row.values())[1:]] for row in rows])


def report(found: dict[str, list[Row]]) -> str:
    """All tables, in Markdown."""
    runs = found["runs"]
    parts = {
        "How often a float32 hypergradient is off by more than 10 %": counts_table(runs),
        "What foretells it": rules_table(runs),
        "The threshold": thresholds_table(runs),
        "What a hypergradient is good for": usefulness_table(runs),
        "What helps": remedies_table(runs),
        "Adam at weight decay 0": flat_table(found["flat spot"]),
        "Adam with one weight": coordinate_table(found["one coordinate"]),
        "Every run": errors_table(runs),
    }
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items()) + "\n"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Error against growth, and rounding in the sweep against rounding in training."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(dict.fromkeys(map(setup, rows))):
        for first, marker in ((10, "."), (100, "^"), (1000, "s")):
            chosen = [row for row in rows if setup(row) == name and first <= row["T"] < 10 * first]
            style = {"color": f"C{number}", "marker": marker, "linestyle": "", "markersize": 5, "alpha": 0.7}
            label = name if marker == "s" else None
            left.plot(
                [growth(r) * ROUNDING for r in chosen], [total(r) for r in chosen], label=label, **style
            )
            right.plot([of_sweep(r) for r in chosen], [of_trajectory(r) for r in chosen], **style)
    left.axhline(WRONG, color="black", linewidth=0.8)
    left.axvline(THRESHOLD, color="black", linewidth=0.8, linestyle="--")
    left.set(
        xlabel="adjoint growth x epsilon of float32",
        ylabel="relative error",
        title="Growth foretells the error",
    )
    right.set(
        xlabel="error of the sweep alone",
        ylabel="error through the trajectory alone",
        title="Where it comes from",
    )
    right.axline((1e-6, 1e-6), (1e-2, 1e-2), color="black", linewidth=0.8)
    for axes in (left, right):
        axes.set(xscale="log", yscale="log")
    left.legend(fontsize=7, title="dot: T < 100, triangle: T < 1,000, square: T = 1,000", title_fontsize=7)
    figure.savefig(path, dpi=130)
