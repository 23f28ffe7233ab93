"""Describes a run in words: what was tuned and how, on what data, for how long."""

from __future__ import annotations

import shlex
from typing import Any

import pandas as pd

from .read import RecordedRun
from .style import DASH, count_of, listing, number, percent

_PER = {
    "group": "one for each group of parameters",
    "tensor": "one for each tensor",
    "element": "one for every single weight",
    "step": "one for each training step",
}
_SOLVERS = {
    "Neumann": "a Neumann series",
    "CG": "conjugate gradients",
    "Nystrom": "conjugate gradients after a Nystrom approximation",
    "Cholesky": "a Cholesky factorization",
    "Identity": "the identity for the inverse Hessian",
}
_OF_THE_LOSS = {
    "example_weights": "a weight for each training example",
    "augmentation": "the augmentation of training images",
}


def in_one_sentence(run: RecordedRun) -> str:
    """What was tuned and how."""
    tune, fixed = run.config["tune"], run.config["train"]["fixed"]
    if not tune or run.method is None:
        return "Trained without tuning."
    if fixed is not None:
        where = "at their start" if fixed == "start" else f"at the values in {fixed}"
        return f"Trained with {listing(tune)} fixed {where}."
    things = [
        _OF_THE_LOSS.get(name) or f"{name} ({_PER.get(entry['per'], entry['per'])})"
        for name, entry in tune.items()
    ]
    count = num_values(run)
    many = f": {count:,} values" if count is not None and count > 1 else ""
    return f"Tuned {listing(things)}{many}, by {_how(run.config['method'])}."


def _how(method: dict[str, Any]) -> str:
    if method["name"] == "Implicit":
        arguments = method["solver"] if isinstance(method["solver"], dict) else {"name": method["solver"]}
        solver = arguments["name"]
        terms = f" of {arguments.get('num_terms', 20)} terms" if solver == "Neumann" else ""
        damping = f", damping {number(arguments['damping'])}" if arguments.get("damping") else ""
        curvature = ", on the Gauss-Newton curvature" if method.get("curvature") == "gauss_newton" else ""
        units = ", in the units of the optimizer's second moments" if method.get("preconditioner") else ""
        return (
            f"implicit differentiation with {_SOLVERS.get(solver, solver)}{terms}{damping}{curvature}{units}"
        )
    if method["name"] == "Unrolled":
        last = f" (the last {method['truncation']:,} steps)" if method.get("truncation") else ""
        return f"differentiation through the unrolled training steps{last}"
    known = {"ForwardMode": "forward-mode differentiation through training"}
    return known.get(method["name"], str(method["name"]))


def num_values(run: RecordedRun) -> int | None:
    """How many values were tuned, as far as it is known."""
    if run.summary and run.summary.get("num_values") is not None:
        return int(run.summary["num_values"])
    values = run.tuned.get("values", {})
    return sum(tensor.numel() for tensor in values.values()) if values else None


def duration(seconds: float | None) -> str:
    """Seconds in words: 12.5 s, 3 min 4 s; a dash for none."""
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def state(run: RecordedRun) -> str:
    """Whether the run is finished, and if not, how far it is."""
    if run.finished:
        return "finished"
    return f"not finished: {run.steps:,} training steps so far"


def headline_numbers(run: RecordedRun) -> list[tuple[str, str]]:
    """Metrics and loss of the test set; the last of the validation set while there are none."""
    part, name = ("test", "test") if run.finished else ("val", "validation")
    if f"{part}.loss" not in run.results:
        return []
    so_far = "" if run.finished else ", so far"
    return [
        (measure.shown(run.results.get(f"{part}.{measure.name}")), f"{name} {measure.name}{so_far}")
        for measure in run.words.measures
    ]


def training_sentences(run: RecordedRun) -> list[str]:
    """What was kept, when training ended, and whether tuning helped."""
    summary, found = run.summary or {}, []
    if summary.get("stopped_early"):
        patience = run.config["train"]["patience"]
        found.append(
            f"Training ended after {run.steps:,} steps, as {count_of(patience, 'evaluation')} in a row had "
            "not lowered the validation loss."
        )
    if summary.get("kept_best"):
        found.append(
            f"The results are those of step {summary['best_step']:,}, where the validation loss was least."
        )
    if run.method is not None and run.config["train"]["fixed"] is None and run.finished:
        found.append("Values were tuned on the validation set: only the test set tells how good they are.")
    if run.baseline:
        main = run.words.main
        before, after = (results.get(f"test.{main.name}") for results in (run.baseline, run.results))
        found.append(
            f"The same training with all values fixed at their start has a test {main.name} of "
            f"{main.shown(before)}; with tuning it is {main.shown(after)}."
        )
    return found


def facts(run: RecordedRun) -> list[tuple[str, str]]:
    """What stands under the headline."""
    summary = run.summary or {}
    every = [
        ("State", state(run)),
        ("Data", _data(run)),
        ("Loss", run.words.loss),
        ("Model", _model(run)),
        ("Optimizer", _with_options(run.config["optimizer"])),
        ("Hyper steps", _hyper_steps(run)),
        ("Training", f"{run.steps:,} steps; seed {run.seed}"),
        (
            "Cost",
            f"as much as {summary['cost']:,.0f} training steps" if summary.get("cost") is not None else "",
        ),
        ("Duration", duration(run.seconds)),
        (
            "Edited",
            "; ".join(
                f"after step {step:,}: {changes}"
                for step, changes in run.tables["edited"][["step", "changes"]].itertuples(index=False)
            ),
        ),
        (
            "Left out",
            f"{count_of(run.unreadable, 'line')} of metrics.jsonl could not be read"
            if run.unreadable
            else "",
        ),
    ]
    return [(name, text) for name, text in every if text]


def _data(run: RecordedRun) -> str:
    task, words = run.config["task"], run.words
    known = (run.summary or {}).get("sizes") or {part: task.get(f"{part}_size") for part in _PARTS}
    sizes = [f"{known[part]:,} {name}" for part, name in _PARTS.items() if known.get(part) is not None]
    text = f"{run.data}: {listing(sizes)} {words.examples}" if sizes else run.data
    if task.get("label_noise"):
        text += f"; {percent(task['label_noise'], 0)} of the training labels are wrong"
    part, augment = run.config["train"]["part"], task.get("augment", "none")
    text += f"; trained on {part.replace('_', ' ')}" if part != "train" else ""
    return text + (f"; random {augment.replace('_', ' and ')}" if augment != "none" else "")


_PARTS = {"train": "training", "val": "validation", "test": "test"}


def _model(run: RecordedRun) -> str:
    model, count = run.config["model"], (run.summary or {}).get("num_parameters")
    return _with_options(model) + (f"; {count:,} parameters" if count is not None else "")


def _with_options(entry: dict[str, Any]) -> str:
    options = ", ".join(f"{key} {value}" for key, value in entry.items() if key != "name")
    return f"{entry['name']} ({options})" if options else str(entry["name"])


def _hyper_steps(run: RecordedRun) -> str:
    if run.method is None:
        return "none"
    text = f"{len(run.hyper):,} taken, {len(run.skipped):,} skipped"
    products = run.hyper["num_matvecs"].dropna()
    return text + (f"; {products.sum():,.0f} products with the Hessian" if len(products) else "")


def commands(run: RecordedRun) -> list[tuple[str, str]]:
    """How the run was started, and how to go on with one that has not finished."""
    command = (run.summary or {}).get("command")
    found = [("The command of this run:", str(command))] if command else []
    if not run.finished:
        found.append(("Go on with this run:", f"torch-hypergrad resume {shlex.quote(str(run.folder))}"))
    return found


def surroundings(run: RecordedRun) -> list[tuple[str, str]]:
    """Versions, device, start."""
    summary = run.summary or {}
    versions = ", ".join(f"{name} {version}" for name, version in (summary.get("versions") or {}).items())
    every = {
        "Versions": versions,
        "Device": summary.get("device"),
        "Started": summary.get("started"),
        "Folder": run.folder,
    }
    return [(name, str(value)) for name, value in every.items() if value]


def values_table(run: RecordedRun) -> pd.DataFrame:
    """A row for each tuned name: number of values, start, and where they are now."""
    latest, values = run.latest, run.tuned.get("values", {})
    table = pd.DataFrame({"name": latest["name"]})
    table["values"] = [f"{values[name].numel():,}" if name in values else DASH for name in table["name"]]
    starts = [pd.Series(run.numbers([name], "start")) for name in table["name"]]
    table["start (mean)"] = [number(start.mean()) for start in starts]
    for header, quantile in _SHOWN.items():
        table[header] = latest[quantile].map(number).where(latest["many"] | (quantile == "median"), "")
    return table


_SHOWN = {"min": "min", "5 %": "q05", "median": "median", "95 %": "q95", "max": "max"}


def settings_at_bounds(run: RecordedRun) -> list[str]:
    """A sentence for each setting of which some values were held back by a bound at the last hyper step."""
    return [
        f"At the last hyper step, {count:,} values of {setting} were held back by a bound."
        for setting, count in run.clipped.items()
        if count
    ]
