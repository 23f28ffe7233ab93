"""Tests run side by side, so each process takes one thread, and so do those that it starts."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported
