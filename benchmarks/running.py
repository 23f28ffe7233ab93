"""Contestants take turns, each measurement in a process of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .cases import Case
from .contestants import Contestant, contestants_of
from .measure import OUT_OF_MEMORY, TOO_SLOW, Limits, Outcome, in_own_process
from .results import Judge, Row, Table
from .work import LONG, measure, profile, reference


class Run:
    """Measures cases, and remembers what was too slow or too large:
    more steps of the same kind are not tried then."""

    def __init__(
        self, repeats: int, limits: Limits, tell: Callable[[str], None], names: list[str] | None = None
    ) -> None:
        self._repeats, self._limits, self._tell, self._names = repeats, limits, tell, names
        self._given_up: dict[tuple[Case, str], tuple[int, str]] = {}  # at which size, and why
        self._pace: dict[tuple[Case, str], float] = {}  # seconds for each step or term

    def tables(self, block: list[Case]) -> list[Table]:
        """The tables of cases that take turns.

        Raises:
            DisagreementError: if an answer is wrong.
        """
        tables = [Table(case, {c.name: Row(c) for c in self._contestants(case)}) for case in block]
        judges = [self._judge(case) for case in block]
        repeats = self._repeats if block[0].size < LONG else 1
        for repeat in range(repeats):
            for table, judge in zip(tables, judges):
                self._tell(f"{table.case.title}: round {repeat + 1} of {repeats}")
                for row in table.rows.values():
                    self._measure(table.case, row, judge)
        return tables

    def profiles(self, case: Case) -> dict[str, Outcome]:
        """One profiled measurement of each of our contestants."""
        ours = [c for c in self._contestants(case) if c.whose == "ours"]
        return {c.name: in_own_process(profile, c, case, limits=self._limits) for c in ours}

    def _contestants(self, case: Case) -> list[Contestant]:
        return [c for c in contestants_of(case) if self._names is None or c.name in self._names]

    def _judge(self, case: Case) -> Judge:
        found = self._outcome(case, "reference", reference, case)
        if found.mark:
            self._tell(
                f"{case.title}: no reference in float64 ({found.mark}); answers are held against each other"
            )
        return Judge(case, None if found.mark else float(found.answers[0][0]))

    def _measure(self, case: Case, row: Row, judge: Judge) -> None:
        if row.mark:
            return
        outcome = self._outcome(case, row.contestant.name, measure, row.contestant, case)
        row.mark = outcome.mark
        if outcome.mark:
            return
        for answer in outcome.answers:
            error = judge.error(row.contestant.name, answer, row.contestant.tolerance)
            row.error = error if math.isnan(row.error) else max(error, row.error)
        row.outcomes.append(replace(outcome, answers=[]))

    def _outcome(self, case: Case, name: str, work: Callable[..., Outcome], *args: Any) -> Outcome:
        key = (_kind(case), name)
        if self._pace.get(key, 0.0) * case.size > self._limits.seconds:
            return Outcome(mark=TOO_SLOW)
        size, mark = self._given_up.get(key, (case.size + 1, ""))
        if case.size >= size:
            return Outcome(mark=mark)
        outcome = in_own_process(work, *args, limits=self._limits)
        if outcome.mark in (TOO_SLOW, OUT_OF_MEMORY):
            self._given_up[key] = (case.size, outcome.mark)
        elif not outcome.mark:
            self._pace[key] = outcome.seconds / case.size
        return outcome


def _kind(case: Case) -> Case:
    return replace(case, size=0, only=None)
