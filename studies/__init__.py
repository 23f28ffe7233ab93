"""Measured once to settle a question: ``python -m studies.precision``, ``python -m studies.solvers``."""
