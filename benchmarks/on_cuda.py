"""What torch_hypergrad costs on a CUDA device, as one table in less than 8 minutes.

    python -m benchmarks.on_cuda [--out docs/results/cuda.md]
    python -m benchmarks.on_cuda --device cpu --tiny
        # the same code on small problems: no figures, only that it runs

Models, data, references and peers are those of ``benchmarks.bench``. Times are medians of ``--repeats`` runs
between two synchronizations, after one to warm up; contestants take turns. Memory is the peak that torch had
allocated, model and batches included, which lie on the device.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import math
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from torch_hypergrad import HyperOptimizer, Implicit, Neumann, Unrolled
from torch_hypergrad.device.capture import NUM_WARM_UPS
from torch_hypergrad.methods import Method

from . import peers
from .cases import Case, Problem, joined, make_problem
from .contestants import REFERENCES, hyper_optimizer
from .models import Batch
from .results import DisagreementError, Judge
from .yardsticks import plain_step, train_plainly


@dataclass(frozen=True)
class Row:
    """One line of the table; ``reached`` is None where there is no target."""

    what: str
    value: float
    unit: str
    target: str = ""
    reached: bool | None = None

    def cells(self) -> list[str]:
        verdict = {True: "yes", False: "no", None: ""}[None if math.isnan(self.value) else self.reached]
        return [
            self.what,
            "-" if math.isnan(self.value) else f"{self.value:.3g} {self.unit}".rstrip(),
            self.target,
            verdict,
        ]


def at_most(what: str, value: float, limit: float, unit: str = "") -> Row:
    return Row(what, value, unit, f"at most {limit:g}", value <= limit)


def at_least(what: str, value: float, limit: float, unit: str = "") -> Row:
    return Row(what, value, unit, f"at least {limit:g}", value >= limit)


# ---- measuring ---------------------------------------------------------------------------------------------

Make = Callable[[], Callable[[], Any]]


@dataclass(frozen=True)
class Bench:
    """Where and how often is measured."""

    device: torch.device
    tiny: bool
    repeats: int

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def choose(self, full: Any, tiny: Any) -> Any:
        return tiny if self.tiny else full

    def problem(
        self, case: Case, batch_size: int | None = None, dtype: torch.dtype = torch.float32
    ) -> Problem:
        return make_problem(case, dtype, self.device, 4 if self.tiny else batch_size)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], Any]) -> float:
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - start

    def medians(self, contestants: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Median seconds of each; they take turns, so that drifts hit all."""
        for run in contestants.values():
            run()
        found: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(self.repeats):
            for name, run in contestants.items():
                found[name].append(self.seconds(run))
        return {name: statistics.median(times) for name, times in found.items()}

    def megabytes(self, make: Make) -> float:
        """The peak that was allocated while what ``make`` makes ran, alone on the device."""
        if not self.cuda:
            make()()
            return math.nan
        gc.collect()
        run = make()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) / 1e6

    def waits(self, run: Callable[[], Any]) -> float:
        """How often ``run`` waited for the device."""
        if not self.cuda:
            run()
            return math.nan
        torch.cuda.synchronize(self.device)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return float(sum("synchronizing CUDA" in str(warning.message) for warning in caught))

    def kernels(self, run: Callable[[], Any]) -> float:
        """How many kernels and copies ``run`` launched."""
        if not self.cuda:
            run()
            return math.nan
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize(self.device)
        on_device = torch.autograd.DeviceType.CUDA
        return float(sum(event.device_type == on_device for event in profile.events()))


# ---- the figures -------------------------------------------------------------------------------------------

NEUMANN = partial(Neumann, scale=1e-3, damping=100.0)  # converges; the time does not depend on it


def hypergradient(hyper: HyperOptimizer, val: Batch) -> Tensor:
    return joined(hyper.hypergradient(val).values())


def windows(bench: Bench, case: Case, method: Method, batch_size: int | None = None, **options: bool) -> Make:
    """Makes training from the start with the hypergradient, which can be run again and again."""

    def run(hyper: HyperOptimizer, problem: Problem) -> Tensor:
        hyper.restart()
        each(hyper.step, problem.batches)
        return hypergradient(hyper, problem.val)

    def make() -> Callable[[], Tensor]:
        problem = bench.problem(case, batch_size)
        return partial(run, hyper_optimizer(problem, method, **options), problem)

    return make


def each(step: Callable[[Batch], Any], batches: Sequence[Batch]) -> None:
    for batch in batches:
        step(batch)


def check(judge: Judge, contestants: dict[str, Callable[[], Tensor]]) -> None:
    """Ends the figure if an answer is wrong."""
    for name, run in contestants.items():
        judge.error(name, run().double().cpu().numpy())


def unrolled(bench: Bench, model: str) -> Iterator[Row]:
    case = Case("unrolled", model, bench.choose(100, 3))
    methods = {
        "as it chooses": Unrolled(),
        "replayed": Unrolled(memory=0),
        "graphs kept": Unrolled(max_graphs=case.size),
    }
    makes: dict[str, Make] = {name: windows(bench, case, method) for name, method in methods.items()}
    makes["captured"] = windows(bench, case, methods["replayed"], capture=bench.cuda)
    if find_spec("higher") is None:
        print("higher cannot be imported: its rows are left out.", file=sys.stderr)
    else:
        makes["higher"] = lambda: partial(peers.higher_setting, bench.problem(case), nullcontext())
    runs = {name: make() for name, make in makes.items()}
    check(Judge(case, REFERENCES["unrolled"](bench.problem(case, dtype=torch.float64))), runs)
    seconds = bench.medians(runs)
    runs.clear()
    for name, make in makes.items():
        yield Row(f"{model}, unrolled T = {case.size}, {name}", seconds[name], "s")
        yield Row(f"the same, peak memory, {name}", bench.megabytes(make), "MB")
    if higher := seconds.pop("higher", None):
        what, ratio = f"{model}, higher's time over ours", higher / min(seconds.values())
        yield at_least(what, ratio, 10) if model == "cnn" else Row(what, ratio, "")


def implicit_resnet(bench: Bench) -> Iterator[Row]:
    case = Case("unrolled", bench.choose("resnet18", "cnn"), bench.choose(100, 3), per="element")
    solver = NEUMANN(bench.choose(20, 2))

    def plain_window() -> Callable[[], Any]:
        return partial(train_plainly, bench.problem(case, 128))

    def our_window() -> Callable[[], Any]:
        problem = bench.problem(case, 128)
        hyper = hyper_optimizer(problem, Implicit(solver))
        return lambda: (each(hyper.step, problem.batches), hyper.hyper_step(problem.val))

    sizes = [bench.megabytes(plain_window), bench.megabytes(our_window)]
    seconds = bench.medians({"plain": plain_window(), "ours": our_window()})
    yield Row(f"ResNet-18, {case.size} plain steps", seconds["plain"], "s")
    yield Row(f"the same and one implicit hyper step, K = {solver.num_terms}", seconds["ours"], "s")
    yield at_most("time over the plain loop's", seconds["ours"] / seconds["plain"], 1.5)
    yield Row("peak memory of the plain loop", sizes[0], "MB")
    yield at_most("peak memory over the plain loop's", sizes[1] / sizes[0], 3)


def transformer_memory(bench: Bench) -> Iterator[Row]:
    case = Case("unrolled", bench.choose("transformer256", "transformer"), 3)
    peaks = {}
    for way in ("reverse", "forward", "finite_difference"):
        method = Unrolled(second_order=way) if way != "reverse" else Unrolled(memory=0)
        peaks[way] = bench.megabytes(windows(bench, case, method))
        yield Row(f"2-layer transformer, unrolled T = 3, {way}, peak memory", peaks[way], "MB")
    what = "forward over reverse, memory over reverse over reverse"
    yield at_most(what, peaks["forward"] / peaks["reverse"], 1)


def one_step(bench: Bench) -> Iterator[Row]:
    case, method = Case("unrolled", "cnn", bench.choose(50, 2)), Unrolled(truncation=1)
    plain, group, captured = (bench.problem(case) for _ in range(3))
    element = bench.problem(replace(case, per="element"))
    steps = {
        "plain": plain_step(plain),
        "per group": hyper_optimizer(group, method).step,
        "per element": hyper_optimizer(element, method).step,
        "per group, captured": hyper_optimizer(captured, method, capture=bench.cuda).step,
    }
    seconds = bench.medians({name: partial(each, step, plain.batches) for name, step in steps.items()})
    for name, step in steps.items():
        yield Row(f"cnn, one step, {name}", 1e3 * seconds[name] / case.size, "ms")
        yield Row(f"kernels and copies in it, {name}", bench.kernels(partial(step, plain.batches[0])), "")
    yield Row("step per group over plain", seconds["per group"] / seconds["plain"], "")
    yield Row("step per element over per group", seconds["per element"] / seconds["per group"], "")
    yield Row("step captured over eager", seconds["per group, captured"] / seconds["per group"], "")


def implicit_cnn(bench: Bench) -> Iterator[Row]:
    """Of a network so small that launches take longer than kernels."""
    case, runs = Case("implicit", "cnn", bench.choose(20, 2), per="element"), {}
    for name, capture in {"eager": False, "captured": bench.cuda}.items():
        problem = bench.problem(case)
        hyper = hyper_optimizer(problem, Implicit(NEUMANN(case.size)), capture=capture)
        hyper.step(problem.batches[0])
        each(hyper.hypergradient, [problem.val] * (NUM_WARM_UPS + 1))  # until all is recorded
        runs[name] = partial(hypergradient, hyper, problem.val)
    check(Judge(case, None), runs)
    seconds = bench.medians(runs)
    for name, found in seconds.items():
        yield Row(f"cnn, one implicit hypergradient, K = {case.size}, {name}", 1e3 * found, "ms")
    yield Row("implicit hypergradient captured over eager", seconds["captured"] / seconds["eager"], "")


def synchronizations(bench: Bench) -> Iterator[Row]:
    for name, method in {"unrolled": Unrolled(), "implicit": Implicit(NEUMANN(5))}.items():
        problem = bench.problem(Case("unrolled", "cnn", 4, per="element"))
        hyper = hyper_optimizer(problem, method)
        each(hyper.step, problem.batches)
        hyper.hyper_step(problem.val)
        in_step = bench.waits(partial(hyper.step, problem.batches[0]))
        yield at_most(f"waits for the device in a step, {name}", in_step, 0)
        in_hyper_step = bench.waits(partial(hyper.hyper_step, problem.val))
        yield at_most(f"waits for the device in a hyper step, {name}", in_hyper_step, 1)


def offload(bench: Bench) -> Iterator[Row]:
    case = Case("unrolled", bench.choose("mlp4096", "mlp16"), bench.choose(40, 2))
    methods = {"kept": Unrolled(memory=0), "moved away": Unrolled(offload="cpu")}
    makes = {name: windows(bench, case, method, 4096) for name, method in methods.items()}
    runs = {name: make() for name, make in makes.items()}
    check(Judge(case, None), runs)
    seconds = bench.medians(runs)
    runs.clear()
    ratio = seconds["moved away"] / seconds["kept"]
    yield Row(f"wide MLP, unrolled T = {case.size}, snapshots moved away: time over kept", ratio, "")
    for name, make in makes.items():
        yield Row(f"the same, snapshots {name}, peak memory", bench.megabytes(make), "MB")


FIGURES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "unrolled, cnn": partial(unrolled, model="cnn"),
    "unrolled, mlp": partial(unrolled, model="mlp"),
    "implicit, ResNet-18": implicit_resnet,
    "2-layer transformer": transformer_memory,
    "one step": one_step,
    "implicit, cnn": implicit_cnn,
    "waits": synchronizations,
    "offload": offload,
}


def report(bench: Bench, rows: Sequence[Row], seconds: float) -> str:
    """The page: where and how, and the table."""
    name = torch.cuda.get_device_name(bench.device) if bench.cuda else "CPU"
    table = tabulate([row.cells() for row in rows], ["", "measured", "target", "reached"], tablefmt="github")
    return (
        f"# On a CUDA device\n\nMeasured on {datetime.date.today()}: {name}, torch {torch.__version__}, "
        f"without TF32, medians of {bench.repeats}, {seconds:.0f} s in all.\n\n"
        f"`python -m benchmarks.on_cuda {shlex.join(sys.argv[1:])}`\n\n{table}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small problems, to see that everything runs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    options = parser.parse_args()
    bench = Bench(torch.device(options.device), options.tiny, options.repeats)
    torch.backends.cudnn.allow_tf32 = False  # answers are held against float64
    start, rows, failed = time.perf_counter(), [], []
    for name, figure in FIGURES.items():
        try:
            for row in figure(bench):
                rows.append(row)
                print(" | ".join(row.cells()), f"[{time.perf_counter() - start:.0f} s]", flush=True)
        except (RuntimeError, ValueError, DisagreementError) as error:  # the other figures are worth having
            if bench.tiny:
                raise
            failed.append(f"{name}: {error}")
            rows.append(Row(failed[-1].splitlines()[0], math.nan, "", "to run", False))
    page = report(bench, rows, time.perf_counter() - start)
    print("\n" + page)
    if options.out is not None:
        options.out.write_text(page, encoding="utf-8")
    if failed:
        raise SystemExit("\n".join(["These figures failed:", *failed]))


if __name__ == "__main__":
    main()
