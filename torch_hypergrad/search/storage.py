"""Where a study lives: in memory, in a file, or on a server that workers on several machines reach."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import (
    BaseStorage,
    InMemoryStorage,
    JournalStorage,
    RDBStorage,
    RetryHeartbeatStaleTrialCallback,
)
from optuna.storages.journal import JournalFileBackend, JournalRedisBackend
from optuna.study import Study
from optuna.trial import FrozenTrial
from sqlalchemy.exc import DBAPIError, IntegrityError

from .space import nearest

MAX_RETRY = 3
"""A trial whose settings kill its worker is not tried again for ever."""

NUM_ATTEMPTS = 5
"""Workers that start together make the tables of an empty database together; all but one fail at it."""

FILES = ("sqlite", "journal")
DATABASES = ("sqlite", "postgresql", "mysql")
SCHEMES = (*DATABASES, "journal", "redis")
DRIVERS = {"postgresql": "psycopg2-binary", "mysql": "pymysql", "redis": "redis"}


def make_storage(storage: str | BaseStorage | None, *, heartbeat: int = 60) -> BaseStorage:
    """The storage of a study; who passes the same URL joins it, from other machines too.

    Args:
        storage: None for the memory of this process; ``"sqlite:///path.db"`` or ``"journal:///path.log"``
            for a file (four slashes before an absolute path); ``"postgresql://user@host/database"``, or
            ``"redis://host:6379"``; or one of Optuna's objects, which is given back. Many workers on one
            machine or a network file system do best with a journal.
        heartbeat: seconds between two signs of life of a running trial, which are kept in the storage. A
            trial without one for twice as long has lost its worker; another worker marks it as failed and
            tries its settings again, up to three times.

    Raises:
        TypeError, ValueError: for what is no storage.
        ConnectionError: for one that cannot be reached.
        ModuleNotFoundError: for a database without its driver.
    """
    if isinstance(heartbeat, bool) or not isinstance(heartbeat, int) or heartbeat < 1:
        raise ValueError(f"heartbeat must be a whole number of seconds, at least 1, got {heartbeat!r}.")
    if storage is None:
        return InMemoryStorage()
    if isinstance(storage, BaseStorage):
        return storage
    if not isinstance(storage, str):
        raise TypeError(f"storage must be a URL, an Optuna storage or None, got {storage!r}.")
    scheme = scheme_of(storage)
    if scheme not in SCHEMES or "://" not in storage:
        begin = shown(storage).partition("://")[0]
        raise ValueError(
            nearest("storage must be None or a URL that begins with", begin, SCHEMES)
            + " A file is 'sqlite:///path.db' or 'journal:///path.log'."
        )
    if scheme in FILES and storage.partition(":///")[2] in ("", ":memory:"):
        raise ValueError(
            f"storage={storage!r} has no file. Three slashes come before it, '{scheme}:///path'; pass None "
            "for a study in memory."
        )
    with reached(storage), warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return _database(storage, heartbeat) if scheme in DATABASES else _journal(storage)


def scheme_of(url: str) -> str:
    """``"postgresql"`` of ``"postgresql+psycopg2://..."``."""
    return re.split(r"[:+]", url, maxsplit=1)[0]


def shown(storage: object) -> str:
    """A URL without its password."""
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", storage) if isinstance(storage, str) else str(storage)


def _database(url: str, heartbeat: int) -> RDBStorage:
    # Workers that write to one SQLite file at the same moment wait for each other, 5 seconds by default.
    options = {"connect_args": {"timeout": 60}} if scheme_of(url) == "sqlite" else {}
    for attempt in range(NUM_ATTEMPTS):
        try:
            return RDBStorage(
                url,
                engine_kwargs=options,
                heartbeat_interval=heartbeat,
                heartbeat_stale_trial_callback=retry(),
            )
        except DBAPIError as error:
            made_by_another = isinstance(error, IntegrityError) or "already exists" in str(error)
            if not made_by_another or attempt == NUM_ATTEMPTS - 1:
                raise
        time.sleep(0.2 * 2**attempt)
    raise AssertionError


def _journal(url: str) -> JournalStorage:
    if scheme_of(url) == "redis":
        return JournalStorage(JournalRedisBackend(url))
    return JournalStorage(JournalFileBackend(url.partition(":///")[2]))


def retry() -> Callable[[Study, FrozenTrial], None]:
    """Queues the settings of a trial that lost its worker."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRY)


def keeps_time(storage: BaseStorage) -> bool:
    """Whether the storage watches its workers, or has none but this process."""
    return isinstance(storage, (RDBStorage, InMemoryStorage))


def check_alone(url: str, storage: BaseStorage, name: str) -> None:
    """Refuses a file of another study: a name with a slip would begin a new one beside it.

    Raises:
        ValueError: if the file holds other studies and none of this name.
    """
    with reached(url):
        names = optuna.get_all_study_names(storage)
    if names and name not in names:
        raise ValueError(
            f"{shown(url)} is the storage of another study: it holds {', '.join(map(repr, sorted(names)))}, "
            f"and none named {name!r}. Pass name={sorted(names)[0]!r} to go on with it, or another file."
        )


@contextmanager
def reached(storage: object) -> Iterator[None]:
    """Says in one line why a storage cannot be used; drivers have errors of their own."""
    try:
        yield
    except Exception as error:
        scheme = scheme_of(str(storage))
        if isinstance(error, ImportError) and scheme in DRIVERS:
            raise ModuleNotFoundError(
                f"The storage {shown(storage)} needs a driver that is not installed: pip install "
                f"{DRIVERS[scheme]}."
            ) from error
        reason = str(getattr(error, "orig", None) or error).strip().splitlines() or [type(error).__name__]
        raise ConnectionError(
            f"The storage {shown(storage)} cannot be reached: {reason[0].rstrip('.')}. Look for a slip "
            "in it; is its folder there, or its server running, and may you write there?"
        ) from error
