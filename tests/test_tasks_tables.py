"""Tables: what becomes of their columns, against numpy; results, against scikit-learn and ridge."""

from __future__ import annotations

import gzip
import json
import math
import re
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.metrics import f1_score, r2_score, root_mean_squared_error
from torch import Tensor, nn

from runs import check_equal_runs
from test_configurations import refused
from test_resume import StopAfter
from test_training_loop import configured, rows_of, run, summary_of
from torch_hypergrad import load_run
from torch_hypergrad.cli import main
from torch_hypergrad.experiment.build import build
from torch_hypergrad.experiment.config import ConfigError
from torch_hypergrad.experiment.report import table_of, write_report
from torch_hypergrad.experiment.run_folder import RunFolder
from torch_hypergrad.experiment.start import run_in
from torch_hypergrad.experiment.tasks import Examples, Split, TabularClassification, TabularRegression

PARTS = ("train", "val", "test")


def every(examples: Examples) -> tuple[Tensor, Tensor]:
    return tuple(examples.take(torch.arange(len(examples))))  # type: ignore[return-value]


def numbers_of_rows(split: Split) -> dict[str, np.ndarray]:
    """The rows in each part, of a table whose first column counts all its rows: standardizing keeps the
    order."""
    column = torch.cat([every(getattr(split, part))[0][:, 0] for part in PARTS])
    ranks = column.argsort().argsort().split([len(getattr(split, part)) for part in PARTS])
    return dict(zip(PARTS, (part.numpy() for part in ranks)))


def line_of(caught: pytest.ExceptionInfo[ConfigError], *words: str) -> None:
    message = str(caught.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


# ---- scikit-learn's tables ---------------------------------------------------------------------------------


def test_diabetes_is_split_without_loss_and_standardized_by_its_training_rows() -> None:
    features, target = load_diabetes(return_X_y=True, scaled=False)
    task = TabularRegression("diabetes", train_size=200, val_size=100)
    split = task.load(seed=3)
    assert [len(getattr(split, part)) for part in PARTS] == [200, 100, 142]
    distinct = {tuple(row): place for place, row in enumerate(np.c_[features, target])}
    assert len(distinct) == len(features)
    places = {}
    for part in PARTS:  # found again by what no column can hide: the rows in their own units
        inputs, targets = (each.double().numpy() for each in every(getattr(split, part)))
        mean, std = np.array(list(task.columns.numbers.values())).T
        rows = np.c_[inputs * std + mean, targets * task.std + task.mean]
        gaps = np.abs(rows[:, None] - np.c_[features, target][None]).max(2)
        places[part] = gaps.argmin(1)
        assert gaps.min(1).max() < 1e-3
    assert sorted(np.concatenate(list(places.values()))) == list(range(442))
    train = features[places["train"]]
    inputs, targets = every(split.train)
    expected = (train - train.mean(0)) / train.std(0)
    np.testing.assert_allclose(inputs.numpy(), expected, rtol=1e-5, atol=1e-5)
    true = target[places["train"]]
    np.testing.assert_allclose(targets.numpy(), (true - true.mean()) / true.std(), rtol=1e-5, atol=1e-5)


def test_iris_has_its_classes_by_name() -> None:
    task = TabularClassification("iris", val_size=30)
    split = task.load(seed=0)
    assert task.classes == tuple(sorted(load_iris().target_names))
    assert (task.input_shape, task.num_outputs, task.columns.names[0]) == ((4,), 3, "sepal length (cm)")
    assert torch.cat([every(getattr(split, part))[1] for part in PARTS]).bincount().tolist() == [50, 50, 50]


@pytest.mark.parametrize("name", ["wine", "breast_cancer"])
def test_the_other_tables_load(name: str) -> None:
    task = TabularClassification(name)
    assert len(task.load(seed=0).val) == 100
    assert len(task.classes) == {"wine": 3, "breast_cancer": 2}[name]


def test_classes_that_are_numbers_are_in_their_order(tmp_path: Path) -> None:
    pd.DataFrame({"x": range(30), "y": [10, 9, 100] * 10}).to_csv(tmp_path / "t.csv", index=False)
    task = TabularClassification(str(tmp_path / "t.csv"), target="y", val_size=5)
    targets = every(task.load(seed=0).train)[1]
    assert task.classes == ("9", "10", "100")
    assert targets.dtype == torch.int64


# ---- files -------------------------------------------------------------------------------------------------

NUM = 60


def mixed() -> pd.DataFrame:
    """Every kind of column; the first counts the rows."""
    generator = np.random.default_rng(0)
    sizes = generator.normal(50, 7, NUM)
    sizes[::7] = np.nan
    colours = generator.choice(["red", "green", "blue"], NUM).astype(object)
    colours[::5] = None
    days = pd.date_range("2020-01-01", periods=4).strftime("%Y-%m-%d").to_numpy()
    maybe = generator.choice([True, False], NUM).astype(object)
    maybe[::6] = None
    columns = {
        "row": np.arange(NUM),
        "size": sizes,
        "colour": colours,
        "ok": generator.choice([True, False], NUM),
        "maybe": maybe,
        "always": np.full(NUM, 0.1),
        "day": generator.choice(days, NUM),
        "nothing": np.full(NUM, np.nan),
        "y": generator.normal(size=NUM),
    }
    return pd.DataFrame(columns)


def write(table: pd.DataFrame, file: Path) -> None:
    if file.suffix == ".parquet":
        table.to_parquet(file)
    else:
        table.to_csv(file, index=False, sep="\t" if ".tsv" in file.name else ",")


def encoded_by_hand(table: pd.DataFrame, rows: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Cell by cell, from what the training rows say alone."""
    columns: list[list[float]] = []
    for name in ("row", "size", "ok", "maybe", "always"):
        known = [float(cell) for cell in table[name].iloc[train] if not pd.isna(cell)]
        mean, std = math.fsum(known) / len(known), float(np.std(known))
        std = 1.0 if name == "always" else std
        cells = table[name].iloc[rows]
        columns.append([0.0 if pd.isna(cell) else (float(cell) - mean) / std for cell in cells])
    for name in ("colour", "day"):
        words = sorted({cell for cell in table[name].iloc[train] if not pd.isna(cell)})
        columns += [[float(cell == word) for cell in table[name].iloc[rows]] for word in words]
    return np.array(columns).T


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz", "t.TSV.xz", "t.parquet"])
def test_columns_become_numbers(name: str, tmp_path: Path) -> None:
    table, file = mixed(), tmp_path / name
    write(table, Path(str(file).replace("TSV", "tsv")))
    Path(str(file).replace("TSV", "tsv")).rename(file)
    task = TabularRegression(str(file), target="y", val_size=20, test_size=10)
    rows = numbers_of_rows(task.load(seed=1))
    table.loc[rows["val"][0], "colour"] = "violet"  # a word that no training row has
    table.loc[rows["test"][0], "size"] = 1e4  # far from all training rows
    write(table, Path(str(file).replace("TSV", "tsv")))
    Path(str(file).replace("TSV", "tsv")).rename(file)
    split = task.load(seed=1)
    for part in PARTS:
        expected = encoded_by_hand(table, rows[part], rows["train"])
        inputs, targets = every(getattr(split, part))
        np.testing.assert_allclose(inputs.numpy(), expected, rtol=2e-5, atol=2e-5)
        assert inputs.dtype == targets.dtype == torch.float32
    assert not every(split.val)[0][0, 5:8].any()  # violet is neither blue, green nor red
    assert task.columns.names[5:8] == ["colour=blue", "colour=green", "colour=red"]


def test_the_types_of_parquet(tmp_path: Path) -> None:
    """Numbers and truth values that may be missing, categories, exact decimals."""
    columns = {
        "row": pd.Series(range(30), dtype="UInt8"),
        "num": pd.Series([1, None, 3] * 10, dtype="Int64"),
        "flag": pd.Series([True, None, False] * 10, dtype="boolean"),
        "kind": pd.Series(["b", None, "a"] * 10, dtype="category"),
        "word": pd.Series(["x", None, "None"] * 10, dtype="string"),
        "price": pd.Series([Decimal("1.50"), None, Decimal("2.5")] * 10),
        "y": pd.Series(range(30), dtype="Float32"),
    }
    pd.DataFrame(columns).to_parquet(tmp_path / "t.parquet")
    task = TabularRegression(str(tmp_path / "t.parquet"), "y", train_size=24, val_size=3)
    split = task.load(seed=0)
    train = numbers_of_rows(split)["train"] % 3
    names = ["kind=a", "kind=b", "word=None", "word=x"]
    assert task.columns.names == ["row", "num", "flag", "price", *names]
    flags = np.array([[0, 1, 0, 1], [0] * 4, [1, 0, 1, 0]])
    np.testing.assert_array_equal(every(split.train)[0][:, 4:], flags[train])
    for place, cells in ((1, [1, np.nan, 3]), (2, [1, np.nan, 0]), (3, [1.5, np.nan, 2.5])):
        num = np.array(cells)[train]
        expected = np.nan_to_num((num - np.nanmean(num)) / np.nanstd(num))
        np.testing.assert_allclose(every(split.train)[0][:, place], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (pd.to_datetime(["2020-01-01"] * 30), "datetime"),
        ([[1, 2]] * 30, "mixed"),
        (pd.Categorical(pd.to_datetime(["2020-01-01"] * 30)), "datetime"),
    ],
    ids=["dates", "lists", "categories of dates"],
)
def test_what_is_neither_numbers_nor_words_is_refused(cells: Any, kind: str, tmp_path: Path) -> None:
    """Words made of dates would depend on the other dates."""
    pd.DataFrame({"a": cells, "y": range(30)}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(ConfigError) as caught:
        TabularRegression(str(tmp_path / "t.parquet"), "y", val_size=5).load(seed=0)
    line_of(caught, "column a holds neither numbers nor words", kind, "task.drop: [a]")


def test_dropped_columns_are_not_seen(tmp_path: Path) -> None:
    write(mixed(), tmp_path / "t.csv")
    task = TabularRegression(str(tmp_path / "t.csv"), "y", drop=["colour", "day", "row"], val_size=20)
    task.load(seed=0)
    assert task.columns.names == ["size", "ok", "maybe", "always"]


def test_codes_stay_words_where_a_file_has_only_codes_that_look_like_numbers(tmp_path: Path) -> None:
    table = pd.DataFrame({"code": ["01", "1.0", "x"] * 20, "y": [1.0, 2.0, 3.0] * 20})
    write(table, tmp_path / "t.csv")
    task = TabularRegression(str(tmp_path / "t.csv"), "y", val_size=10)
    task.load(seed=0)
    assert task.columns.names == ["code=01", "code=1.0", "code=x"]
    network = nn.Linear(3, 1, bias=False)
    network.weight.data = torch.tensor([[1.0, 2.0, 3.0]])
    task.mean, task.std = 0.0, 1.0
    (tmp_path / "new.csv").write_text('code\n01\n1.0\n1\n""\n')
    told = [row[1] for row in task.predict(network, [tmp_path / "new.csv"])]
    assert told == ["1", "2", "0", "0"]


# ---- what is refused ---------------------------------------------------------------------------------------

GOOD = "a,y\n" + "".join(f"{row},{row % 3}\n" for row in range(30))
LONG = "word,y\n" + "".join(f"w{row},{row}\n" for row in range(300))
DATES = "day,y\n" + "".join(f"{day:%Y-%m-%d},1\n" for day in pd.date_range("2020-01-01", periods=300))


@pytest.mark.parametrize(
    ("content", "keys", "words"),
    [
        (b"", {}, ["cannot be read", "No columns"]),
        (b"a,y\n", {}, ["has 0 rows", "Lower a size"]),
        (b"\xff\xfe\x00,y\n1,2\n", {}, ["cannot be read"]),
        (b'a,y\n"1,2\n', {}, ["cannot be read"]),
        (GOOD, {"target": "z"}, ["task.target", "has no column z", "It has a, y"]),
        (GOOD, {"drop": ["b"]}, ["task.drop", "has no column b", "It has a, y"]),
        (GOOD, {"drop": ["a"]}, ["no column beside y"]),
        (GOOD, {"val_size": 30}, ["val_size 30", "has 30 rows"]),
        (GOOD, {"val_size": 0}, ["task.val_size", "at least 1"]),
        (GOOD, {"train_size": 20, "test_size": 11}, ["do not fit"]),
        (GOOD + "4,\n5,\n", {}, ["task.target", "2 of 32 values of y are missing"]),
        (GOOD + "4,inf\n", {}, ["task.target", "infinite"]),
        (GOOD + "4,many\n", {}, ["task.target", "does not hold numbers", "many", "TabularClassification"]),
        (GOOD + "inf,1\n" * 30, {}, ["column a has infinite"]),
        (LONG, {}, ["column word has", "more than 100", "task.drop: [word]"]),
        (DATES, {}, ["column day has", "task.drop: [day]"]),
        ("a,a,y\n" + "1,2,3\n" * 30, {}, ["two columns are called a"]),
        ("a,y\n" + "1,2,3\n" * 30, {}, ["more cells than the header"]),
    ],
)
def test_a_table_that_cannot_be_used(
    content: bytes | str, keys: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        TabularRegression(str(tmp_path / "t.csv"), **{"target": "y", "val_size": 5, **keys}).load(seed=0)
    line_of(caught, *words)


def test_infinite_numbers_outside_the_training_rows_are_refused(tmp_path: Path) -> None:
    table, file = mixed(), tmp_path / "t.csv"
    write(table, file)
    task = TabularRegression(str(file), "y", val_size=20)
    table.loc[numbers_of_rows(task.load(seed=0))["val"][3], "size"] = np.inf
    write(table, file)
    with pytest.raises(ConfigError, match="column size has infinite"):
        task.load(seed=0)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv.gz", gzip.compress(GOOD.encode(), mtime=0)[:-9], ["cannot be read"]),
        ("t.csv.gz", b"no gzip", ["cannot be read"]),
        ("t.parquet", b"PAR1 and no more", ["cannot be read"]),
        ("t.xlsx", b"", ["is no table", ".csv", "diabetes"]),
        ("table", b"", ["is no table"]),
        ("t.gz", b"", ["is no table"]),
    ],
)
def test_a_file_that_is_damaged_or_of_another_kind(
    name: str, content: bytes, words: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        TabularClassification(str(tmp_path / name)).load(seed=0)
    line_of(caught, "task.data", name, *words)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"t\.csv is no file"):
        TabularRegression(str(tmp_path / "t.csv")).load(seed=0)


def test_parquet_without_pyarrow_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(mixed(), tmp_path / "t.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "fastparquet", None)
    with pytest.raises(
        ConfigError, match=r"Parquet needs pyarrow\. Install it: pip install pyarrow"
    ) as caught:
        TabularRegression(str(tmp_path / "t.parquet"), "y").load(seed=0)
    line_of(caught)


def test_parquet_with_two_columns_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that differ as numbers and words do: 1 and "1"."""
    table = pd.DataFrame({"1": range(30), "y": range(30)})
    write(table, tmp_path / "t.parquet")
    both = table.assign(**{"2": 0}).rename(columns={"2": 1})
    monkeypatch.setattr(pd, "read_parquet", lambda _: both)
    with pytest.raises(ConfigError, match="has two columns called 1"):
        TabularRegression(str(tmp_path / "t.parquet"), "y", val_size=5).load(seed=0)


@pytest.mark.parametrize("num", [1, 2000])
def test_classes_are_not_too_few_or_too_many(num: int, tmp_path: Path) -> None:
    table = pd.DataFrame({"x": range(2000), "y": np.arange(2000) % num})
    write(table, tmp_path / "t.csv")
    with pytest.raises(ConfigError, match=f"y has {num} different values"):
        TabularClassification(str(tmp_path / "t.csv"), target="y").load(seed=0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task.taget=y"], "task: TabularClassification has no taget. Did you mean target?"),
        (["--task.val_size=many"], "task.val_size: got 'many', expected int."),
    ],
)
def test_arguments_of_the_base_class_are_checked_as_its_own(flags: list[str], message: str) -> None:
    given = ["--task=TabularClassification", "--task.data=iris", "--method=null", "--train.steps=1"]
    assert message in refused("train", *given, *flags)


# ---- runs --------------------------------------------------------------------------------------------------

RIDGE = """
task: {name: TabularRegression, data: diabetes, train_size: 150, val_size: 150}
model: {name: Linear}
optimizer: {name: SGD, lr: 0.05, momentum: 0.9}
tune: {weight_decay: {per: element, init: 0.3, log: true}}
method: {name: Implicit, solver: {name: Cholesky}}
hyper_optimizer: {name: SGD, lr: 50.0}
train: {steps: 900, batch_size: null, hyper_every: 500, threads: 1}
output: {loggers: [], eval_every: 300}
"""


@pytest.fixture(scope="module")
def ridge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One hyper step, and a long training after it."""
    folder = tmp_path_factory.mktemp("ridge")
    return run(configured(RIDGE, folder), folder)


def test_a_weight_decay_per_element_trains_to_the_optimum_of_ridge_regression(ridge: Path) -> None:
    split = build(configured(RIDGE, ridge.parent / "again")).split
    values = torch.load(ridge / "tuned.pt", weights_only=True)["values"]
    decay = torch.cat([values["weight_decay/out.weight"][0], values["weight_decay/out.bias"]]).double()
    assert len(decay) == 11
    assert decay.max() > 1.2 * decay.min()  # they were tuned apart
    inputs, targets = (each.double() for each in every(split.train))
    inputs = torch.cat([inputs, torch.ones(150, 1)], 1)
    hessian = 2 / 150 * inputs.T @ inputs + decay.diag()
    best = torch.linalg.solve(hessian, 2 / 150 * inputs.T @ targets)
    weights = torch.load(ridge / "model.pt", weights_only=True)
    found = torch.cat([weights["out.weight"][0], weights["out.bias"]]).double()
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-5)
    loss = (inputs @ best - targets).square().mean().item()
    assert summary_of(ridge)["train"]["loss"] == pytest.approx(loss, rel=1e-5)


def test_rmse_and_r2_are_those_of_the_saved_network_in_the_targets_units(ridge: Path) -> None:
    features, target = load_diabetes(return_X_y=True, scaled=False)
    task = TabularRegression("diabetes", train_size=150, val_size=150)
    train, _, test = task.sizes.rows(442, 0, torch.Generator().manual_seed(0), "", "")
    weights = torch.load(ridge / "model.pt", weights_only=True)
    scaled = (features - features[train].mean(0)) / features[train].std(0)
    told = scaled[test] @ weights["out.weight"][0].double().numpy() + weights["out.bias"].item()
    told = told * target[train].std() + target[train].mean()
    result = summary_of(ridge)["test"]
    assert result["RMSE"] == pytest.approx(root_mean_squared_error(target[test], told), rel=1e-5)
    assert result["R2"] == pytest.approx(r2_score(target[test], told), rel=1e-5)
    loss = np.square(target[test] - told).mean() / target[train].var()
    assert result["loss"] == pytest.approx(loss, rel=1e-5)


def test_predictions_from_the_command_line_are_in_the_targets_units(
    ridge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bunch = load_diabetes(as_frame=True, scaled=False)
    some = bunch.data.iloc[:5][list(reversed(bunch.feature_names))].assign(more="x")  # by name, not by place
    write(some, tmp_path / "some.csv")
    assert main(["predict", str(ridge), str(tmp_path / "some.csv")]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == [f"{tmp_path / 'some.csv'}:{row}" for row in range(1, 6)]
    model = load_run(ridge)
    mean, std = model.task.mean, model.task.std  # type: ignore[union-attr]
    split = TabularRegression("diabetes", train_size=150, val_size=150)
    split.load(seed=0)
    assert (mean, std) == (split.mean, split.std)
    numbers = np.array(list(split.columns.numbers.values()))
    inputs = (bunch.data.iloc[:5].to_numpy() - numbers[:, 0]) / numbers[:, 1]
    with torch.no_grad():
        told = model(torch.from_numpy(inputs).float()).flatten() * std + mean
    assert [float(line[1]) for line in lines] == pytest.approx(told.tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("age,sex\n1,2\n", ["has no column bmi", "It has age, sex"]),
        ("age,sex,bmi,bp,s1,s2,s3,s4,s5,s6\nold,1,1,1,1,1,1,1,1,1\n", ["column age does not hold numbers"]),
        ("age,sex,bmi,bp,s1,s2,s3,s4,s5,s6\ninf,1,1,1,1,1,1,1,1,1\n", ["column age has infinite"]),
    ],
)
def test_a_table_that_does_not_fit_the_run_is_refused(
    content: str, words: list[str], ridge: Path, tmp_path: Path
) -> None:
    (tmp_path / "new.csv").write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_run(ridge).predict([tmp_path / "new.csv"])
    line_of(caught, "new.csv", *words)


def test_the_report_speaks_of_rows(ridge: Path) -> None:
    page = write_report([ridge]).read_text()
    text = re.sub(r"data:image[^\"]*|<style.*?</style>", "", page, flags=re.DOTALL)
    assert "150 training, 150 validation and 142 test rows" in text
    assert "test RMSE" in text
    assert "test R2" in text
    assert "by column, the largest first" in text
    assert "What the network tells of target" in text
    assert not re.search(r"accuracy|image", re.sub(r"<img[^>]*>", "", text), flags=re.IGNORECASE)


def test_pictures_are_of_the_first_layer_alone(tmp_path: Path) -> None:
    """The last layer of this network has as many inputs as the table has columns."""
    task = TabularRegression("diabetes")
    split = task.load(seed=0)
    network = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 1))
    values = {f"weight_decay/{name}": torch.ones(p.shape) for name, p in network.named_parameters()}
    captions = [caption for caption in task.figures(network, split, values) if "column" in caption]
    assert captions == [
        "Learned weight decay of 0.weight by column, the largest first; geometric means over 10 units."
    ]


NOISY = """
task: {name: TabularClassification, data: breast_cancer, train_size: 150, val_size: 200, label_noise: 0.3}
model: {name: Linear}
optimizer: {name: SGD, lr: 0.1, momentum: 0.9, weight_decay: 1.0e-2}
tune: {example_weights: {}}
method: {name: Implicit, solver: {name: Neumann, num_terms: 20, damping: 0.01}}
hyper_optimizer: {name: Adam, lr: 0.2}
train: {steps: 200, batch_size: null, warmup: 40, hyper_every: 5, threads: 1}
output: {loggers: [], checkpoint_every: 30}
"""


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noisy")
    return run(configured(NOISY, folder), folder)


def test_wrong_labels_are_those_that_differ_from_the_table(tmp_path: Path) -> None:
    bunch = load_breast_cancer()
    clean = TabularClassification("breast_cancer", train_size=150, val_size=200).load(seed=0)
    split = build(configured(NOISY, tmp_path)).split
    assert split.wrong is not None
    assert int(split.wrong.sum()) == 45
    assert torch.equal(every(split.train)[1] != every(clean.train)[1], split.wrong)
    assert torch.equal(every(split.val)[1], every(clean.val)[1])
    assert clean.wrong is None
    assert len(bunch.target) == 569


def test_example_weights_tell_wrong_labels_from_right_ones(noisy: Path) -> None:
    tuned = torch.load(noisy / "tuned.pt", weights_only=True)
    weights, wrong = tuned["example_weights"], tuned["wrong"]
    assert weights.shape == wrong.shape == (150,)
    assert weights[wrong].mean() < 0.6 * weights[~wrong].mean()
    assert "Weights of the training rows" in write_report([noisy]).read_text()


def test_accuracy_and_f1_are_those_of_the_saved_network(noisy: Path) -> None:
    task = TabularClassification("breast_cancer", train_size=150, val_size=200)
    inputs, targets = every(task.load(seed=0).test)
    with torch.no_grad():
        told = load_run(noisy)(inputs).argmax(1)
    result = summary_of(noisy)["test"]
    assert result["accuracy"] == pytest.approx((told == targets).double().mean().item())
    assert result["macro F1"] == pytest.approx(f1_score(targets, told, average="macro"))


def test_a_stopped_run_of_a_table_ends_bit_for_bit_the_same(noisy: Path, tmp_path: Path) -> None:
    config = configured(NOISY, tmp_path)
    assert not run_in(config, RunFolder(tmp_path / "run"), StopAfter(77), quiet=True)
    assert run_in(config, RunFolder(tmp_path / "run"), StopAfter(10_000), quiet=True)
    check_equal_runs(tmp_path / "run", noisy)


def test_what_a_task_keeps_is_enough_to_predict(noisy: Path, tmp_path: Path) -> None:
    first = TabularClassification("breast_cancer", train_size=150, val_size=200)
    first.load(seed=0)
    second = TabularClassification("breast_cancer", train_size=150, val_size=200)
    second.restore(json.loads(json.dumps(first.state())))
    assert json.dumps(second.state()) == json.dumps(first.state())
    bunch = load_breast_cancer(as_frame=True)
    write(bunch.data.iloc[:20], tmp_path / "some.parquet")
    network = load_run(noisy).network
    told = second.predict(network, [tmp_path / "some.parquet"])
    assert told == first.predict(network, [tmp_path / "some.parquet"])
    names = [bunch.target_names[label] for label in bunch.target.iloc[:20]]
    right = [row[1] == name for row, name in zip(told, names)]
    assert sum(right) >= 15
    assert all(0.5 <= float(row[2]) <= 1 for row in told)


def test_runs_are_compared_by_r2_and_the_higher_wins(ridge: Path, tmp_path: Path) -> None:
    worse = configured(
        RIDGE.replace("{weight_decay: {per: element, init: 0.3, log: true}}", "{}"),
        tmp_path,
        method=None,
        optimizer={"lr": 1e-5},
        train={"hyper_every": None, "steps": 20},
    )
    other = run(worse, tmp_path)
    folders = [other.rename(tmp_path / "worse"), ridge]
    better, bad = (summary_of(folder)["test"]["R2"] for folder in (ridge, folders[0]))
    assert better > bad
    assert "test R2" in table_of(folders).splitlines()[0]
    page = write_report(folders, tmp_path / "report").read_text()
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    assert f"{better:.3f} best test R2: run, with a test loss" in text


def test_a_single_row_has_no_r2_and_no_warning(tmp_path: Path) -> None:
    config = configured(RIDGE, tmp_path, task={"val_size": 1}, train={"hyper_every": 10, "steps": 20})
    assert all(math.isnan(row["val"]["R2"]) for row in rows_of(run(config, tmp_path), "eval"))
