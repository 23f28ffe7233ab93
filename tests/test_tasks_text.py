"""Text by bytes, against plain slicing; files larger than memory."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F

from runs import check_equal_runs
from test_resume import StopAfter
from test_training_loop import configured, run, summary_of
from torch_hypergrad import load_run
from torch_hypergrad.cli import main
from torch_hypergrad.experiment.build import build
from torch_hypergrad.experiment.config import ConfigError
from torch_hypergrad.experiment.networks import ByteMLP
from torch_hypergrad.experiment.report import table_of, write_report
from torch_hypergrad.experiment.run_folder import RunFolder
from torch_hypergrad.experiment.start import run_in
from torch_hypergrad.experiment.stopping import StopRequest
from torch_hypergrad.experiment.tasks import Examples, TextBytes

WORDS = ("the cat sat on the mat. ", "a dog ran to the hill; ", "one two three four, ")


def some_text(num: int, seed: int = 0) -> bytes:
    chosen = np.random.default_rng(seed).integers(0, len(WORDS), num)
    return "".join(WORDS[place] for place in chosen).encode()[:num]


def windows_of(examples: Examples) -> list[bytes]:
    """Contexts with their next bytes."""
    inputs, targets = examples.take(torch.arange(len(examples)))
    return [bytes(row) for row in torch.cat([inputs, targets[:, None]], 1).tolist()]


def refused(files: object, *words: str, **keys: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        TextBytes(files, **keys).load(seed=0)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


# ---- windows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [1, 3, 7])
@pytest.mark.parametrize("train_size", [None, 20])
def test_windows_are_slices_of_the_files_put_together(
    context: int, train_size: int | None, tmp_path: Path
) -> None:
    """Of files so short that a context reaches over several of them."""
    generator, whole = np.random.default_rng(context), b""
    for number, length in enumerate((0, 1, 9, 2, 1, 0, 60, 5, 33)):
        content = generator.integers(0, 256, length, dtype=np.uint8).tobytes()
        (tmp_path / f"{number}.bin").write_bytes(content)
        whole += content
    task = TextBytes(str(tmp_path), context, train_size, val_size=12, test_size=9)
    split = task.load(seed=0)
    test = whole[-9 - context :]
    val = whole[-9 - context - 12 - context : -9 - context]
    train = whole[: len(whole) - len(test) - len(val)][: None if train_size is None else train_size + context]
    for part, content in (("train", train), ("val", val), ("test", test)):
        expected = [content[place : place + context + 1] for place in range(len(content) - context)]
        assert windows_of(getattr(split, part)) == expected
    assert [len(split.val), len(split.test)] == [12, 9]
    assert train_size in (None, len(split.train))


def test_rows_come_in_any_order_and_as_often_as_asked(tmp_path: Path) -> None:
    content = bytes(range(200))
    (tmp_path / "a").write_bytes(content[:90])
    (tmp_path / "b").write_bytes(content[90:])
    train = TextBytes([str(tmp_path / "a"), str(tmp_path / "b")], 4, None, 10, 10).load(seed=0).train
    inputs, targets = train.take(torch.tensor([88, 3, 88, 0, 150]))
    assert targets.tolist() == [92, 7, 92, 4, 154]
    assert inputs.tolist() == [list(range(row, row + 4)) for row in (88, 3, 88, 0, 150)]
    assert inputs.dtype == targets.dtype == torch.int64
    assert len(train.take(torch.arange(0)).targets) == 0


def test_no_byte_is_in_two_sets(tmp_path: Path) -> None:
    context, sizes = 5, {"train": 40, "val": 30, "test": 20}
    content = b"".join(
        bytes([mark]) * (sizes[part] + context)
        for mark, part in zip(b"\x01\x02\x03", ("train", "val", "test"))
    )
    (tmp_path / "t").write_bytes(content)
    split = TextBytes(str(tmp_path / "t"), context, None, val_size=30, test_size=20).load(seed=0)
    for mark, part in zip((1, 2, 3), sizes):
        assert set(windows_of(getattr(split, part))) == {bytes([mark]) * 6}
        assert len(getattr(split, part)) == sizes[part]


def test_files_by_pattern_and_list_are_in_their_order(tmp_path: Path) -> None:
    for name, content in (("b.txt", b"bbbb"), ("a.txt", b"aaaa"), ("c.md", b"cccc")):
        (tmp_path / name).write_bytes(content * 10)
    (tmp_path / "folder").mkdir()
    files = [str(tmp_path / "c.md"), str(tmp_path / "*.txt")]
    train = TextBytes(files, 1, None, val_size=1, test_size=1).load(seed=0).train
    assert bytes(train.take(torch.tensor([0, 38, 39, 78, 79])).targets.tolist()) == b"ccaab"


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "short").write_bytes(b"x" * 50)
    (tmp_path / "empty").write_bytes(b"")
    refused(str(tmp_path / "nothing"), "task.files", "nothing", "is no file")
    refused(str(tmp_path / "*.md"), "no pattern that finds some")
    refused(str(tmp_path / "folder"), "no folder with files")
    refused([str(tmp_path), str(tmp_path / "sho*")], "short is there twice")
    refused(str(tmp_path / "empty"), "0 bytes in 0 files", val_size=1, test_size=1)
    short = str(tmp_path / "short")
    refused(short, "50 bytes in 1 files", "context of 16", val_size=1, test_size=1)
    refused(
        short, "6 training, 20 validation and 10 test", context=5, train_size=6, val_size=20, test_size=10
    )
    assert len(TextBytes(short, 5, 5, val_size=20, test_size=10).load(0).train) == 5
    for key in ("context", "train_size", "val_size", "test_size"):
        refused(short, f"task.{key}: got 0, expected at least 1", **{key: 0})


def test_a_file_that_shrinks_is_named_and_ends_nothing(tmp_path: Path) -> None:
    """Whoever reads a mapped file past its end is killed by the system."""
    file = tmp_path / "t"
    file.write_bytes(some_text(100_000))
    split = TextBytes(str(file), 4, None, 100, 100).load(seed=0)
    split.train.take(torch.tensor([90_000]))
    os.truncate(file, 1000)
    with pytest.raises(ConfigError, match=r"t has shrunk from 100,000 to 1,000 bytes. Restore it."):
        split.train.take(torch.tensor([90_000]))
    file.unlink()
    with pytest.raises(ConfigError, match="t cannot be read: No such file"):
        split.train.take(torch.tensor([0]))


class Shrinking(StopRequest):
    """Never stops a run, but cuts its file off."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file, self.steps = file, 0

    @property
    def requested(self) -> bool:
        self.steps += 1
        if self.steps == 15:
            os.truncate(self.file, 100)
        return False


@pytest.mark.parametrize("method", ["Implicit", "Unrolled"])
def test_a_file_that_shrinks_while_it_is_trained_on_ends_the_run_in_one_line(
    method: str, tmp_path: Path
) -> None:
    (tmp_path / "t").write_bytes(some_text(2000))
    task = {"name": "TextBytes", "files": str(tmp_path / "t"), "val_size": 300, "test_size": 300}
    solver = {"solver": {"name": "Neumann", "num_terms": 3}} if method == "Implicit" else {}
    config = configured(TEXT, tmp_path, task=task, method={"name": method, **solver})
    with pytest.raises(ConfigError, match="t has shrunk from 2,000 to 100 bytes") as caught:
        run_in(config, RunFolder(tmp_path / "run"), Shrinking(tmp_path / "t"), quiet=True)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "truncate") or os.name == "nt", reason="needs sparse files")
def test_a_file_of_3_gb_stays_out_of_memory(tmp_path: Path) -> None:
    size = 3_000_000_000
    with (tmp_path / "large").open("wb") as file:
        file.truncate(size - 1)
        file.seek(size - 1)
        file.write(b"!")
    process = psutil.Process()
    before = process.memory_info().rss
    split = TextBytes(str(tmp_path / "large"), 16).load(seed=0)
    rows = torch.randint(len(split.train), (3, 32), generator=torch.Generator().manual_seed(0))
    assert not any(split.train.take(some).inputs.any() for some in rows)
    assert split.test.take(torch.tensor([len(split.test) - 1])).targets.item() == ord("!")
    assert process.memory_info().rss - before < 50e6
    assert len(split.train) == size - 20_000 - 3 * 16


def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="there is no limit here")
    for number in range(600):
        (tmp_path / f"{number:03}").write_bytes(b"%03d" % number)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        train = TextBytes(str(tmp_path), 2, None, 100, 100).load(seed=0).train
        targets = train.take(torch.arange(len(train))).targets
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert bytes(targets.tolist()[:6]).decode() == "000001002"[2:8]


# ---- numbers -----------------------------------------------------------------------------------------------


def test_a_network_that_knows_nothing_takes_8_bits(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(some_text(500))
    task = {"name": "TextBytes", "files": str(tmp_path / "t"), "context": 3, "val_size": 50, "test_size": 50}
    parts = build(configured(TEXT, tmp_path, task=task))
    for param in parts.model.parameters():
        param.data.zero_()
    found = parts.objective.evaluate(parts.model, parts.split.val)
    assert found["bits per byte"] == pytest.approx(8, rel=1e-6)
    assert found["loss"] == pytest.approx(math.log(256), rel=1e-6)


TEXT = """
task: {name: TextBytes, files: FILE, context: 6, train_size: 4000, val_size: 600, test_size: 500}
model: {name: ByteMLP, embedding: 6, hidden: 16}
optimizer: {name: Adam, lr: 0.01, eps: 1.0e-4}
tune: {weight_decay: {per: element, init: 1.0e-3, log: true}}
method: {name: Implicit, solver: {name: Neumann, num_terms: 3, damping: 1.0}}
train: {steps: 60, batch_size: 64, warmup: 20, hyper_every: 10, val_batch_size: 100, threads: 1}
output: {loggers: [], checkpoint_every: 13}
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "t.txt").write_bytes(some_text(6000))
    task = {"name": "TextBytes", "files": [str(folder / "t.txt")], "context": 6, "train_size": 4000}
    return run(configured(TEXT, folder, task={**task, "val_size": 600, "test_size": 500}), folder)


def test_bits_per_byte_are_those_of_the_saved_network(text: Path) -> None:
    content = torch.tensor(list((text.parent / "t.txt").read_bytes()[-506:]))
    windows = content.unfold(0, 7, 1)
    weights = torch.load(text / "model.pt", weights_only=True)
    embedded = weights["embedding.weight"][windows[:, :6]].flatten(1)
    units = (embedded @ weights["hidden.weight"].T + weights["hidden.bias"]).tanh()
    logits = units @ weights["out.weight"].T + weights["out.bias"]
    loss = F.cross_entropy(logits.double(), windows[:, 6]).item()
    result = summary_of(text)["test"]
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["bits per byte"] == pytest.approx(loss / math.log(2), rel=1e-5)
    assert result["bits per byte"] < 6  # it learned something
    assert result["next byte"] == (logits.argmax(1) == windows[:, 6]).double().mean().item()


def test_the_report_speaks_of_bytes(text: Path) -> None:
    page = write_report([text]).read_text()
    told = re.sub(r"data:image[^\"]*|<style.*?</style>|<img[^>]*>", "", page, flags=re.DOTALL)
    assert "4,000 training, 600 validation and 500 test bytes" in told
    assert "test bits per byte" in told
    assert "Learned weight decay of hidden.weight by how many bytes back" in told
    assert not re.search(r"accuracy|image", told, flags=re.IGNORECASE)


def test_only_the_layer_that_sees_places_is_drawn_by_place() -> None:
    """The last layer and the embedding have as many inputs as would fit."""
    task = TextBytes("none", context=4)
    network = ByteMLP((4,), 256, embedding=8, hidden=16)
    values = {f"weight_decay/{name}": torch.ones(p.shape) for name, p in network.named_parameters()}
    found = task.figures(network, None, {**values, "lr/hidden.weight": torch.tensor(1.0)})  # type: ignore[arg-type]
    assert list(found) == ["Learned weight decay of hidden.weight by how many bytes back, geometric means."]


def test_a_stopped_run_of_a_text_ends_bit_for_bit_the_same(text: Path, tmp_path: Path) -> None:
    config = configured((text.parent / "given.yaml").read_text(), tmp_path)
    assert not run_in(config, RunFolder(tmp_path / "run"), StopAfter(33), quiet=True)
    assert run_in(config, RunFolder(tmp_path / "run"), StopAfter(10_000), quiet=True)
    check_equal_runs(tmp_path / "run", text)


def test_files_are_told_their_bits_per_byte(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = some_text(3000, seed=5)  # more than are predicted at a time
    (tmp_path / "new.txt").write_bytes(content)
    assert main(["predict", str(text), str(tmp_path / "new.txt")]) == 0
    file, bits, said = capsys.readouterr().out.rstrip("\n").split("\t")
    model = load_run(text)
    windows = torch.tensor(list(content)).unfold(0, 7, 1)
    with torch.no_grad():
        loss = F.cross_entropy(model(windows[:, :6]), windows[:, 6]).item()
    assert file == str(tmp_path / "new.txt")
    assert bits == f"{loss / math.log(2):.3f} bits per byte"
    assert len(said) > 60
    second = TextBytes("none", context=6)
    second.restore(json.loads(json.dumps(model.task.state())))
    assert second.predict(model.network, [tmp_path / "new.txt"])[0] == (file, bits, said)


def test_text_that_is_too_short_for_the_run_is_refused(text: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"123456")
    with pytest.raises(ConfigError, match="short has 6 bytes, and the network looks back on 6"):
        load_run(text).predict([tmp_path / "short"])
    with pytest.raises(ConfigError, match="nothing cannot be read: No such file"):
        load_run(text).predict([tmp_path / "nothing"])
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_run(text).predict([tmp_path])


def test_a_network_for_numbers_is_refused_for_bytes(text: Path, tmp_path: Path) -> None:
    config = configured((text.parent / "given.yaml").read_text(), tmp_path, model={"name": "Linear"})
    with pytest.raises(ConfigError, match=r"^model: the network, on inputs of TextBytes, failed \(.*\)\.$"):
        build(config)


def test_runs_are_compared_by_bits_and_the_lower_wins(text: Path, tmp_path: Path) -> None:
    given = (text.parent / "given.yaml").read_text()
    short = configured(given, tmp_path, train={"steps": 30})
    folders = [run(short, tmp_path).rename(tmp_path / "short"), text]
    bad, better = (summary_of(folder)["test"]["bits per byte"] for folder in folders)
    assert better < bad
    assert "test bits per byte" in table_of(folders).splitlines()[0]
    page = write_report(folders, tmp_path / "report").read_text()
    told = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    assert f"{better:.3f} best test bits per byte: run, with a test loss" in told


def test_compare_runs_a_text_from_the_command_line(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(text.parent / "given.yaml"), "--output.folder", str(tmp_path / "all"), "--seeds", "1"]
    quick = ["--train.steps", "30", "--compare.grid_points", "2", "--task.train_size", "300"]
    assert main(["compare", "--config", *given, *quick]) == 0
    header, _, *rows = (line for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
    assert "test bits per byte" in header
    assert len(rows) >= 4
    page = (tmp_path / "all" / "report" / "report.html").read_text()
    assert "best test bits per byte" in page
