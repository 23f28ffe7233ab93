"""The benchmark runs end to end, says what it should, and does not let a wrong hypergradient pass.

Measurements start processes, so cases are tiny and few. Nothing here looks at how long anything took.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import bench, contestants, measure, page, plots, running, suites, work
from benchmarks.cases import Case, Problem, direction, make_problem
from benchmarks.contestants import Contestant
from benchmarks.measure import Limits, Meter, Outcome
from benchmarks.results import DisagreementError, Judge, Row, Table

pytestmark = pytest.mark.skipif(
    find_spec("torchopt") is None, reason="TorchOpt, a peer, comes with the extra `bench`"
)

TINY = [
    Case("unrolled", "mlp16", 3),
    Case("unrolled", "mlp16", 3, per="element", only=("plain", "unrolled", "higher")),
]
Run = Callable[[Problem, AbstractContextManager], torch.Tensor]
SMALL_CNN = Case("unrolled", "cnn_strided", 3)


def wrong(problem: Problem, meter: AbstractContextManager) -> torch.Tensor:
    """Half of the hypergradient"""
    return 0.5 * contestants.unrolled(problem, meter)


def wrong_later(problem: Problem, meter: AbstractContextManager) -> torch.Tensor:
    """Half of the hypergradient, but not where memory was given back before: in later windows"""
    released = isinstance(meter, Meter) and meter.released
    return contestants.unrolled(problem, meter) * (1.0 if released else 0.5)


def endless(problem: Problem, meter: AbstractContextManager) -> None:
    """Never ends"""
    while True:
        pass


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suites.SUITES, "quick", TINY)


def cells(text: str) -> dict[str, list[str]]:
    """The rows of a table by their first cell."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in lines}


def test_command(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["plain", "unrolled", "higher", "TorchOpt, penalty"]
    out = tmp_path / "new folder" / "page.md"
    bench.main(["--repeats", "1", "--threads", "1", "--out", str(out), "--contestants", *names])
    printed, written = capsys.readouterr().out, out.read_text(encoding="utf-8")
    for table in TINY:
        title = f"## {table.title}"
        assert title in printed
        rows = cells(written.split(title)[1].split("##")[0])
        assert set(table.only or names) <= set(rows)
        seconds, fastest, slowest, ratio, first, first_ratio, megabytes, _, error = rows["unrolled"]
        assert 0 < float(fastest) <= float(seconds) <= float(slowest)
        assert float(first) > 0
        assert float(megabytes) >= 0
        assert float(error) < 1e-5
        assert rows["plain"][-1] == ""
        if table.per == "group":
            assert float(ratio) > 0
            assert float(first_ratio) > 0
        else:
            assert rows["higher"][0] == "cannot"
            assert re.search(r"\*\*higher\*\*: RuntimeError: Boolean value of Tensor", written)


@pytest.mark.parametrize("run", [wrong, wrong_later])
def test_a_wrong_hypergradient_ends_the_run(run: Run, tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    table = [Contestant("unrolled", "", contestants.unrolled), Contestant("wrong", "", run)]
    monkeypatch.setitem(contestants.CONTESTANTS, "unrolled", table)
    with pytest.raises(
        SystemExit, match=r"wrong gives an answer of -?\d.* the reference in float64 gives -?\d"
    ) as ended:
        bench.main(["--repeats", "1", "--threads", "1"])
    assert ended.value.code not in (0, None)


def test_limits() -> None:
    case = Case("unrolled", "mlp16", 2)
    slow = measure.in_own_process(
        work.measure, Contestant("", "", endless), case, limits=Limits(seconds=0.5, threads=1)
    )
    assert slow.mark == measure.TOO_SLOW
    big = measure.in_own_process(allocate, 10_000_000_000, limits=Limits(seconds=60, gigabytes=4, threads=1))
    assert big.mark == measure.OUT_OF_MEMORY


def allocate(size: int) -> Outcome:
    return Outcome(memory=torch.ones(size).numel())


def test_the_allocator_is_set_before_anything_is_measured() -> None:
    for allocator in ("kept", "default"):
        limits = Limits(seconds=60, threads=1, allocator=allocator)
        assert measure.in_own_process(is_kept, limits=limits).memory == (allocator == "kept")
        assert page.ALLOCATORS[allocator] in page.header("command", limits)
    assert bench.parse([]).allocator == "kept"


def is_kept() -> Outcome:
    return Outcome(memory=measure.keep_freed_memory.cache_info().currsize)


def test_first_and_later_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, answers = [], iter([1.0, 2.0, 2.0, 3.0, 3.0])

    def run(problem: Problem, meter: Meter) -> torch.Tensor:
        sizes.append((len(problem.batches), meter.released))
        with meter:
            return torch.tensor([next(answers)])

    outcome = work.measure(Contestant("", "", run), Case("unrolled", "mlp16", 5))
    assert sizes == [(work.WARM_UP, True), (5, True), (5, False), (5, False), (5, False)]
    assert len(outcome.later) == work.NUM_LATER
    assert outcome.seconds == outcome.first + sum(outcome.later) > 0
    assert [answer.tolist() for answer in outcome.answers] == [[2.0], [3.0]]


def test_the_meter_sees_what_was_freed_again() -> None:
    meter = Meter()
    with meter:
        torch.ones(10_000_000).sum()
    assert 39e6 < meter.memory < 60e6
    assert meter.seconds > 0


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TorchOpt calls functorch
@pytest.mark.parametrize(
    "case",
    [
        Case("implicit", "mlp16", 3),
        Case("steps", "mlp16", 3, "adam"),
        replace(SMALL_CNN, only=("unrolled", "budget", "replay", "graphs", "few snapshots", "forward")),
    ],
    ids=lambda case: case.title,
)
def test_answers_agree_with_the_reference(case: Case) -> None:
    judge, errors = Judge(case, float(work.reference(case).answers[0][0])), []
    for contestant in contestants.contestants_of(case):
        answers = work.measure(contestant, case).answers
        errors += [judge.error(contestant.name, answer, contestant.tolerance) for answer in answers]
    assert len(errors) >= 2
    assert max(errors) < 1e-4


def test_profile() -> None:
    contestant, case = Contestant("unrolled", "", contestants.unrolled), Case("unrolled", "mlp16", 3)
    outcome = work.profile(contestant, case)
    assert {where: calls for where, calls, *_ in outcome.functions}[
        "torch_hypergrad/hyper_optimizer.py: step"
    ] == case.size
    rows = cells(page.profile("title", {"ours": outcome}))
    assert rows["ours"] == ["calls", "s, own", "s, all"]
    assert len(rows) == 2 + page.NUM_FUNCTIONS


def test_judge() -> None:
    case, answer = TINY[1], np.arange(1.0, 6.0)
    judge = Judge(case, float(answer @ direction(5).numpy()))
    assert judge.error("someone", answer) == 0
    swapped = answer.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    for bad in (-answer, 1.1 * answer, swapped, answer * math.nan):
        with pytest.raises(DisagreementError, match="someone gives an answer of"):
            judge.error("someone", bad)
    assert 0.04 < judge.error("someone", 1.05 * answer, tolerance=0.2) < 0.2
    without_reference = Judge(case, None)
    assert without_reference.error("someone", answer) == 0
    with pytest.raises(DisagreementError):
        without_reference.error("someone", swapped)


def test_what_was_too_slow_is_not_tried_with_more_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def pretend(work: object, *args: object, limits: Limits) -> Outcome:
        case, who = args[-1], args[0].name if isinstance(args[0], Contestant) else "reference"
        assert isinstance(case, Case)
        tried.append((who, case.size))
        if who == "higher" and case.size > 10:
            return Outcome(mark=measure.OUT_OF_MEMORY)
        seconds = 0.05 * case.size if who == "unrolled" else 0.0
        return Outcome(seconds, (seconds,), answers=[np.ones(1)])

    monkeypatch.setattr(running, "in_own_process", pretend)
    run = running.Run(2, Limits(seconds=50), lambda progress: None, ["unrolled", "higher"])
    marks = []
    for size in (10, 100, 1000, 20):
        rows = run.tables([Case("unrolled", "mlp", size)])[0].rows
        marks.append((rows["unrolled"].mark, rows["higher"].mark))
    assert marks == [("", ""), ("", "out of memory"), ("too slow", "out of memory"), ("", "out of memory")]
    assert [size for who, size in tried if who == "unrolled"] == [10, 10, 100, 100, 20, 20]
    assert [size for who, size in tried if who == "higher"] == [10, 10, 100, 20]


def made_up(case: Case, seconds: dict[str, float]) -> Table:
    rows = {c.name: Row(c) for c in contestants.contestants_of(case)}
    for name, value in seconds.items():
        rows[name].outcomes = [Outcome(3 * s, (s, s), 1e6 * s) for s in (0.9 * value, value, 5 * value)]
        rows[name].error = 0.001
    return Table(case, rows)


def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [
        made_up(suites.MLP, {"unrolled": 2.0, "higher": 4.0, "TorchOpt, penalty": 8.0}),
        made_up(suites.CNN, {"unrolled": 4.0, "higher": 4.0}),
        made_up(suites.MLP_PER_ELEMENT, {"unrolled": 2.5}),
        made_up(suites.LONGEST, {"few snapshots": 5.0}),
    ]
    extra = [
        suites.Target(suites.MLP, "unrolled", "first time", 0.6),
        suites.Target(suites.MLP, "unrolled", "error", 0.01, None),
    ]
    monkeypatch.setattr(page, "TARGETS", suites.TARGETS + extra)
    lines = [line for line in page.targets(tables).splitlines() if line.startswith("| unrolled")]
    found = {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines}
    group, cnn, element, longest = (t.case.title for t in tables)
    assert (group, "unrolled", "time", "best peer", "1", "0.50", "yes") in found
    assert (group, "unrolled", "memory", "best peer", "0.45", "0.50", "no") in found
    assert (group, "unrolled", "first time", "best peer", "0.6", "0.50", "yes") in found
    assert (group, "unrolled", "error", "in parts of the norm", "0.01", "0.001", "yes") in found
    assert (cnn, "budget", "time", "best peer", "1.2", "not run", "no") in found
    assert (element, "unrolled", "time", "per group", "1.15", "1.25", "no") in found
    assert (longest, "few snapshots", "memory", "in MB", "1000", "5.00", "yes") in found


def test_pictures(tmp_path: Path) -> None:
    cases = [case for case in suites.SCALING if case.task == "unrolled"]
    tables = [made_up(case, {"unrolled": 1.0 + case.size, "higher": 2.0 + case.size}) for case in cases]
    shown = plots.draw(tables, tmp_path / "page.md")
    assert len(shown) == 2
    for markdown in shown:
        name = re.search(r"\((.+)\)", markdown)
        assert name is not None
        assert (tmp_path / name[1]).stat().st_size > 5_000


def test_every_suite_is_made_of_cases_that_exist() -> None:
    for cases in suites.SUITES.values():
        for case in cases:
            assert contestants.contestants_of(case)
            assert case.only is None or set(case.only) <= {c.name for c in contestants.CONTESTANTS[case.task]}
    for target in suites.TARGETS:
        assert target.case in suites.TARGETS_SUITE
        assert target.contestant in {c.name for c in contestants.contestants_of(target.case)}


def test_each_quantity_has_a_best_peer_of_its_own() -> None:
    table = made_up(suites.MLP, {"unrolled": 2.0, "higher": 4.0, "TorchOpt, penalty": 8.0})
    table.rows["TorchOpt, penalty"].outcomes = [Outcome(3.0, (8.0, 8.0, 9.0), 1e6)]
    assert table.best_peer("time") == 4.0
    assert table.best_peer("first time") == 3.0
    assert table.best_peer("memory") == 1e6
    row = cells(page.section(table))["unrolled"]
    assert row == ["2.000", "1.800", "10.000", "0.50", "6.000", "2.00", "2.0", "2.00", "1e-03"]


@pytest.mark.parametrize("name", ["mlp16", "cnn", "cnn_strided", "transformer"])
def test_models_take_their_batches(name: str) -> None:
    problem = make_problem(Case("unrolled", name, 2), torch.float64)
    inputs, labels = problem.val
    assert problem.model(inputs).shape == (len(labels), 10)
    assert len(labels.unique()) > 5
