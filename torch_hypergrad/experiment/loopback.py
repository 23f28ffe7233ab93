"""A server of a few named pages for this machine alone. It serves no file, so that no path leads to one."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from .config import ConfigError

ADDRESS = "127.0.0.1"
# A page from elsewhere whose name was made to lead here (DNS rebinding) still sends that name.
OUR_NAMES = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Answer:
    """What a request gets.

    Args:
        status: of HTTP.
        message: what there is to say, in one line.
        page: HTML; without it, the message is sent.
        tag: the same for the same page, empty if that is not to be asked.
    """

    status: HTTPStatus
    message: str
    page: str = ""
    tag: str = ""


Pages = Mapping[str, Callable[[], Answer]]


class LoopbackServer(ThreadingHTTPServer):
    """Answers GET and HEAD for the names in ``pages``, such as ``/``, on 127.0.0.1.

    Args:
        port: 0 for any that is free.
        pages: by their names, what makes them; called from several threads.

    Raises:
        ConfigError: the port is taken, or is none.
    """

    def __init__(self, port: int, pages: Pages) -> None:
        self.pages = pages
        try:
            super().__init__((ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it must be from 0 to 65535"
            raise ConfigError(
                f"Port {port} of {ADDRESS} cannot be used: {reason}. Choose another by --port N; 0 takes any "
                "that is free."
            ) from error

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}/"

    def answer(self, host: str, name: str) -> Answer:
        """What a request gets that was sent to ``host``."""
        if not OUR_NAMES.fullmatch(host):
            return Answer(HTTPStatus.FORBIDDEN, f"This is for {self.url} alone.")
        make = self.pages.get(name)
        return make() if make else Answer(HTTPStatus.NOT_FOUND, f"There is nothing here; see {self.url}")

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that went away is no news; anything else is one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):
            print(f"torch-hypergrad: {type(error).__name__}: {error}", file=sys.stderr)


class _Handler(BaseHTTPRequestHandler):
    server: LoopbackServer
    timeout = 60  # seconds, for whoever connects and says nothing

    def do_GET(self) -> None:
        self.wfile.write(self._begin())

    def do_HEAD(self) -> None:
        self._begin()

    def _begin(self) -> bytes:
        """Sends status and headers; the content that belongs to them."""
        answer = self.server.answer(self.headers.get("Host", ""), self.path.partition("?")[0])
        known = bool(answer.tag) and self.headers.get("If-None-Match") == answer.tag
        content = b"" if known else (answer.page or f"{answer.message}\n").encode()
        self.send_response(HTTPStatus.NOT_MODIFIED if known else answer.status)
        self.send_header("Content-Type", f"text/{'html' if answer.page else 'plain'}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if answer.tag:
            self.send_header("ETag", answer.tag)
        self.end_headers()
        return content

    def log_message(self, *_: object) -> None:
        """Nothing for each request."""
