"""Tests run side by side, so each process takes one thread, and so do those that it starts."""

import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported


def pytest_collection_finish() -> None:
    """Modules and thousands of tests stay, so the collector need not look through them again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands end without a report, which takes seconds to draw."""
    monkeypatch.setattr("torch_hypergrad.experiment.report.write_report", lambda *_: Path("report.html"))
