"""What torch_hypergrad costs on a CUDA device, as one table in less than 8 minutes.

    python benchmarks/cuda.py [--out docs/results/cuda.md]
    python benchmarks/cuda.py --device cpu --tiny
        # the same code on small problems: no figures, only that it runs

Times are medians of ``--repeats`` runs between two synchronizations, after one to warm up;
contestants take turns. Memory is the peak that torch had allocated, model and batches included.
Batches are random, and lie on the device.
"""

from __future__ import annotations

import argparse
import datetime
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# torch imports NVIDIA's package of this file's name, which must not be this file.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from torch_hypergrad import HyperOptimizer, Hyperparameter, Implicit, Neumann, Unrolled
from torch_hypergrad.device.capture import NUM_WARM_UPS
from torch_hypergrad.experiment.models import CNN, resnet18

Batch = tuple[Tensor, Tensor]
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=1e-3)
FROZEN = partial(torch.optim.SGD, lr=0.0)
DECAY = Hyperparameter("weight_decay")
DECAYS = Hyperparameter("weight_decay", per="element")


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


@dataclass(frozen=True)
class Bench:
    """Where and how often is measured."""

    device: torch.device
    tiny: bool
    repeats: int

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.tiny else full

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

    def megabytes(self, run: Callable[[], Any]) -> float:
        """The peak that was allocated while ``run`` ran."""
        if not self.cuda:
            run()
            return math.nan
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


# ---- problems ----------------------------------------------------------------------------------------------


def mnist_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 10),
    )  # fmt: skip


class Transformer(nn.Module):
    """Two layers over sequences of vectors; classes by the mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(1))


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batches_of(bench: Bench, num: int, shape: Sequence[int]) -> list[Batch]:
    """Random inputs and labels, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(*shape, generator=generator) for _ in range(num)]
    y = [torch.randint(10, (shape[0],), generator=generator) for _ in range(num)]
    return [(a.to(bench.device), b.to(bench.device)) for a, b in zip(x, y)]


def made(
    bench: Bench, model: Callable[[], nn.Module], tune: Hyperparameter, method: Any, **options: Any
) -> HyperOptimizer:
    torch.manual_seed(0)
    network = model().to(bench.device)
    return HyperOptimizer(network, SGD(network.parameters()), loss_of, [tune], method, FROZEN, **options)


def plain(bench: Bench, model: Callable[[], nn.Module]) -> Callable[[Batch], Tensor]:
    """The plain loop's step."""
    torch.manual_seed(0)
    network = model().to(bench.device)
    optimizer = SGD(network.parameters())

    def step(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(network, batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def each(step: Callable[[Batch], Any], batches: Sequence[Batch]) -> None:
    for batch in batches:
        step(batch)


# ---- the figures -------------------------------------------------------------------------------------------


def run_ours(hyper: HyperOptimizer, batches: Sequence[Batch]) -> float:
    """Training from the start, and the hypergradient."""
    hyper.restart()
    each(hyper.step, batches[:-1])
    return hyper.hypergradient(batches[-1])["weight_decay/group0"].item()


def run_higher(bench: Bench, batches: Sequence[Batch]) -> float:
    import higher

    torch.manual_seed(0)
    model = mnist_cnn().to(bench.device)
    decay = torch.tensor(1e-3, device=bench.device, requires_grad=True)
    context = higher.innerloop_ctx(model, SGD(model.parameters()), override={"weight_decay": [decay]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with context as (fast, optimizer):
            for batch in batches[:-1]:
                optimizer.step(loss_of(fast, batch))
            return torch.autograd.grad(loss_of(fast, batches[-1]), decay)[0].item()


def unrolled_mnist(bench: Bench) -> Iterator[Row]:
    num_steps = bench.size(100, 3)
    batches = batches_of(bench, num_steps + 1, (bench.size(128, 4), 1, 28, 28))
    contestants: dict[str, Callable[[], Any]] = {}
    for name, options in {"eager": {}, "captured": {"capture": bench.cuda}}.items():
        contestants[name] = partial(run_ours, made(bench, mnist_cnn, DECAY, Unrolled(), **options), batches)
    try:
        import higher  # noqa: F401
    except ImportError:
        print("higher cannot be imported: its rows are left out.", file=sys.stderr)
    else:
        contestants["higher"] = partial(run_higher, bench, batches)
    answers = {name: run() for name, run in contestants.items()}
    if any(not math.isclose(answer, answers["eager"], rel_tol=2e-2) for answer in answers.values()):
        raise RuntimeError(f"the hypergradients differ: {answers}")
    seconds = bench.medians(contestants)
    for name, found in seconds.items():
        yield Row(f"MNIST CNN, unrolled T = {num_steps}, {name}", found, "s")
        yield Row(f"the same, peak memory, {name}", bench.megabytes(contestants[name]), "MB")
    if "higher" in seconds:
        yield at_least(
            "higher's time over ours", seconds["higher"] / min(seconds["eager"], seconds["captured"]), 10
        )


def implicit_resnet(bench: Bench) -> Iterator[Row]:
    """Damping and scale are such that the series converges on random labels:
    the time does not depend on them."""
    num_steps = bench.size(100, 3)
    batches = batches_of(bench, 8, (128, 3, 32, 32) if not bench.tiny else (4, 3, 8, 8))
    model: Callable[[], nn.Module] = partial(CNN if bench.tiny else resnet18, batches[0][0].shape[1:], 10)
    window = [batches[t % 7] for t in range(num_steps)]
    solver = Neumann(bench.size(20, 2), scale=1e-3, damping=100.0)

    def plain_window() -> Callable[[], None]:
        return partial(each, plain(bench, model), window)

    def our_window() -> Callable[[], None]:
        hyper = made(bench, model, DECAYS, Implicit(solver))
        return lambda: (each(hyper.step, window), hyper.hyper_step(batches[7]))  # type: ignore[func-returns-value]

    # Each alone on the device; the function that is measured lives no longer than its line.
    sizes = [bench.megabytes(plain_window()), bench.megabytes(our_window())]
    seconds = bench.medians({"plain": plain_window(), "ours": our_window()})
    count = sum(p.numel() for p in model().parameters())
    yield Row(f"ResNet-18, {count / 1e6:.3g} million weights, {num_steps} plain steps", seconds["plain"], "s")
    yield Row(f"the same and one implicit hyper step, K = {solver.num_terms}", seconds["ours"], "s")
    yield at_most("time over the plain loop's", seconds["ours"] / seconds["plain"], 1.5)
    yield Row("peak memory of the plain loop", sizes[0], "MB")
    yield at_most("peak memory over the plain loop's", sizes[1] / sizes[0], 3)


def transformer_memory(bench: Bench) -> Iterator[Row]:
    width, length = bench.size(256, 8), bench.size(256, 5)
    batches = batches_of(bench, 4, (bench.size(32, 2), length, width))
    peaks = {}
    for way in ("reverse", "forward", "finite_difference"):
        hyper = made(bench, partial(Transformer, width), DECAY, Unrolled(second_order=way))
        peaks[way] = bench.megabytes(partial(run_ours, hyper, batches))
        yield Row(f"2-layer transformer, unrolled T = 3, {way}, peak memory", peaks[way], "MB")
        del hyper
    yield at_most(
        "forward over reverse, memory over reverse over reverse", peaks["forward"] / peaks["reverse"], 1
    )


def one_step(bench: Bench) -> Iterator[Row]:
    batches = batches_of(bench, bench.size(50, 2), (bench.size(128, 4), 1, 28, 28))
    options = {
        "group": (DECAY, {}),
        "element": (DECAYS, {}),
        "group, captured": (DECAY, {"capture": bench.cuda}),
    }
    hypers = {n: made(bench, mnist_cnn, t, Unrolled(truncation=1), **o) for n, (t, o) in options.items()}
    steps: dict[str, Callable[[Batch], Any]] = {"plain": plain(bench, mnist_cnn)}
    steps |= {f"per {name}": hyper.step for name, hyper in hypers.items()}
    seconds = bench.medians({name: partial(each, step, batches) for name, step in steps.items()})
    for name, step in steps.items():
        yield Row(f"MNIST CNN, one step, {name}", 1e3 * seconds[name] / len(batches), "ms")
        yield Row(f"kernels and copies in it, {name}", bench.kernels(partial(step, batches[0])), "")
    yield Row("step per group over plain", seconds["per group"] / seconds["plain"], "")
    yield Row("step per element over per group", seconds["per element"] / seconds["per group"], "")
    yield Row("step captured over eager", seconds["per group, captured"] / seconds["per group"], "")


def implicit_mnist(bench: Bench) -> Iterator[Row]:
    """Of a network so small that launches take longer than kernels."""
    step, val = batches_of(bench, 2, (bench.size(128, 4), 1, 28, 28))
    solver = Neumann(bench.size(20, 2), scale=1e-3, damping=100.0)
    runs = {}
    for name, options in {"eager": {}, "captured": {"capture": bench.cuda}}.items():
        hyper = made(bench, mnist_cnn, DECAYS, Implicit(solver), **options)
        hyper.step(step)
        runs[name] = partial(hyper.hypergradient, val)
        each(hyper.hypergradient, [val] * (NUM_WARM_UPS + 1))  # until all is recorded
    seconds = bench.medians(runs)
    for name, found in seconds.items():
        yield Row(f"MNIST CNN, one implicit hypergradient, K = {solver.num_terms}, {name}", 1e3 * found, "ms")
    yield Row("implicit hypergradient captured over eager", seconds["captured"] / seconds["eager"], "")


def synchronizations(bench: Bench) -> Iterator[Row]:
    batches = batches_of(bench, 4, (bench.size(128, 4), 1, 28, 28))
    methods = {"unrolled": Unrolled(), "implicit": Implicit(Neumann(5, scale=1e-3, damping=100.0))}
    for name, method in methods.items():
        hyper = made(bench, mnist_cnn, DECAYS, method)
        each(hyper.step, batches)
        hyper.hyper_step(batches[0])
        yield at_most(
            f"waits for the device in a step, {name}", bench.waits(partial(hyper.step, batches[0])), 0
        )
        yield at_most(
            f"waits for the device in a hyper step, {name}",
            bench.waits(partial(hyper.hyper_step, batches[1])),
            1,
        )


def offload(bench: Bench) -> Iterator[Row]:
    width = bench.size(2048, 8)
    model = partial(nn.Sequential, nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    batches = batches_of(bench, bench.size(41, 3), (bench.size(4096, 4), width))
    hypers = {place: made(bench, model, DECAY, Unrolled(offload=place)) for place in (None, "cpu")}
    runs = {str(place): partial(run_ours, hyper, batches) for place, hyper in hypers.items()}
    seconds = bench.medians(runs)
    yield Row(
        "wide MLP, unrolled T = 40, snapshots moved away: time over kept",
        seconds["cpu"] / seconds["None"],
        "",
    )
    for place, run in runs.items():
        yield Row(f"the same, offload={place}, peak memory", bench.megabytes(run), "MB")


FIGURES = [
    unrolled_mnist,
    implicit_resnet,
    transformer_memory,
    one_step,
    implicit_mnist,
    synchronizations,
    offload,
]


def report(bench: Bench, rows: Sequence[Row], seconds: float) -> str:
    """The page: where and how, and the table."""
    name = torch.cuda.get_device_name(bench.device) if bench.cuda else "CPU"
    table = tabulate([row.cells() for row in rows], ["", "measured", "target", "reached"], tablefmt="github")
    return (
        f"# On a CUDA device\n\nMeasured on {datetime.date.today()}: {name}, torch {torch.__version__}, "
        f"medians of {bench.repeats}, {seconds:.0f} s in all.\n\n`python {' '.join(sys.argv)}`\n\n{table}\n"
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
    start, rows = time.perf_counter(), []
    for figure in FIGURES:
        try:
            for row in figure(bench):
                rows.append(row)
                print(" | ".join(row.cells()), f"[{time.perf_counter() - start:.0f} s]", flush=True)
        except (RuntimeError, ValueError) as error:  # the other figures are worth having
            if bench.tiny:
                raise
            rows.append(Row(f"{figure.__name__}: {error}".splitlines()[0], math.nan, "", "to run", False))
    page = report(bench, rows, time.perf_counter() - start)
    print("\n" + page)
    if options.out is not None:
        options.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
