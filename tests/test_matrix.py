"""Every update rule with every continuous setting, at every granularity: the hypergradient is right.

Reference: finite differences of training with plain ``torch.optim``, to 1e-5 (see ``cells.py``),
and Unrolled against ForwardMode, which share the update rules and nothing else, to 1e-9.

``python tests/test_matrix.py`` prints the table.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from itertools import combinations, groupby

import pytest
import torch

from cells import (
    CELLS,
    GRANULARITIES,
    ROWS,
    WHOLE_MATRIX,
    Cell,
    Row,
    build,
    check,
    check_forward_mode,
    exact,
    references,
    settings_of,
)
from torch_hypergrad import Hyperparameter, Unrolled
from torch_hypergrad.updates import rule_of
from torch_hypergrad.updates.base import registered_types

FORWARD = [(row, per, None) for row in ROWS for per in ("group", "tensor")]
FORWARD += [(row, "group", zero) for row in ROWS for zero in row.zeros]
WITHOUT_RULE = {"LBFGS", "SparseAdam", "Adafactor"}


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with exact():
        yield


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_unrolled_equals_finite_differences_of_plain_torch(cell: Cell) -> None:
    check(cell)


@pytest.mark.parametrize(("row", "per", "zero"), FORWARD, ids=lambda part: getattr(part, "name", str(part)))
def test_forward_mode_equals_unrolled_with_all_settings_tuned_at_once(
    row: Row, per: str, zero: str | None
) -> None:
    check_forward_mode(row, per, zero)


def test_the_table_has_every_tunable_setting_of_every_rule() -> None:
    tunable = {
        (kind.__name__, setting)
        for kind in registered_types()
        if kind.__module__.startswith("torch.optim")
        for setting in rule_of(kind([torch.nn.Parameter(torch.ones(2, 2))])).tunable
    }
    assert tunable == {(row.optimizer, setting) for row in ROWS for setting in settings_of(row)}


def test_every_optimizer_of_torch_has_a_row_or_is_known_to_have_no_rule() -> None:
    kinds = {
        n
        for n, kind in vars(torch.optim).items()
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)
    }
    assert kinds - {"Optimizer"} == {row.optimizer for row in ROWS} | WITHOUT_RULE & kinds


@pytest.mark.parametrize("optimizer", sorted({row.optimizer for row in ROWS}))
def test_the_options_of_a_row_take_effect(optimizer: str) -> None:
    losses = [next(iter(references(row).values())).val_loss for row in ROWS if row.optimizer == optimizer]
    assert all(abs(a - b) > 1e-6 for a, b in combinations(losses, 2)), losses


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")
@pytest.mark.parametrize("setting", WHOLE_MATRIX)
def test_muon_settings_of_a_whole_matrix_are_refused_per_element(setting: str) -> None:
    row = next(row for row in ROWS if row.optimizer == "Muon")
    with pytest.raises(ValueError, match="element"):
        build(row, [Hyperparameter(setting, per="element")], Unrolled())


def print_table() -> int:
    """All cells and all comparisons of the two methods; the exit code."""
    wrong: list[str] = []

    def verdict(name: str, run: object, *args: object) -> str:
        try:
            run(*args)  # type: ignore[operator]
        except Exception as error:
            wrong.append(f"{name}: {error}")
            return "WRONG"
        return "ok"

    print(f"{'rule':<26}{'setting':<34}" + "".join(f"{per:<9}" for per in GRANULARITIES))
    with exact():
        for (row, setting, start), cells in groupby(CELLS, lambda cell: (cell.row, cell.setting, cell.start)):
            found = {cell.per: verdict(str(cell), check, cell) for cell in cells}
            print(
                f"{row.name:<26}{f'{setting} = {start:g}':<34}"
                + "".join(f"{found.get(p, '-'):<9}" for p in GRANULARITIES)
            )
        for row, per, zero in FORWARD:
            verdict(f"ForwardMode, {row.name} per {per}, {zero} from 0", check_forward_mode, row, per, zero)
    for line in wrong:
        print(line)
    total = len(CELLS) + len(FORWARD)
    print(f"{len(FORWARD)} comparisons of ForwardMode with Unrolled are among the cells below.")
    print(f"{total - len(wrong)} of {total} cells correct")
    return 1 if wrong else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(print_table())
