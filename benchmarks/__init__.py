"""Time and memory beside peers: ``python -m benchmarks.bench``, or ``make bench``."""
