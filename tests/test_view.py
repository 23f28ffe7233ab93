"""The live view: it renews itself, says how things stand, and shows nothing to anybody else."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from runs import PLAIN, SURROUNDINGS, command
from synthetic_runs import make_run
from torch_hypergrad.cli import main
from torch_hypergrad.experiment import view
from torch_hypergrad.experiment.config import ConfigError
from torch_hypergrad.experiment.loopback import LoopbackServer
from torch_hypergrad.experiment.report import style, write_report
from torch_hypergrad.experiment.run_folder import RunFolder
from torch_hypergrad.experiment.view import LivePage, pages_of

NEVER = 3600.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer pixels, and no time that is left to training."""
    monkeypatch.setattr(style, "DPI", 50)
    monkeypatch.setattr(view, "SHARE", 0.0)


@contextmanager
def served(*folders: Path, pause: float = 0.0) -> Iterator[LoopbackServer]:
    with LoopbackServer(0, pages_of(folders, write_report, pause)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def asked(
    server: LoopbackServer, name: str = "/", method: str = "GET", **headers: str
) -> tuple[int, str, dict[str, str]]:
    """Status, text and headers, of a path that is sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, name, headers={key.replace("_", "-"): value for key, value in headers.items()})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text, dict(answer.getheaders())


def bar_of(page: str) -> tuple[str, str]:
    """State and words of the line that the live view adds."""
    found = re.search(r'<p id="live" role="status" data-state="(\w+)" data-tag="[^>]*>([^<]*)</p>', page)
    assert found
    return found[1], found[2]


def evaluated(run: Path, step: int, accuracy: float) -> None:
    part = {"loss": 0.5, "accuracy": accuracy}
    line = {"kind": "eval", "step": step, "seconds": 1.0, "train": part, "val": part}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def finish(run: Path) -> None:
    part = {"loss": 0.25, "accuracy": 0.875}
    summary = {"steps": 700, "test": part, "val": part, "train": part, "seconds": 2.0, "cost": 700}
    summary |= {"num_hyper_steps": 0, "num_skipped": 0, "num_parameters": 1, "num_values": 0}
    (run / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """One that is in training: this process has its lock."""
    with RunFolder(make_run(tmp_path / "run", num_hyper=0, finished=False)).locked():
        yield tmp_path / "run"


# ---- what it shows -----------------------------------------------------------------------------------------


def test_a_run_that_goes_on_is_shown_as_it_goes_on(run: Path) -> None:
    with served(run) as server:
        assert server.url == f"http://127.0.0.1:{server.server_port}/"
        with urlopen(server.url) as answer:
            first, tag = answer.read().decode(), answer.headers["ETag"]
        assert "500 training steps so far" in first
        assert bar_of(first)[0] == "training"
        again = asked(server, If_None_Match=tag)
        assert (again[0], again[1]) == (304, "")
        evaluated(run, 600, 0.625)
        status, second, headers = asked(server, If_None_Match=tag)
        assert (status, headers["ETag"] == tag) == (200, False)
        assert "600 training steps so far" in second
        assert "62.5" in second
        finish(run)
        third = asked(server)[1]
        assert bar_of(third) == ("finished", "Finished: this page will not change.")
        assert "87.5 %" in third


def test_half_a_line_is_counted_and_then_read(run: Path) -> None:
    whole = json.dumps({"kind": "train", "step": 777, "loss": 1.0})
    with served(run) as server, (run / "metrics.jsonl").open("a") as file:
        file.write(whole[:20])
        file.flush()
        assert "1 line of metrics.jsonl could not be read" in asked(server)[1]
        file.write(whole[20:] + "\n")
        file.flush()
        page = asked(server)[1]
    assert "could not be read" not in page
    assert "777 training steps so far" in page


def test_it_is_drawn_only_when_there_is_news_and_not_too_often(run: Path) -> None:
    drawn: list[float] = []

    def write(folders: object, out: Path) -> Path:
        drawn.append(time.monotonic())
        (out / "report.html").write_text(f"<body>{len(drawn)}</body>")
        return out / "report.html"

    often, seldom = LivePage([run], write, {}, pause=0.0), LivePage([run], write, {}, pause=NEVER)
    for page in (often, often, seldom, seldom):
        page()
    assert len(drawn) == 2
    evaluated(run, 600, 0.5)
    assert seldom().page.startswith("<body>2")
    assert often().page.startswith("<body>3")


def test_most_of_the_time_is_left_to_training(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drawing that took some time is not repeated for a multiple of it, however short the pause."""
    monkeypatch.setattr(view, "SHARE", 1e4)
    drawn: list[None] = []

    def write(folders: object, out: Path) -> Path:
        drawn.append(time.sleep(0.01))
        (out / "report.html").write_text("<body></body>")
        return out / "report.html"

    page = LivePage([run], write, {}, pause=0.0)
    page()
    evaluated(run, 600, 0.5)
    page()
    assert len(drawn) == 1
    finish(run)  # and there is no more training
    page()
    assert len(drawn) == 2


def test_the_folder_of_the_run_is_only_read(run: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    os.utime(run, ns=(1, 1))
    run.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with served(run) as server:
            assert asked(server)[0] == 200
    finally:
        run.chmod(stat.S_IRWXU)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert run.stat().st_mtime_ns == 1


def test_no_folder_is_left_behind(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    with served(run) as server:
        assert asked(server)[0] == 200
    assert not list((tmp_path / "tmp").iterdir())


def test_a_report_that_is_kept_has_no_script(run: Path) -> None:
    page = write_report([run])
    assert "<script" not in page.read_text()
    with served(run) as server:
        assert asked(server)[1].count("<script") == 1


def test_several_runs_are_compared_and_lead_to_each(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "a & b'", num_hyper=0)
    write_report([other])
    with served(run, other) as server:
        page = asked(server)[1]
        assert "2 runs in 2 rows" in page or "2 runs in 1 row" in page
        assert bar_of(page)[1].startswith("1 of 2 runs finished. ")
        assert 'href="/2"' in page
        assert "report.html" not in page
        assert "<h1>a &amp; b&#39;</h1>" in asked(server, "/2")[1]
        assert bar_of(asked(server, "/2")[1])[0] == "finished"


def test_a_run_that_was_killed_is_not_live(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(PLAIN)
    run, other = tmp_path / "run", make_run(tmp_path / "other", num_hyper=0)
    write_report([other])
    train = command("train", "--config", tmp_path / "c.yaml", "--output.folder", run, "--train.steps=100000")
    process = subprocess.Popen(train, stderr=subprocess.DEVNULL, env=SURROUNDINGS)
    try:
        while not (run / "metrics.jsonl").is_file() or b"eval" not in (run / "metrics.jsonl").read_bytes():
            assert process.poll() is None
            time.sleep(0.05)
        with served(run) as one, served(run, other) as both:
            assert bar_of(asked(one)[1])[0] == bar_of(asked(both)[1])[0] == "training"
            process.kill()
            process.wait()
            state, told = bar_of(asked(one)[1])
            assert state == "interrupted"
            assert re.fullmatch(
                rf"Interrupted: last written .+. Go on with: torch-hypergrad resume {run}", told
            )
            assert bar_of(asked(both)[1])[1].startswith("1 of 2 runs finished, 1 interrupted. Interrupted: ")
            with RunFolder(run).locked():  # as one that goes on
                assert bar_of(asked(one)[1])[0] == "training"
    finally:
        process.kill()
        process.wait()


# ---- what goes wrong ---------------------------------------------------------------------------------------


def test_a_folder_that_vanishes_and_comes_back(run: Path, tmp_path: Path) -> None:
    with served(run) as server:
        assert asked(server)[0] == 200
        run.rename(tmp_path / "away")
        status, page, _ = asked(server)
        assert status == 404
        assert "no such folder" in page
        assert bar_of(page)[0] == "failed"
        (tmp_path / "away").rename(run)
        assert asked(server)[0] == 200


def test_a_drawing_that_fails_is_a_page_and_is_tried_again(run: Path) -> None:
    broken = [True]

    def write(folders: list[Path], out: Path) -> Path:
        if broken.pop():
            raise OSError(28, "No space <left> on device")
        return write_report(folders, out)

    page = LivePage([run], write, {}, pause=0.0)
    failed = page()
    assert failed.status == 500
    assert "No space &lt;left&gt; on device" in failed.page
    broken.append(False)
    assert page().status == 200


def test_a_folder_that_holds_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["view", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "holds no config.yaml" in error


def test_a_configuration_that_cannot_be_read_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "config.yaml").write_text("a: [1")
    assert main(["view", str(run), "--port=0"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "expected YAML" in error


def test_a_port_that_is_taken_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["view", str(run), f"--port={port}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"Port {port} of 127.0.0.1 cannot be used: Address already in use" in error


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none_is_refused(port: int) -> None:
    with pytest.raises(ConfigError, match="from 0 to 65535"):
        LoopbackServer(port, {})


@pytest.fixture
def _ctrl_c_is_heard() -> Iterator[None]:
    """Whatever a script starts in the background ignores Ctrl-C, and so would the processes of a test."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_is_heard")
def test_ctrl_c_ends_it(run: Path) -> None:
    process = subprocess.Popen(
        command("view", run, "--port", 0),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=SURROUNDINGS,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[0]
        with urlopen(url, timeout=120) as answer:
            assert "500 training steps so far" in answer.read().decode()
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out, error) == (0, "The view is closed.\n", "")


# ---- who may see it ----------------------------------------------------------------------------------------


def test_it_listens_on_the_loopback_address_alone(run: Path) -> None:
    with served(run) as server:
        assert server.socket.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "name",
    [
        "/config.yaml",
        "/../config.yaml",
        "/..%2fconfig.yaml",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/etc/passwd",
        "/./",
        "/1",
        "/report.html/../../metrics.jsonl",
        "*",
        "http://127.0.0.1/",
    ],
)
def test_no_path_leads_to_a_file(run: Path, name: str) -> None:
    with served(run) as server:
        status, text, _ = asked(server, name)
    assert (status, text) == (404, f"There is nothing here; see {server.url}\n")


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "evil.example:80", "192.168.0.1", "localhost@evil", ""]
)
def test_another_host_is_refused(run: Path, host: str) -> None:
    with served(run) as server:
        status, text, _ = asked(server, Host=host)
    assert (status, text) == (403, f"This is for {server.url} alone.\n")


@pytest.mark.parametrize("host", ["localhost:1234", "127.0.0.1", "[::1]:80", "LOCALHOST"])
def test_our_own_names_may_come_through_a_tunnel(run: Path, host: str) -> None:
    with served(run) as server:
        assert asked(server, Host=host)[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_but_get_and_head(run: Path, method: str) -> None:
    with served(run) as server:
        status, text, _ = asked(server, method=method)
    assert status == 501
    assert "training steps" not in text


def test_head_sends_no_content(run: Path) -> None:
    with served(run) as server:
        with urlopen(Request(server.url, method="HEAD")) as answer:
            assert answer.read() == b""
            length = int(answer.headers["Content-Length"])
        assert length == len(asked(server)[1].encode())


def test_a_browser_that_goes_away_is_no_news(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with served(run) as server:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", server.server_port)) as gone:
                gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # resets
                gone.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert asked(server)[0] == 200
    assert capfd.readouterr() == ("", "")


def test_the_view_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["view", "--help"])
    assert stopped.value.code == 0
    assert "view RUN_DIR [RUN_DIR ...] [--port N]" in capsys.readouterr().out
