"""The report, the comparison and the live view in a browser, as wide as a desk and as a phone."""

from __future__ import annotations

import html
import itertools
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from synthetic_runs import MLP, PER_ELEMENT, cleaning_run, decays, make_run, resnet_shapes
from torch_hypergrad.experiment import view
from torch_hypergrad.experiment.loopback import Answer, LoopbackServer
from torch_hypergrad.experiment.report import write_report
from torch_hypergrad.experiment.view import pages_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (1280, 390)
LONG = "a_name_without_any_place_to_break_it_" * 3

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="needs chromium, chromium-browser or google-chrome on the PATH"
)

# A window cannot be as narrow as a phone; a frame can. What is measured becomes the text of the page around.
FRAMES = """<!doctype html><html><body><script>
const [name, widths] = %s;
const tables = (inside) => inside.querySelectorAll(".wide");
const read_in = (frame) => {  // as a reader does: opens what is folded, scrolls down, scrolls a table
  const inside = frame.contentDocument, headline = inside.querySelectorAll("h2")[1];
  inside.querySelectorAll("details").forEach((element) => { element.open = true; });
  tables(inside).forEach((element) => { element.scrollLeft = 50; });
  if (headline) frame.contentWindow.scrollTo(0, headline.offsetTop + 100);
};
const measured = (frame) => {
  const inside = frame.contentDocument, page = inside.scrollingElement;
  const boxed = (element) => element.closest(".wide, .card");
  const wider = [...inside.body.querySelectorAll("*")].filter((element) =>
    !boxed(element) && element.getBoundingClientRect().right > frame.contentWindow.innerWidth + 0.5);
  return {inner: frame.contentWindow.innerWidth, page: page.scrollWidth, height: page.scrollHeight,
    wider: wider.map((element) => `${element.tagName} ${element.className}`),
    images: [...inside.images].map((image) => Math.round(image.getBoundingClientRect().width)),
    headline: inside.querySelectorAll("h2")[1]?.getBoundingClientRect().top ?? 0,
    folded: inside.querySelectorAll("details:not([open])").length,
    aside: Math.max(0, ...[...tables(inside)].map((element) => element.scrollLeft)),
    bar: inside.getElementById("live")?.textContent ?? "", title: inside.title};
};
Promise.all(widths.map((width) => new Promise((resolve) => {
  const frame = document.createElement("iframe");
  frame.onload = () => { read_in(frame); setTimeout(() => resolve(measured(frame)), %d); };
  Object.assign(frame, {width, height: 800, src: name});
  document.body.append(frame);
}))).then((every) => { document.body.textContent = "measured " + JSON.stringify(every); });
</script></body></html>"""


def page_of(text: str) -> Callable[[], Answer]:
    return lambda: Answer(HTTPStatus.OK, "", text)


@pytest.fixture
def server() -> Iterator[LoopbackServer]:
    """One whose pages are those that a test puts there."""
    with LoopbackServer(0, {}) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def opened(
    server: LoopbackServer, pages: dict[str, Any], profile: Path, wait: int = 300
) -> tuple[list[dict[str, Any]], list[str]]:
    """What ``/`` measures at each width after so many milliseconds, and what the console had to say."""
    frames = FRAMES % (json.dumps(["/", WIDTHS]), wait)
    server.pages = {**pages, "/frames": page_of(frames)}
    assert BROWSER is not None
    asked = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--no-first-run",
    ]
    asked += [f"--user-data-dir={profile}", "--timeout=60000", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run(
        [*asked, f"{server.url}frames"], capture_output=True, encoding="utf-8", timeout=120, check=True
    )
    found = re.search(r"measured (\[.*\])", html.unescape(done.stdout))
    assert found, f"nothing was measured: {done.stdout[:500]} {done.stderr[-2000:]}"
    return json.loads(found[1]), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def check(measured: list[dict[str, Any]], console: list[str]) -> None:
    assert console == []
    assert [page["inner"] for page in measured] == list(WIDTHS)
    for page in measured:
        assert page["page"] <= page["inner"], page
        assert page["wider"] == []
        assert page["height"] > 800  # a whole page, whose boxes have something to hold


def test_what_is_too_wide_or_wrong_is_found(server: LoopbackServer, tmp_path: Path) -> None:
    page = '<title>bad</title><p style="width: 500px">wide</p><script>nothing.there()</script>'
    (desk, phone), console = opened(server, {"/": page_of(page)}, tmp_path / "profile")
    assert desk["page"] <= desk["inner"]
    assert phone["page"] > phone["inner"]
    assert phone["wider"] == ["P "]
    assert "nothing is not defined" in console[0]


def doubtful(count: int) -> dict[str, Any]:
    """Warnings that have no place to break a line at."""
    return {"warnings": {LONG: LONG}, "adjoint_growth": 3.0, "num_matvecs": list(range(count))}


RUNS = {
    "mlp": lambda folder: make_run(
        folder, *decays(MLP), tune=PER_ELEMENT, hyper=doubtful(20), skipped=(210,)
    ),
    "resnet": lambda folder: make_run(folder, *decays(resnet_shapes()), tune=PER_ELEMENT),
    "cleaning": cleaning_run,
    LONG: lambda folder: make_run(
        folder, *decays({f"{LONG}.weight": (3, 4)}), tune=PER_ELEMENT, finished=False
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_report_of_a_run(server: LoopbackServer, tmp_path: Path, name: str) -> None:
    page = write_report([RUNS[name](tmp_path / name)]).read_text(encoding="utf-8")
    measured, console = opened(server, {"/": page_of(page)}, tmp_path / "profile")
    check(measured, console)
    assert measured[0]["title"] == name
    desk, phone = (page["images"] for page in measured)
    assert desk
    assert min(desk) > 500
    assert all(narrow >= min(wide, 640) for narrow, wide in zip(phone, desk))  # or nobody could read them


def test_a_comparison(server: LoopbackServer, tmp_path: Path) -> None:
    runs = [
        make_run(
            tmp_path / row / f"seed-{seed}",
            accuracy=0.5 + 0.01 * place,
            num_hyper=0,
            config={"train": {"seed": seed, "batch_size": 10 + place}},
        )
        for place, row in enumerate(["none", "grid", LONG, *(f"row {place}" for place in range(9))])
        for seed in range(2)
    ]
    page = write_report(runs, tmp_path / "report").read_text(encoding="utf-8")
    check(*opened(server, {"/": page_of(page)}, tmp_path / "profile"))


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The browser's clock is virtual, and runs ahead: to the view, each look comes an hour after the last."""
    clock = SimpleNamespace(**vars(time))
    clock.monotonic = itertools.count(0, 3600).__next__
    monkeypatch.setattr(view, "time", clock)
    monkeypatch.setattr(view, "SHARE", 0.0)


@pytest.mark.usefixtures("hurried")
def test_the_live_view_renews_itself(server: LoopbackServer, tmp_path: Path) -> None:
    """The run goes on and ends after its page was first sent."""
    run = make_run(tmp_path / "run", *decays(MLP), tune=PER_ELEMENT)
    done = (run / "summary.json").rename(tmp_path / "summary.json")
    page, sent = pages_of([run], write_report, pause=0.5)["/"], []

    def and_it_ends() -> Answer:
        sent.append(page())
        if len(sent) == len(WIDTHS):
            done.rename(run / "summary.json")
        return sent[-1]

    measured, console = opened(server, {"/": and_it_ends}, tmp_path / "profile", wait=15_000)
    check(measured, console)
    assert "not finished" in sent[0].page
    assert [page["bar"] for page in measured] == ["Finished: this page will not change."] * len(WIDTHS)
    assert [page["folded"] for page in measured] == [0, 0]
    assert [page["headline"] for page in measured] == pytest.approx([-100, -100], abs=1)
    assert [page["aside"] for page in measured] == [0, 50]


@pytest.mark.usefixtures("hurried")
def test_the_live_view_of_a_folder_that_vanishes(server: LoopbackServer, tmp_path: Path) -> None:
    run = make_run(tmp_path / LONG, finished=False)
    page = pages_of([run], write_report, pause=0.5)["/"]
    first = page()
    run.rename(tmp_path / "away")
    answers = iter([first] * len(WIDTHS))
    measured, console = opened(
        server, {"/": lambda: next(answers, None) or page()}, tmp_path / "profile", wait=15_000
    )
    assert all("Failed to load resource" in line and "404" in line for line in console)
    check(measured, [])  # what came last is still there
    assert all("no such folder" in page["bar"] for page in measured)
