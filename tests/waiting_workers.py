"""Two workers that wait, for a test that kills their parent: each writes a file with its process id."""

import os
import sys
import time
from pathlib import Path

from torch_hypergrad.experiment.stopping import StopRequest
from torch_hypergrad.experiment.workers import workers


def wait(stop: StopRequest) -> None:
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(600)


if __name__ == "__main__":
    with workers(2, StopRequest()) as pool:
        list(pool.results([wait, wait]))
