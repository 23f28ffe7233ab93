"""The report of a run: every picture is there, what it says is true,
and no folder of a run is too odd for it."""

from __future__ import annotations

import base64
import io
import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from synthetic_runs import (
    CNN,
    MLP,
    PER_ELEMENT,
    augmentation_run,
    cleaning_run,
    decays,
    make_run,
    resnet_shapes,
    schedule_run,
)
from torch_hypergrad.experiment.config import ConfigError, Tune
from torch_hypergrad.experiment.report import style, table_of, warnings_of, write_report
from torch_hypergrad.experiment.report.read import read_run
from torch_hypergrad.experiment.report.trust import trust_sentences

VOID = {"meta", "img", "br", "link", "input", "hr"}


# ---- reading a page ----------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Collects text, pictures and references of a page, and sees that every tag is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.pictures: list[dict[str, str]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.references += [given[name] for name in ("src", "href") if name in given]
        if tag == "img":
            self.pictures.append(given)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & set(self.open):
            self.words.append(data)


def read_page(path: Path) -> str:
    """The text of a page, after checks that it is well-formed, stands by itself,
    and shows the pictures beside it."""
    html = path.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    assert "script" not in reader.tags
    assert not re.search(r"url\(|@import", html)
    assert not any(reference.startswith(("http", "//", "file")) for reference in reader.references)
    shown = [
        base64.b64decode(picture["src"].removeprefix("data:image/png;base64,")) for picture in reader.pictures
    ]
    assert sorted(shown) == sorted(file.read_bytes() for file in path.parent.glob("*.png"))
    for picture, png in zip(reader.pictures, shown):
        assert len(picture["alt"]) > 20
        assert (imread(io.BytesIO(png)).min(-1) < 0.9).mean() > 0.002  # not blank
    return " ".join(" ".join(reader.words).split())


def pictures_of(page: Path) -> set[str]:
    return {file.stem for file in page.parent.glob("*.png")}


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch):
    """Fewer pixels, for speed."""
    monkeypatch.setattr(style, "DPI", 50)


# ---- one run -----------------------------------------------------------------------------------------------


def test_weight_decay_of_an_mlp_per_element(tmp_path):
    start, final = decays(MLP)
    config = {"train": {"device": "<script>alert(1)</script> & $x$"}}
    run = make_run(tmp_path / "a <script> & $tag$", start, final, tune=PER_ELEMENT, config=config)
    page = write_report([run])
    assert page == run / "report" / "report.html"
    text = read_page(page)
    expected = {
        "curves",
        "health",
        "histograms",
        "layers_weight_decay",
        "pixels_weight_decay",
        "values_over_time",
    }
    assert pictures_of(page) == expected
    assert text.startswith(
        "a <script> & $tag$ Tuned weight_decay (one for every single weight): 2,410 values, by implicit"
    )
    assert "<script>alert(1)</script> & $x$" in text
    assert "90.0 % test accuracy 0.200 test loss" in text
    assert "20 taken, 0 skipped; 400 products with the Hessian" in text
    assert "as much as 5,000 training steps" in text
    assert "geometric mean over 32 units" in text
    assert "State finished" in text
    values = final["weight_decay/hidden.bias"].double().numpy()
    low, high = np.quantile(values, [0.05, 0.95])
    numbers = [values.min(), low, np.median(values), high, values.max()]
    assert (
        " ".join(
            ["weight_decay/hidden.bias 32 0.001", *(f"{value:.3g}".replace("e-0", "e-") for value in numbers)]
        )
        in text
    )


def test_filters_of_a_cnn_per_element(tmp_path):
    page = write_report([make_run(tmp_path / "cnn", *decays(CNN), tune=PER_ELEMENT)], tmp_path / "elsewhere")
    assert page == tmp_path / "elsewhere" / "report.html"
    assert "mean over 8 filters and 1 input channels" in read_page(page)
    assert "filter_weight_decay" in pictures_of(page)


def test_tensors_of_a_resnet_are_grouped_and_counted(tmp_path):
    shapes = resnet_shapes()
    assert len(shapes) == 62
    run = make_run(
        tmp_path / "resnet", *decays(shapes), tune=PER_ELEMENT, tuned={"mean_image": torch.rand(3, 32, 32)}
    )
    text = read_page(write_report([run]))
    assert "The 62 tuned tensors over training, grouped by kind" in text
    assert "All 62 tuned tensors in numbers" in text
    assert all(f"weight_decay/{name} " in text for name in shapes)


def test_a_learned_schedule(tmp_path):
    page = write_report([schedule_run(tmp_path / "schedule")])
    text = read_page(page)
    assert pictures_of(page) == {"curves", "health", "schedules", "values_over_time"}
    assert (
        "lr (one for each training step) and weight_decay (one for each group of parameters): 501 values"
        in text
    )
    assert "It is the exact derivative" in text
    assert "where each of the 20 trainings begins" in text


def test_learned_augmentation(tmp_path):
    page = write_report([augmentation_run(tmp_path / "augmentation")])
    assert "the augmentation of training images: 6 values" in read_page(page)
    assert "augmentation" in pictures_of(page)


def test_data_cleaning_counts_and_auc(tmp_path):
    run = cleaning_run(tmp_path / "cleaning")
    page = write_report([run])
    text = read_page(page)
    assert pictures_of(page) == {"curves", "health", "example_weights", "lowest_weights", "values_over_time"}
    saved = torch.load(run / "tuned.pt", weights_only=True)
    weights, wrong = saved["example_weights"].tolist(), saved["wrong"].tolist()
    of_right = [weight for weight, bad in zip(weights, wrong) if not bad]
    of_wrong = [weight for weight, bad in zip(weights, wrong) if bad]
    found, falsely = sum(weight < 0.5 for weight in of_wrong), sum(weight < 0.5 for weight in of_right)
    assert (
        f"Of 60 wrong labels, {found} have a weight under 0.5; of 240 right labels, {falsely} have." in text
    )
    area = statistics.mean((good > bad) + (good == bad) / 2 for good in of_right for bad in of_wrong)
    assert f"(AUC {area:.3f})" in text
    assert f"example_weights 300 0.5 {min(weights):.3g}" in text  # tuned as logits, shown as weights


def test_data_cleaning_without_known_wrong_labels(tmp_path):
    run = cleaning_run(tmp_path / "cleaning")
    saved = torch.load(run / "tuned.pt", weights_only=True)
    saved["lowest"]["wrong"], saved["wrong"] = (
        torch.zeros(10, dtype=torch.bool),
        torch.zeros(300, dtype=torch.bool),
    )
    torch.save(saved, run / "tuned.pt")
    text = read_page(write_report([run]))
    low = int((saved["example_weights"] < 0.5).sum())
    assert (
        f"Of 300 training images, {low} have a weight under 0.5. Which labels are wrong is not known." in text
    )
    assert "AUC" not in text


def test_a_run_that_tunes_nothing(tmp_path):
    page = write_report([make_run(tmp_path / "none", config={"method": None}, num_hyper=0)])
    text = read_page(page)
    assert pictures_of(page) == {"curves"}
    assert "Trained without tuning." in text
    assert "Nothing was tuned in this run." in text


# ---- odd folders -------------------------------------------------------------------------------------------


def test_unfinished_run_with_a_half_written_line(tmp_path):
    run = make_run(tmp_path / "cut off", *decays(MLP), tune=PER_ELEMENT, num_hyper=1, finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "eval", "step": 55')
    (run / "tuned.pt").write_bytes(b"PK\x03\x04 half")
    page = write_report([run])
    text = read_page(page)
    assert pictures_of(page) == {"curves", "health", "values_over_time"}
    assert "not finished: 500 training steps so far" in text
    assert "validation accuracy, so far" in text
    assert "1 line of metrics.jsonl could not be read" in text
    assert f"torch-hypergrad resume '{run}'" in text
    assert "validation" in table_of([run])


def test_unfinished_run_that_starts_from_a_file_of_values(tmp_path):
    tune = {"weight_decay": Tune(per="element", init="other/values.safetensors", log=True)}
    run = make_run(tmp_path / "run", *decays(MLP), tune=tune, num_hyper=2, finished=False)
    assert re.search(
        rf"weight_decay/hidden.bias {style.DASH} {style.DASH} \d", read_page(write_report([run]))
    )


@pytest.mark.parametrize("steps", [0, 40, 50])
def test_hardly_begun(tmp_path, steps):
    run = make_run(tmp_path / "begun", num_hyper=0, finished=False, steps=steps)
    if steps == 0:
        (run / "metrics.jsonl").unlink()
    page = write_report([run])
    assert "No hyper step has been taken" in read_page(page)
    assert pictures_of(page) == ({"curves"} if steps else set())


@pytest.mark.parametrize("final", [0.0, 0.5])
def test_values_that_are_zero_or_all_the_same(tmp_path, final):
    start = {
        "weight_decay/hidden.weight": torch.zeros(32, 64),
        "weight_decay/out.bias": torch.zeros(10),
        "lr/group0": torch.zeros(()),
    }
    last = {name: torch.full_like(value, final) for name, value in start.items()}
    last["weight_decay/out.bias"][0] = 0.0
    tune = {"weight_decay": Tune(per="element", log=True), "lr": Tune()}
    run = make_run(
        tmp_path / "same",
        start,
        last,
        tune=tune,
        num_hyper=2,
        hyper={"hypergradient_norm": 0.0, "residual": 0.0},
    )
    assert "More than half of the hypergradients are 0" in read_page(write_report([run]))


def test_losses_and_values_that_are_not_numbers(tmp_path):
    nan, (start, final) = float("nan"), decays(MLP)
    final["weight_decay/out.bias"][:], final["weight_decay/hidden.weight"][0, 0] = nan, nan
    lost = {
        "hypergradient_norm": nan,
        "residual": [nan, 0.75, nan],
        "values": {"weight_decay/hidden.bias": nan},
        "warnings": {},
    }
    run = make_run(tmp_path / "lost", start, final, tune=PER_ELEMENT, num_hyper=3, hyper=lost)
    part = {"loss": nan, "accuracy": nan}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"kind": "eval", "step": 600, "seconds": 1, "train": part, "val": part}) + "\n3\n[]\n"
        )
    text = read_page(write_report([run]))
    assert f"{GOOD} 75 % of the linear system unsolved (median), so that it is not" in text
    assert "2 lines of metrics.jsonl could not be read" in text


def test_every_hyper_step_skipped(tmp_path):
    run = make_run(tmp_path / "skipped", tune=PER_ELEMENT, num_hyper=0, skipped=(100, 200))
    assert "2 of 2 hyper steps were skipped (100.0 %)" in read_page(write_report([run]))


def test_a_resumed_run_keeps_the_last_of_two_lines(tmp_path):
    run = make_run(tmp_path / "resumed", steps=100, num_hyper=0, finished=False)
    again = {"kind": "eval", "step": 100, "seconds": 9.0, "train": {"loss": 1.0, "accuracy": 0.5}}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(again | {"val": {"loss": 0.125, "accuracy": 0.625}}) + "\n")
    assert re.search(r"validation +\| +62.5 \| +0.125", table_of([run]))


@pytest.mark.parametrize("kind", ["missing", "empty", "no mapping", "no yaml"])
def test_a_folder_that_holds_no_run_is_refused_in_one_line(tmp_path, kind):
    folder = tmp_path / "other"
    if kind != "missing":
        folder.mkdir()
    if kind.startswith("no "):
        (folder / "config.yaml").write_text("- 1" if kind == "no mapping" else "a: [1")
    with pytest.raises(ConfigError, match=r"expected .* got .*Pass the folder of a run") as error:
        write_report([folder])
    assert "\n" not in str(error.value)


def test_no_folder_is_refused():
    with pytest.raises(ConfigError, match="at least one run, got none"):
        table_of([])


# ---- trust -------------------------------------------------------------------------------------------------

GOOD = "No hyper step warned, and no number of this run is out of the ordinary. Solves left"
BAD = {
    "warned": (
        {
            "warnings": [{}] * 8
            + [{"The solve left #%.": f"The solve left {left}%."} for left in range(60, 72)]
        },
        (),
        "12 of 20 hyper steps gave a warning, the last at training step 480: The solve left 71%.",
    ),
    "growth": (
        {"hypergradient_norm": [2.0] * 19 + [5e4]},
        (),
        "rose to 50,000 at training step 480, 25,000 times its median",
    ),
    "skipped": (
        {},
        (5, 6, 7),
        "3 of 23 hyper steps were skipped (13.0 %), each time for this reason: Neumann diverged.",
    ),
    "bounds": (
        {"clipped": {"weight_decay/group0": 6}},
        (),
        "6 of 10 values of weight_decay (60.0 %) would have left their bounds",
    ),
}
FEW = {"out.bias": (10,)}


@pytest.mark.parametrize("problem", BAD)
def test_doubts_are_told_with_their_numbers(tmp_path, problem):
    hyper, skipped, sentence = BAD[problem]
    run = make_run(tmp_path / "doubtful", *decays(FEW), tune=PER_ELEMENT, hyper=hyper, skipped=skipped)
    text = " ".join(trust_sentences(read_run(run)))
    assert sentence in text
    assert GOOD not in text
    assert all(other not in text for name, (_, _, other) in BAD.items() if name != problem)


def test_doubts_stand_at_the_top_of_the_page_and_in_their_section(tmp_path):
    hyper, _, sentence = BAD["warned"]
    text = read_page(
        write_report([make_run(tmp_path / "doubtful", *decays(FEW), tune=PER_ELEMENT, hyper=hyper)])
    )
    assert text.count(sentence) == 2
    assert GOOD not in text


def test_nothing_is_said_against_a_good_run(tmp_path):
    limits = {
        "residual": 0.5,
        "hypergradient_norm": [1.0] * 19 + [1e3],
        "clipped": {"weight_decay/group0": 5},
        "warnings": {},
    }
    run = make_run(tmp_path / "good", *decays(FEW), tune=PER_ELEMENT, hyper=limits, skipped=(5, 6))
    text = read_page(write_report([run]))
    assert f"{GOOD} 50 % of the linear system unsolved (median), so that it is not" in text
    assert "No number here can tell how far training is from its optimum" in text
    assert not any(sentence in text for _, _, sentence in BAD.values())


def test_a_run_of_a_version_that_logged_no_warnings_is_not_called_good(tmp_path):
    run = make_run(tmp_path / "old", *decays(FEW), tune=PER_ELEMENT, hyper={"residual": 0.9})
    text = read_page(write_report([run]))
    assert "The warnings of 20 hyper steps were not recorded." in text
    assert GOOD not in text
    assert warnings_of([run]) == []


def test_warnings_of_several_runs_are_told_with_their_names(tmp_path):
    hyper, _, sentence = BAD["warned"]
    runs = [make_run(tmp_path / name, *decays(FEW), hyper=hyper) for name in ("one", "other")]
    assert warnings_of(runs) == [f"one: {sentence}", f"other: {sentence}"]
    assert warnings_of(runs[:1]) == [sentence]


# ---- several runs ------------------------------------------------------------------------------------------


def test_runs_of_different_tasks_are_not_ranked(tmp_path):
    others = {"task": {"name": "ImageClassification", "data": "mnist"}}
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "other", config=others, accuracy=0.95)]
    text = read_page(write_report(runs))
    assert (
        "Numbers of different tasks do not compare. Here are runs on digits (cross-entropy and accuracy) and "
        "mnist (cross-entropy and accuracy)." in text
    )
    assert "best test accuracy" not in text
    assert "best test accuracy" in read_page(write_report(runs[:1] * 2, tmp_path / "out"))


def test_rows_whose_folders_have_the_same_names_stay_apart(tmp_path):
    runs = [
        make_run(tmp_path / name / "x" / "run", config={"optimizer": {"name": "SGD", "lr": lr}})
        for name, lr in (("a", 0.125), ("b", 0.25))
    ]
    text = read_page(write_report(runs))
    assert "key a/x/run b/x/run optimizer.lr 0.125 0.25" in text
    assert re.search(r"a/x/run .*\n\| b/x/run ", table_of(runs))


ACCURACIES = {
    "none": (0.9, 0.91, 0.92),
    "grid": (0.93, 0.93, 0.95),
    "tuned": (0.96, 0.97, 0.95),
    "both": (0.97, 0.96, 0.97),
}


@pytest.fixture(scope="module")
def rivals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rivals")
    runs = []
    for row, accuracies in ACCURACIES.items():
        for seed, accuracy in enumerate(accuracies):
            values = decays(MLP) if row == "tuned" else ()
            config = {
                "train": {"seed": seed},
                "optimizer": {"name": "SGD", "lr": 0.1, "weight_decay": 0.25 + seed},
            }
            config |= {"method": {"name": "Implicit", "solver": "Neumann"} if values else None}
            config["train"]["part"] = "train_and_val" if row == "both" else "train"
            tune = PER_ELEMENT if values else None
            where = folder / row / f"seed-{seed}"
            runs.append(
                make_run(
                    where, *values, tune=tune, config=config, accuracy=accuracy, num_hyper=2 * bool(values)
                )
            )
    return runs


def test_rivals_of_three_seeds(rivals):
    write_report(rivals[6:7])
    page = write_report(rivals, rivals[0].parent.parent / "report")
    text, table = read_page(page), table_of(rivals)
    assert pictures_of(page) == {"losses", "results"}
    for row, accuracies in ACCURACIES.items():
        percents, losses = [100 * value for value in accuracies], [2 * (1 - value) for value in accuracies]
        accuracy = f"{statistics.mean(percents):.1f} ± {statistics.stdev(percents):.1f}"
        loss = f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}"
        count = "2,410" if row == "tuned" else "0"
        assert f"{row} {count} 3 {accuracy} {loss} {loss} 5,000 12.5" in text
        assert re.search(rf"\| {row} +\| +{count} \| +{accuracy} \| +{loss} \| +5,000 \| +12.5 \|", table)
    assert "train.part train train train train_and_val" in text
    assert "optimizer.weight_decay 0.25, 1.25, 2.25 0.25, 1.25, 2.25" in text
    assert "both\N{RIGHT DOUBLE QUOTATION MARK} trained on the validation set" in text
    assert "4 ways to train on digits" in text
    named = dict(re.findall(r"(best[a-z ]*): ([a-z ]+), with a test loss", text))
    without = {row: sum(of) for row, of in ACCURACIES.items() if row != "both"}
    assert named == {
        "best test accuracy": max(without, key=lambda row: without[row]),
        "best with training on the validation set too": "both",
    }
    assert 'href="../tuned/seed-0/report/report.html"' in page.read_text()


def test_runs_that_differ_in_the_seed_alone_are_put_together(tmp_path):
    runs = [
        make_run(tmp_path / f"first-{seed}", config={"train": {"seed": seed}}, accuracy=0.8 + seed / 50)
        for seed in (0, 1)
    ]
    runs += [make_run(tmp_path / "second", config={"train": {"seed": 0, "batch_size": 7}}, finished=False)]
    page = write_report(runs)
    assert page == tmp_path / "report" / "report.html"
    text = read_page(page)
    assert "3 runs in 2 rows; 1 not finished, and left out of all means." in text
    assert "first-0 0 2 81.0 ± 1.4 0.380 ± 0.028" in text
    assert "second \N{EN DASH} 0 of 1 \N{EN DASH}" in text
    assert "train.batch_size 128 7" in text


def test_sixty_runs_in_many_rows(tmp_path):
    runs = [
        make_run(tmp_path / f"row {i // 4}" / f"seed-{i % 4}", accuracy=0.5 + i / 200, steps=100)
        for i in range(60)
    ]
    text = read_page(write_report(runs, tmp_path / "report"))
    assert "60 runs in 15 rows." in text
    assert "All 60 runs" in text


def test_the_table_of_one_run(tmp_path):
    table = table_of([make_run(tmp_path / "run")]).splitlines()
    assert [cell.strip() for cell in table[2].split("|")[1:-1]] == ["test", "90.0", "0.200"]
