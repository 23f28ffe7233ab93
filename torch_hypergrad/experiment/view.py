"""A live view: the report of runs from this machine's own address, drawn again while they train."""

from __future__ import annotations

import hashlib
import html
import os
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .config import ConfigError
from .loopback import Answer, LoopbackServer
from .messages import one_line

PAUSE = 3.0  # seconds between two questions of a page, and between two drawings
SHARE = 4.0  # a report is not drawn again for this many times what it took: the processor is for training
FINISHED = "finished"
FILES = ("config.yaml", "metrics.jsonl", "summary.json")
LOCK = ".lock"

WriteReport = Callable[[Sequence[Path], Path], Path]


class LivePage:
    """The report of some runs. It is drawn when somebody asks and they have written more, in a folder that is
    gone at once; theirs are only read.

    Args:
        folders: of the runs.
        write: writes the report of runs into a folder, and returns the path of its page.
        links: for folders whose own report is a page too, its name.
        pause: seconds between two drawings, at least.
    """

    _drawing = Lock()  # matplotlib's style is the whole process's

    def __init__(
        self, folders: Sequence[Path], write: WriteReport, links: Mapping[Path, str], pause: float = PAUSE
    ) -> None:
        self._folders, self._write, self._links, self._pause = folders, write, links, pause
        self._drawn_of: tuple[str, list[tuple[int, int] | None]] | None = None
        self._not_before = 0.0
        self._answer = Answer(HTTPStatus.NOT_FOUND, "")

    def __call__(self) -> Answer:
        """The page as it stands, or one that says what is wrong."""
        with self._drawing:
            state, message = self._state()  # before the report is drawn: no page is finished and shows less
            written = message, [_stamp(folder / name) for folder in self._folders for name in FILES]
            began = time.monotonic()
            if written != self._drawn_of and (began >= self._not_before or state == FINISHED):
                self._answer = self._draw(state, message)
                self._drawn_of = written if self._answer.status == HTTPStatus.OK else None
                now = time.monotonic()
                self._not_before = now + max(self._pause, SHARE * (now - began))
            return self._answer

    def _draw(self, state: str, message: str) -> Answer:
        try:
            return self._live(HTTPStatus.OK, self._report(), state, message)
        except ConfigError as error:
            return self._failed(HTTPStatus.NOT_FOUND, one_line(error))
        except Exception as error:  # what one drawing stumbles over, the next may not
            reason = f"The report could not be drawn: {type(error).__name__}: {one_line(error)}"
            return self._failed(HTTPStatus.INTERNAL_SERVER_ERROR, reason)

    def _report(self) -> str:
        with TemporaryDirectory(prefix="torch-hypergrad-view-") as out:
            page = self._write(self._folders, Path(out)).read_text(encoding="utf-8")
        for folder, name in self._links.items():
            kept = Path(os.path.relpath(folder / "report" / "report.html", out)).as_posix()
            page = page.replace(f'href="{quote(kept)}"', f'href="{name}"')
        return page

    def _state(self) -> tuple[str, str]:
        """Whether all runs have finished, some are training, or none is, and what to say of them."""
        open_ones = [folder for folder in self._folders if not _has_finished(folder)]
        if not open_ones:
            return FINISHED, "Finished: this page will not change."
        stopped = [each for each in open_ones if not (_is_held(each / LOCK) or _has_finished(each))]
        stamps = [stamp for folder in self._folders if (stamp := _stamp(folder / "metrics.jsonl"))]
        last = time.strftime("last written %X", time.localtime(max(stamps)[0] / 1e9)) if stamps else "begun"
        state = "training" if len(stopped) < len(open_ones) else "interrupted"
        count, told = len(self._folders), f"{'Live' if state == 'training' else 'Interrupted'}: {last}"
        if count > 1:
            interrupted = f", {len(stopped)} interrupted" if stopped else ""
            told = f"{count - len(open_ones)} of {count} runs finished{interrupted}. {told}"
        return state, f"{told}. Go on with: torch-hypergrad resume {stopped[0]}" if stopped else told

    def _live(self, status: HTTPStatus, page: str, state: str, message: str) -> Answer:
        """A page with the part that renews it."""
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent / "report"),
            autoescape=True,
            undefined=StrictUndefined,
        )
        tag = f'"{hashlib.sha256((state + message + page).encode()).hexdigest()[:16]}"'
        part = environment.get_template("live.html.j2").render(
            state=state, message=message, tag=tag, milliseconds=round(1000 * self._pause)
        )
        before, end, after = page.rpartition("</body>")
        return Answer(status, message, before + part + end + after, tag if status == HTTPStatus.OK else "")

    def _failed(self, status: HTTPStatus, message: str) -> Answer:
        """A page that says so, and goes on asking."""
        page = (
            '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><meta name="viewport" '
            'content="width=device-width, initial-scale=1"><title>torch-hypergrad view</title></head>\n'
            f'<body style="overflow-wrap: anywhere"><p>{html.escape(message)}</p></body>\n</html>\n'
        )
        return self._live(status, page, "failed", message)


def _stamp(file: Path) -> tuple[int, int] | None:
    """When it was last written, and its size; None if it is not there."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _has_finished(folder: Path) -> bool:
    return (folder / "summary.json").is_file()


def _is_held(lock: Path) -> bool:
    """Whether a process trains with this lock. Where it cannot be told, as if one did: on Windows, or a file
    system without locks."""
    try:
        import fcntl

        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except (ImportError, OSError):
        return True
    return False


def pages_of(folders: Sequence[Path], write: WriteReport, pause: float = PAUSE) -> dict[str, LivePage]:
    """The report of one run; or the comparison of several, and as ``/1``, ``/2`` ... the report of each."""
    links = {folder: f"/{place}" for place, folder in enumerate(folders, start=1)} if len(folders) > 1 else {}
    each = {name: LivePage([folder], write, {}, pause) for folder, name in links.items()}
    return {"/": LivePage(folders, write, links, pause), **each}


def view(folders: Sequence[Path], port: int, load: Callable[[], WriteReport]) -> None:
    """Serves the report of runs until Ctrl-C, and says where.

    Args:
        folders: of the runs.
        port: 0 for any that is free.
        load: gives what writes a report, which takes torch and its time: asked for once the port is ours.

    Raises:
        ConfigError: a folder that holds no run, or a port that cannot be used.
    """
    for folder in folders:  # at once; whatever else is wrong with it, its report will find
        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"{folder} holds no config.yaml. Pass the folder of a run.")
    try:
        with LoopbackServer(port, {}) as server:
            print(f"{server.url} shows {', '.join(map(str, folders))}. Ctrl-C ends the view.", flush=True)
            server.pages = pages_of(folders, load())
            first = server.pages["/"]()
            if first.status != HTTPStatus.OK:
                raise ConfigError(first.message)
            server.serve_forever()
    except KeyboardInterrupt:
        print("The view is closed.")
