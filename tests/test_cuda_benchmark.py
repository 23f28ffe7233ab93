"""The benchmark for CUDA devices runs, on a CPU and with small problems."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_whole_table_is_written(tmp_path: Path) -> None:
    page = tmp_path / "cuda.md"
    arguments = ["--device", "cpu", "--tiny", "--repeats", "1", "--out", str(page)]
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.on_cuda", *arguments]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", env=surroundings, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    text = page.read_text(encoding="utf-8")
    for words in (
        "cnn, higher's time over ours",
        "mlp, unrolled T = 3, as it chooses",
        "the same, peak memory, graphs kept",
        "ResNet-18",
        "peak memory over",
        "2-layer transformer",
        "captured",
        "one implicit hypergradient",
        "waits",
        "target",
    ):
        assert words in text, words
