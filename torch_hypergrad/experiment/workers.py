"""Who does what can be done at the same time: this process, or several that end with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.synchronize import Event
from threading import Thread

from tqdm import tqdm

from .stopping import StopRequest, TrainingError

Job = Callable[[StopRequest], None]
"""What can be done, stops when asked, can be pickled, and raises TrainingError if it fails."""

_stop_workers: Event


def workers(num_jobs: int, stop: StopRequest) -> Workers:
    """This process for one job at a time, else so many others."""
    return ThisProcess(stop) if num_jobs == 1 else Processes(num_jobs, stop)


class WorkerStop(StopRequest):
    """The request of the main process, as a worker sees it."""

    @property
    def requested(self) -> bool:
        """Whether to stop after this step."""
        return _stop_workers.is_set()


def _begin_worker(event: Event) -> None:
    global _stop_workers
    _stop_workers = event
    for number in (signal.SIGINT, signal.SIGTERM):  # the main process hears them, and sets the event
        signal.signal(number, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Also where it was killed and could tell nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(job: Job, stop: StopRequest) -> str | None:
    """Does a job; why it failed, if it did."""
    try:
        job(stop)
    except TrainingError as error:
        return str(error)
    return None


class Workers(ABC):
    """Who does jobs."""

    def __enter__(self) -> Workers:
        return self

    @abstractmethod
    def __exit__(self, *_: object) -> None:
        """Ends what was begun."""

    def run(self, jobs: Sequence[Job], quiet: bool = False) -> list[str]:
        """Does them all, or until a stop is requested; a bar counts them. Returns why some failed, and says
        so."""
        failures = []
        with tqdm(total=len(jobs), unit="job", dynamic_ncols=True, disable=quiet) as bar:
            for job, failure in self.results(jobs):
                if failure is not None:
                    failures.append(failure)
                    bar.write(f"{job}: {failure}", file=sys.stderr)
                bar.update()
        return failures

    @abstractmethod
    def results(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, str | None]]:
        """Each job when it has ended, and why it failed, if it did."""


class ThisProcess(Workers):
    """One job after the other."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def __exit__(self, *_: object) -> None:
        """There is nothing to end."""

    def results(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, str | None]]:
        for job in jobs:
            if not self._stop.requested:
                yield job, _work(job, self._stop)


class Processes(Workers):
    """Several at a time, each in a process that ends with this one."""

    def __init__(self, num_jobs: int, stop: StopRequest) -> None:
        context = multiprocessing.get_context("spawn")
        self._event, self._stop = context.Event(), stop
        self._pool = ProcessPoolExecutor(num_jobs, context, _begin_worker, (self._event,))

    def __exit__(self, *_: object) -> None:
        self._event.set()
        self._pool.shutdown(cancel_futures=True)

    def results(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, str | None]]:
        futures = {self._pool.submit(_work, job, WorkerStop()): job for job in jobs}
        for future in self._completed(futures):
            yield futures[future], future.result()

    def _completed(self, futures: Iterable[Future[str | None]]) -> Iterator[Future[str | None]]:
        left = set(futures)
        while left:
            done, left = wait(left, timeout=0.2, return_when=FIRST_COMPLETED)
            yield from done
            if self._stop.requested and not self._event.is_set():
                self._event.set()
                left = {future for future in left if not future.cancel()}
