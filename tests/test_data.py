"""The splits (hypothesis chooses the sizes), the label noise,
and every dataset from small files made here."""

import hashlib
import pickle
import re
from unittest.mock import patch
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10

from image_data import Data, Images, images_of, load_images
from torch_hypergrad.experiment.config import ConfigError
from torch_hypergrad.experiment.tasks import ImageClassification, images
from torch_hypergrad.experiment.tasks.pictures import Decoded, Source


def refused(options, *parts):
    """Loads, and finds all parts in the one line of the error."""
    with pytest.raises(ConfigError) as caught:
        load_images(**options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def same(first: Data, second: Data) -> bool:
    sets = ("train", "val", "test")
    pairs = [(getattr(getattr(d, s), f) for d in (first, second)) for s in sets for f in ("images", "labels")]
    return all(torch.equal(*pair) for pair in pairs) and torch.equal(first.wrong, second.wrong)


# ---- splits ------------------------------------------------------------------------------------------------


def numbered(num, first, num_classes):
    """Images that show their own number, in two pixels, of the class number modulo num_classes."""
    numbers = torch.arange(first, first + num)
    shown = torch.stack([numbers // 256, numbers % 256], 1).to(torch.uint8).view(num, 1, 1, 2)
    return Decoded(shown, numbers % num_classes)


def numbers_of(images: Images) -> list[int]:
    pixels = images.images.flatten(1).long()
    return (pixels[:, 0] * 256 + pixels[:, 1]).tolist()


def load_numbered(num, num_own, num_classes, options, seed=0):
    own = numbered(num_own, num, num_classes) if num_own else None
    source = Source(numbered(num, 0, num_classes), own, tuple(map(str, range(num_classes))))
    with patch.object(images, "read_source", lambda _: source):
        return load_images(seed, **options)


def expected_sizes(num, num_own, train_size, val_size, test_size):
    """Of the training and the test set, or None where they do not fit."""
    if num_own:
        train = num - val_size if train_size is None else train_size
        test = num_own if test_size is None else test_size
        return (train, test) if train >= 1 and train + val_size <= num and test <= num_own else None
    if train_size is None:
        test = max(num // 5, 1) if test_size is None else test_size
        train = num - val_size - test
    else:
        train = train_size
        test = num - val_size - train if test_size is None else test_size
    return (train, test) if min(train, test) >= 1 and train + test + val_size <= num else None


sizes = st.none() | st.integers(1, 25)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(0, 20),
    st.integers(2, 5),
    st.fixed_dictionaries({"train_size": sizes, "val_size": st.integers(1, 25), "test_size": sizes}),
    st.sampled_from(["train", "val", "train_and_val"]),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 2**40),
)
def test_sets_never_overlap_and_have_the_sizes_asked_for(num, num_own, num_classes, asked, part, noise, seed):
    expected = expected_sizes(num, num_own, **asked)
    options = {**asked, "part": part, "label_noise": noise}
    if expected is None:
        with pytest.raises(ConfigError, match="images"):
            load_numbered(num, num_own, num_classes, options, seed)
        return
    loaded = load_numbered(num, num_own, num_classes, options, seed)
    train, val, test = (numbers_of(each) for each in (loaded.train, loaded.val, loaded.test))
    assert len(val) == asked["val_size"]
    assert len(test) == expected[1]
    assert len(set(val + test)) == len(val + test)
    assert all((number >= num) == bool(num_own) for number in test)
    own = {"train": train, "val": [], "train_and_val": train[: expected[0]]}[part]
    assert train == {"train": own, "val": val, "train_and_val": own + val}[part]
    assert len(set(own + val + test)) == len(own + val + test)
    assert len(own) == (0 if part == "val" else expected[0])
    assert loaded.wrong.sum() == round(noise * len(own))
    assert not loaded.wrong[len(own) :].any()
    right = Images(loaded.train.images[~loaded.wrong], loaded.train.labels[~loaded.wrong])
    for each in (loaded.val, loaded.test, right):
        assert each.labels.tolist() == [number % num_classes for number in numbers_of(each)]
    wrong = Images(loaded.train.images[loaded.wrong], loaded.train.labels[loaded.wrong])
    for number, label in zip(numbers_of(wrong), wrong.labels.tolist()):
        assert label != number % num_classes
        assert 0 <= label < num_classes


def test_wrong_classes_are_drawn_uniformly():
    loaded = load_numbered(6000, 0, 4, {"val_size": 10, "label_noise": 0.9})
    right = torch.tensor(numbers_of(loaded.train)) % 4
    shifts = (loaded.train.labels - right)[loaded.wrong] % 4
    counts = shifts.bincount(minlength=4)
    assert counts[0] == 0
    expected = len(shifts) / 3
    # Standard deviation of a count is sqrt(n p (1 - p)), about 31 here.
    assert (counts[1:] - expected).abs().max() < 4 * (expected * 2 / 3) ** 0.5


def test_a_seed_gives_the_same_data_and_another_seed_another_split():
    options = {"train_size": 100, "val_size": 50, "label_noise": 0.3}
    torch.manual_seed(1)
    first = load_images(3, **options)
    state = torch.get_rng_state()
    assert same(first, load_images(3, **options))
    assert torch.equal(torch.get_rng_state(), state)  # it draws from its own generator
    other = load_images(4, **options)
    assert not torch.equal(first.val.images, other.val.images)


def test_the_split_does_not_depend_on_label_noise_nor_the_held_out_images_on_train_size():
    clean, noisy = (load_images(train_size=100, val_size=50, label_noise=noise) for noise in (0.0, 0.5))
    assert torch.equal(clean.train.images, noisy.train.images)
    assert torch.equal(clean.val.images, noisy.val.images)
    assert torch.equal(clean.test.images, noisy.test.images)
    few, many = (load_images(train_size=size, val_size=50, test_size=300) for size in (10, 900))
    assert torch.equal(few.val.images, many.val.images)
    assert torch.equal(few.test.images, many.test.images)
    assert torch.equal(few.train.images, many.train.images[:10])


def test_rows_and_devices():
    task = ImageClassification(train_size=30, val_size=20, label_noise=0.1)
    split = task.load(0)
    rows = torch.tensor([3, 1, 3])
    everything = images_of(split.train)
    assert torch.equal(split.train.take(rows).inputs, everything.images[rows])
    assert torch.equal(split.train.take(rows).targets, everything.labels[rows])
    moved = split.to("meta")
    assert {moved.train.inputs.device.type, moved.wrong.device.type} == {"meta"}
    both = split.part("train_and_val").train
    mixed = torch.tensor([35, 2, 49, 0, 30])
    joined = torch.cat([everything.images, images_of(split.val).images])
    assert torch.equal(both.take(mixed).inputs, joined[mixed])


def test_mean_and_std_are_those_of_the_training_images():
    loaded = load_images(train_size=150, val_size=20)
    pixels = loaded.train.images.double() / 255
    assert loaded.mean.item() == pytest.approx(pixels.mean().item(), rel=1e-6)
    assert loaded.std.item() == pytest.approx(pixels.std(correction=0).item(), rel=1e-6)


def test_a_constant_channel_has_std_one(tmp_path):
    write_pictures(tmp_path, {"a": 5, "b": 5}, color=lambda number: (10 * number, 7, 0))
    loaded = load_images(data="image_folder", root=str(tmp_path), val_size=2)
    assert loaded.std[0] > 0
    assert loaded.std[1:].tolist() == [1, 1]
    assert loaded.mean[1:].tolist() == pytest.approx([7 / 255, 0])


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"val_size": 0}, ["task.val_size: got 0", "at least 1"]),
        ({"train_size": 0}, ["task.train_size: got 0"]),
        ({"test_size": -3}, ["task.test_size: got -3"]),
        ({"label_noise": 1.0}, ["task.label_noise: got 1.0"]),
        ({"label_noise": -0.1}, ["task.label_noise: got -0.1"]),
        ({"label_noise": float("nan")}, ["task.label_noise: got nan"]),
        ({"image_size": 16}, ["task.image_size=16 is for image_folder, and digits"]),
        ({"data": "image_folder", "image_size": 0}, ["task.image_size: got 0"]),
        ({"train_size": 2000}, ["train_size 2000, val_size 500, test_size null", "digits has 1797 images"]),
        ({"val_size": 1797}, ["train_size null, val_size 1797", "1797 images"]),
        ({"train_size": 1000, "test_size": 298}, ["train_size 1000, val_size 500, test_size 298"]),
    ],
)
def test_sizes_and_fractions_that_do_not_fit_are_refused(options, parts):
    refused(options, *parts)


# ---- digits, MNIST, FashionMNIST, CIFAR-10 -----------------------------------------------------------------


def test_digits_span_the_bytes():
    loaded = load_images()
    images = torch.cat([loaded.train.images, loaded.val.images, loaded.test.images])
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.uint8
    assert images.max() == 255
    assert images.long().sum() == np.rint(load_digits().images * 255 / 16).sum()
    assert loaded.classes == tuple("0123456789")
    assert len(loaded.test) == 1797 // 5


def write_idx(path, array):
    """The format of MNIST's files: two zeros, the type (8 for bytes), the number of dimensions,
    the sizes, the bytes."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(root, name="MNIST", num=(30, 12)):
    """Images whose every pixel is 20 times the label."""
    for part, size in zip(("train", "t10k"), num):
        labels = np.arange(size) % 10
        write_idx(
            root / name / "raw" / f"{part}-images-idx3-ubyte",
            np.tile(20 * labels[:, None, None], (1, 28, 28)),
        )
        write_idx(root / name / "raw" / f"{part}-labels-idx1-ubyte", labels)


@pytest.mark.parametrize(
    ("name", "folder", "classes"), [("mnist", "MNIST", "0"), ("fashion_mnist", "FashionMNIST", "T-shirt/top")]
)
def test_mnist_and_fashion_mnist(tmp_path, name, folder, classes):
    write_mnist(tmp_path, folder)
    loaded = load_images(data=name, root=str(tmp_path), val_size=8)
    assert [len(part) for part in (loaded.train, loaded.val, loaded.test)] == [22, 8, 12]
    for part in (loaded.train, loaded.val, loaded.test):
        assert part.images.shape[1:] == (1, 28, 28)
        assert part.images.dtype == torch.uint8
        assert torch.equal(part.images.amax((1, 2, 3)).long(), 20 * part.labels)
    assert loaded.test.labels.tolist() == [number % 10 for number in range(12)]
    assert loaded.classes[0] == classes
    refused(
        {"data": name, "root": str(tmp_path), "val_size": 8, "test_size": 13},
        "task.test_size: got 13",
        f"{name} has 12 test images",
    )
    refused(
        {"data": name, "root": str(tmp_path), "val_size": 30},
        "train_size null, val_size 30",
        "30 images for training and validation",
    )


def write_cifar10(root, monkeypatch, num=6):
    """Images whose red is the label times 20, and torchvision's checksums made to fit."""
    folder = root / CIFAR10.base_folder
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(name):
        labels = np.arange(num) % 10
        pixels = np.zeros((num, 3, 1024), np.uint8)
        pixels[:, 0], pixels[:, 1, 1] = 20 * labels[:, None], 99
        return [name, write(name, {"data": pixels.reshape(num, -1), "labels": labels.tolist()})]

    for key in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, key, [batch(name) for name, _ in getattr(CIFAR10, key)])
    meta = {"label_names": ["airplane", *"bcdefghij"]}
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": write("batches.meta", meta)})


def test_cifar10(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    loaded = load_images(data="cifar10", root=str(tmp_path), val_size=10, test_size=4)
    assert [len(part) for part in (loaded.train, loaded.val, loaded.test)] == [20, 10, 4]
    for part in (loaded.train, loaded.val, loaded.test):
        assert part.images.shape[1:] == (3, 32, 32)
        assert part.images.is_contiguous()
        assert torch.equal(part.images[:, 0].amax((1, 2)).long(), 20 * part.labels)
        assert (part.images[:, 1, 0, 1] == 99).all()
    assert loaded.classes[:2] == ("airplane", "b")


@pytest.mark.parametrize(
    ("name", "files"),
    [
        (
            "mnist",
            [f"MNIST/raw/{p}-ubyte" for p in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3")],
        ),
        (
            "fashion_mnist",
            ["FashionMNIST/raw/train-images-idx3-ubyte", "FashionMNIST/raw/t10k-labels-idx1-ubyte"],
        ),
        (
            "cifar10",
            [
                f"cifar-10-batches-py/{f}"
                for f in ("data_batch_1", "data_batch_5", "test_batch", "batches.meta")
            ],
        ),
    ],
)
def test_missing_files_are_named_with_or_without_a_network(tmp_path, monkeypatch, name, files):
    refused({"data": name, "root": str(tmp_path)}, *files, str(tmp_path), "task.download: true")

    def no_network(*args, **kwargs):
        raise URLError("no route\nto host")

    for module in ("mnist", "cifar"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", no_network)
    config = {"data": name, "root": str(tmp_path), "download": True}
    refused(config, "task.download", "no route to host", "network", *files)


def test_only_what_is_missing_is_named(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    message = refused({"data": "mnist", "root": str(tmp_path)}, "MNIST/raw/t10k-labels-idx1-ubyte")
    assert "train-images" not in message


def test_download_puts_the_files_into_root(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "torchvision.datasets.mnist.download_and_extract_archive",
        lambda *args, **kwargs: write_mnist(tmp_path / "new"),
    )
    assert len(load_images(data="mnist", root=str(tmp_path / "new"), download=True, val_size=5).test) == 12


@pytest.mark.parametrize(
    "damage", [b"", b"no pictures here at all", b"\0\0\x08\x03\0\0\0\x1e\0\0\0\x1c\0\0\0\x1c\0\0"]
)
def test_damaged_mnist_files_are_refused(tmp_path, damage):
    write_mnist(tmp_path)
    (tmp_path / "MNIST/raw/train-images-idx3-ubyte").write_bytes(damage)
    refused(
        {"data": "mnist", "root": str(tmp_path), "val_size": 5},
        "damaged",
        "MNIST/raw/train-images-idx3-ubyte",
        "Delete",
    )


def test_labels_that_do_not_fit_the_images_are_refused(tmp_path):
    write_mnist(tmp_path)
    labels = tmp_path / "MNIST/raw/train-labels-idx1-ubyte"
    write_idx(labels, np.arange(29) % 10)
    refused({"data": "mnist", "root": str(tmp_path), "val_size": 5}, "damaged", "30 images and 29 labels")
    write_idx(labels, np.arange(30) % 11)
    refused({"data": "mnist", "root": str(tmp_path), "val_size": 5}, "damaged", "10 classes")


def test_damaged_cifar10_files_are_refused(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py/data_batch_2").write_bytes(b"damaged")
    refused(
        {"data": "cifar10", "root": str(tmp_path), "val_size": 5},
        "damaged",
        "cifar-10-batches-py/data_batch_2",
    )


# ---- folders of pictures -----------------------------------------------------------------------------------


def write_pictures(root, counts, size=(6, 4), mode="RGB", color=None):
    """PNGs by class; their red (or grey) is ten times their number within the class, plus the class's."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            shade = 10 * number + label
            pixel = color(number) if color else shade if mode == "L" else (shade, 100, 200)
            Image.new(mode, size, pixel).save(root / name / f"{number}.png")


def folder(root, **options):
    return {"data": "image_folder", "root": str(root), "val_size": 3} | options


def test_a_folder_for_each_class(tmp_path):
    write_pictures(tmp_path, {"cat": 6, "dog": 9})
    loaded = load_images(**folder(tmp_path))
    assert [len(part) for part in (loaded.train, loaded.val, loaded.test)] == [9, 3, 3]
    assert loaded.classes == ("cat", "dog")
    parts = [loaded.train, loaded.val, loaded.test]
    red = torch.cat([part.images[:, 0, 0, 0] for part in parts]).tolist()
    labels = torch.cat([part.labels for part in parts]).tolist()
    assert sorted(red) == sorted([10 * n for n in range(6)] + [10 * n + 1 for n in range(9)])
    assert [value % 10 for value in red] == labels
    assert all(part.images.shape[1:] == (3, 4, 6) for part in parts)
    assert all((part.images[:, 1:] == torch.tensor([100, 200]).view(2, 1, 1)).all() for part in parts)


def test_folders_train_and_test(tmp_path):
    write_pictures(tmp_path / "train", {"cat": 6, "dog": 6})
    write_pictures(tmp_path / "test", {"cat": 2, "dog": 3})
    (tmp_path / "train" / ".hidden").mkdir()
    loaded = load_images(**folder(tmp_path))
    assert [len(part) for part in (loaded.train, loaded.val, loaded.test)] == [9, 3, 5]
    assert loaded.test.labels.tolist() == [0, 0, 1, 1, 1]
    assert loaded.test.images[:, 0, 0, 0].tolist() == [0, 10, 1, 11, 21]


def test_train_without_test_is_no_pair_of_classes(tmp_path):
    for part in ("train", "val"):
        write_pictures(tmp_path / part, {"cat": 6, "dog": 6})
    refused(folder(tmp_path), "in train and in test", f"task.root: {tmp_path / 'train'}")
    assert load_images(**folder(tmp_path / "train")).classes == ("cat", "dog")


def test_a_class_may_be_called_train(tmp_path):
    write_pictures(tmp_path, {"bus": 5, "train": 5})
    assert load_images(**folder(tmp_path)).classes == ("bus", "train")


def test_pictures_are_resized(tmp_path):
    write_pictures(tmp_path, {"a": 5}, size=(6, 4))
    write_pictures(tmp_path, {"b": 5}, size=(20, 10))
    refused(folder(tmp_path), "6x4", "20x10", "Set task.image_size")
    assert load_images(**folder(tmp_path, image_size=8)).train.images.shape[1:] == (3, 8, 8)


def test_grey_and_transparent_pictures_become_rgb(tmp_path):
    write_pictures(tmp_path, {"a": 5, "b": 5}, mode="L")
    write_pictures(tmp_path, {"c": 5}, mode="RGBA", color=lambda number: (10 * number, 1, 2, 255))
    train = load_images(**folder(tmp_path)).train
    grey = train.images[train.labels < 2]
    assert (grey == grey[:, :1]).all()
    assert (train.images[train.labels == 2][:, 1] == 1).all()


def test_palettes_with_transparency_are_read(tmp_path):
    write_pictures(tmp_path, {"a": 5, "b": 5})
    for path in tmp_path.glob("*/*.png"):
        palette = Image.new("RGB", (6, 4), (50, 100, 200)).convert("P", palette=Image.Palette.ADAPTIVE)
        palette.save(path, transparency=bytes([128] * 256))
    assert (load_images(**folder(tmp_path)).train.images[:, 1] == 100).all()


def test_pictures_stand_upright(tmp_path):
    write_pictures(tmp_path, {"a": 5, "b": 5})
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    for path in tmp_path.glob("*/*.png"):
        picture = Image.new("RGB", (4, 6))
        picture.putpixel((0, 5), (255, 0, 0))  # lower left as stored
        picture.save(path, exif=exif)
    images = load_images(**folder(tmp_path)).train.images
    assert images.shape[1:] == (3, 4, 6)
    assert (images[:, 0, 0, 0] == 255).all()  # upper left as shown


def test_only_chosen_pictures_are_decoded(tmp_path):
    write_pictures(tmp_path, {"a": 20, "b": 20})
    opened = []
    with patch(
        "torch_hypergrad.experiment.tasks.pictures._decode",
        side_effect=lambda path, *_, **__: opened.append(path) or BLACK,
    ):
        load_images(**folder(tmp_path, train_size=4, test_size=5))
    assert len(opened) == len(set(opened)) == 4 + 3 + 5


BLACK = np.zeros((4, 6, 3), np.uint8)


def test_many_pictures_show_a_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch_hypergrad.experiment.tasks.pictures.MANY", 5)
    write_pictures(tmp_path, {"a": 6, "b": 6})
    load_images(**folder(tmp_path))
    assert "reading pictures" in capsys.readouterr().err


def test_damaged_folders_are_refused(tmp_path):
    refused(folder(tmp_path / "nowhere"), "nowhere is no folder")
    refused(folder(tmp_path), "holds 0 folders", "ROOT/CLASS/*")
    write_pictures(tmp_path, {"a": 6})
    refused(folder(tmp_path), "holds 1 folder")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("none yet")
    refused(folder(tmp_path), "no pictures", "for b", ".png")


def test_unreadable_pictures_are_named(tmp_path):
    write_pictures(tmp_path, {"a": 6, "b": 6})
    (tmp_path / "b" / "3.png").write_bytes((tmp_path / "b" / "3.png").read_bytes()[:40])
    refused(folder(tmp_path), str(tmp_path / "b" / "3.png"), "no readable picture")
    Image.fromarray(np.full((4, 6), 40000, np.uint16)).save(tmp_path / "b" / "3.png")
    refused(folder(tmp_path), str(tmp_path / "b" / "3.png"), "more than 8 bits")


def test_train_and_test_need_the_same_classes(tmp_path):
    write_pictures(tmp_path / "train", {"a": 6, "b": 6, "c": 6})
    write_pictures(tmp_path / "test", {"a": 6, "b": 6, "d": 6})
    message = refused(folder(tmp_path), "differ")
    assert re.search(r"has c, d\.", message)
