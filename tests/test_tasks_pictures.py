"""Pictures that are decoded on the way: the same numbers, in less memory."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from runs import SURROUNDINGS, metrics_of
from test_training_loop import configured, run
from torch_hypergrad.experiment.tasks import ImageClassification
from torch_hypergrad.experiment.tasks.pictures import Files


def pictures(root: Path, num: int, size: int) -> Path:
    """Two classes, told apart by their colour, of noisy pictures."""
    generator = np.random.default_rng(0)
    for label, name in enumerate(("blue", "red")):
        (root / name).mkdir(parents=True)
        for number in range(num // 2):
            pixels = generator.integers(0, 100, (size, size, 3), dtype=np.uint8)
            pixels[..., 2 - 2 * label] += 100
            Image.fromarray(pixels).save(root / name / f"{number}.png", compress_level=0)
    return root


ON_THE_WAY = """
task: {name: ImageClassification, data: image_folder, train_size: 30, val_size: 12, test_size: 10, \
label_noise: 0.2, augment: flip}
model: {name: CNN, width: 4}
optimizer: {name: SGD, lr: 0.05, momentum: 0.9}
tune: {weight_decay: {per: tensor, init: 1.0e-2, log: true}, example_weights: {}}
method: {name: Unrolled}
train: {steps: 20, batch_size: 7, hyper_every: 4, val_batch_size: 5, threads: 1}
output: {loggers: []}
"""


@pytest.mark.parametrize("part", ["train", "train_and_val"])
def test_pictures_decoded_on_the_way_train_bit_for_bit_as_in_memory(part: str, tmp_path: Path) -> None:
    root, runs = pictures(tmp_path / "pictures", 60, 16), []
    plain = {"method": None, "tune": {}, "train": {"part": part, "hyper_every": None}}
    for in_memory in (False, True):
        folder = tmp_path / str(in_memory)
        folder.mkdir()
        text = ON_THE_WAY.replace("image_folder,", f"image_folder, root: {root}, in_memory: {in_memory},")
        if part != "train":
            text = re.sub(r"tune: .*\n", "tune: {}\n", text)
        config = configured(text, folder, **({} if part == "train" else {**plain, "tune": {}}))
        runs.append(run(config, folder))
    assert metrics_of(runs[0]) == metrics_of(runs[1])
    weights = [torch.load(each / "model.pt", weights_only=True) for each in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_batch_that_was_prepared_is_decoded_once_and_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, read = pictures(tmp_path / "pictures", 40, 8), []
    task = ImageClassification(
        "image_folder", str(root), in_memory=False, train_size=20, val_size=10, test_size=10
    )
    train = task.load(seed=0).train
    decode = Files.read
    monkeypatch.setattr(Files, "read", lambda files, rows: read.append(len(rows)) or decode(files, rows))
    rows = torch.tensor([3, 1, 4])
    train.prepare(rows)
    first = train.take(rows).inputs
    assert read == [3]  # ahead, and not again
    assert torch.equal(train.take(rows.flip(0)).inputs, first.flip(0))
    assert torch.equal(train.take(rows).inputs, first)
    assert read == [3, 3]  # both are kept
    monkeypatch.setattr("torch_hypergrad.experiment.tasks.pictures.MOST_KEPT", 5 * 3 * 8 * 8)
    train.prepare(torch.tensor([0]))
    train.prepare(torch.tensor([5, 6]))
    assert torch.equal(train.take(rows).inputs, first)
    assert read == [3, 3, 1, 2, 3]  # the oldest went


MEMORY = """
import sys
import psutil, torch
from torch_hypergrad.experiment.tasks import ImageClassification, pictures
pictures.MOST_KEPT = 10**7
torch.set_num_threads(1)
def peak(num):
    task = ImageClassification("image_folder", sys.argv[1], in_memory=False,
                               train_size=num, val_size=20, test_size=20)
    train, highest = task.load(seed=0).train, 0
    for batch in torch.arange(num).split(10):
        train.prepare(batch)
        train.take(batch)
        highest = max(highest, psutil.Process().memory_info().rss)
    return highest
first = peak(20)
print(peak(200) - first)
"""


@pytest.mark.slow
def test_pictures_decoded_on_the_way_take_the_memory_of_some_batches(tmp_path: Path) -> None:
    """200 pictures of 300 KB, 61 MB in all, beside 20 of them, in batches of 10, of which three are kept."""
    root = pictures(tmp_path / "pictures", 240, 320)
    words = [sys.executable, "-c", MEMORY, str(root)]
    exact = {**SURROUNDINGS, "MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives back what is freed
    done = subprocess.run(words, capture_output=True, text=True, env=exact, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 10e6
