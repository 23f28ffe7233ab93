"""Configurations: those that come with the package are valid, and a bad one ends
in one line before anything starts."""

from __future__ import annotations

import contextlib
import copy
import io
import signal
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runs import CONFIGS, CONFIGURATIONS, run_command
from torch_hypergrad import CG, Implicit, Unrolled
from torch_hypergrad.cli import main
from torch_hypergrad.experiment import start
from torch_hypergrad.experiment.build import make_method
from torch_hypergrad.experiment.checks import check
from torch_hypergrad.experiment.config import Config, ConfigError
from torch_hypergrad.experiment.old import is_old, today
from torch_hypergrad.experiment.options import section
from torch_hypergrad.experiment.parsing import _take_config, read_config
from torch_hypergrad.experiment.stopping import StopRequest

SHIPPED = sorted(CONFIGS.glob("*.yaml"))


UNROLLED_START = "tune: {weight_decay: {}}\ntrain: {steps: 20, hyper_every: 10}"


def refused(*arguments: object) -> str:
    """The one line in which a command ends with exit code 2."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    assert code == 2, out.getvalue() + err.getvalue()
    lines = err.getvalue().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("torch-hypergrad: error: ")
    return lines[0]


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    file = tmp_path / "digits.yaml"
    file.write_text(CONFIGURATIONS["implicit"])
    return file


# ---- what comes with the package ---------------------------------------------------------------------------


def test_the_promised_configurations_are_there() -> None:
    promised = {
        "digits_weight_decay",
        "mnist_weight_decay",
        "mnist_learning_rate_schedule",
        "mnist_data_cleaning",
        "cifar10_weight_decay",
        "cifar10_augmentation",
    }
    assert promised <= {file.stem for file in SHIPPED}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_shipped_configuration_is_valid_and_documented(file: Path) -> None:
    read_config(file)
    text = file.read_text()
    assert text.startswith("# "), "what it is for"
    assert "compare:" in text, "what its rivals search"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--method.solver", "Nystrom", "--method.solver.rank=5", "--method.solver.max_steps", "10"],
        ["--method.solver={name: Nystrom, max_steps: 0, damping: 0.1}"],
        ["--method", "Implicit", "--method.solver", "Cholesky", "--method.solver.damping", "0.1"],
        ["--method.curvature=gauss_newton"],
        ["--method.preconditioner=second_moments", "--optimizer=AdamW", "--optimizer.lr", "1e-2"],
    ],
    ids=" ".join,
)
def test_every_option_of_the_implicit_method_can_be_chosen(arguments: list[str], digits: Path) -> None:
    assert main(["train", "--config", str(digits), *arguments, "--dry_run=true"]) == 0


# ---- help --------------------------------------------------------------------------------------------------


def every_key(kind: type = Config, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(kind)
    for f in fields(kind):
        if is_dataclass(hints[f.name]):
            yield from every_key(hints[f.name], f"{prefix}{f.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + f.name


@pytest.mark.parametrize("command", ["train", "compare"])
def test_help_shows_every_key_with_type_default_and_meaning(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    entries = {block.split()[0]: " ".join(block.split()[1:]) for block in shown.split("\n  --")[1:]}
    assert "Path to a configuration file" not in shown  # which a section alone does not take
    for key in every_key():
        text = entries[key]
        assert "(type: " in text, key
        assert "default: " in text, key
        assert len(text.split("(type: ")[0].split()) >= 4, f"{key} has no meaning: {text}"


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.root=x"], "--data.root is now --task.root."),
        (["--optimizer.options.lr=1"], "--optimizer.options.lr is now --optimizer.lr."),
        (["--task.dtaa=mnist"], "task: ImageClassification has no dtaa. Did you mean data?"),
        (["--tuen=3"], "The nearest is tune"),
        (["--tune.weight_decay.pre=group"], "The nearest is tune.weight_decay.per"),
        (["--batch_size=3"], "The nearest is train.batch_size"),
        (["--train.lr=3"], "The nearest is optimizer.lr"),
        (["--conf=here.yaml"], "The nearest is config"),
        (["--tune.betas.0.pre=group"], "The nearest is tune.betas.0.per"),
        (["--train.batch_size=1.5"], "train.batch_size: got 1.5, expected int of at least 1 or null."),
        (["--train.batch_size=0"], "train.batch_size: got 0, expected int of at least 1 or null."),
        (["--task.data=mnst"], "task.data: got 'mnst', expected one of digits, mnist"),
        (["--tune.weight_decay.per=elment"], "The nearest is element."),
        (["--optimizer.name=Adm"], "optimizer: there is no Adm. The nearest is Adam;"),
        (["--optimizer=sgd"], "optimizer: there is no sgd. The nearest is SGD;"),
        (["--optimizer.mometum=0.9"], "momentum"),
        (["--optimizer.lr=-1"], "Invalid learning rate"),
        (["--scheduler.name=StepRL"], "The nearest is StepLR;"),
        (["--scheduler.name=ReduceLROnPlateau"], "needs a metric"),
        (["--hyper_optimizer.lr=fast"], "hyper_optimizer.lr: got 'fast', expected "),
        (["--method.rtol=0.1"], "method: Implicit has no rtol. It has solver, num_batches"),
        (["--method.solver.rank=3"], "method.solver: Neumann has no rank. It has num_terms, scale"),
        (["--method.solver=neumann"], "method.solver: there is no neumann. The nearest is Neumann;"),
        (["--method.solver={name: Nystrom, rank: 0}"], "rank must be at least 1, got 0"),
        (["--method.solver={name: CG, max_steps: 0}"], "CG: max_steps must be at least 1, got 0"),
        (["--method.solver.num_terms=many"], "method.solver.num_terms: got 'many', expected int."),
        (["--method=Implicit"], "solver"),
        (["--method.solver.rank"], "--method.solver.rank needs a value."),
        (
            ["--method.solver=os.getcwd"],
            "method.solver: os.getcwd is no subclass of torch_hypergrad's Solver.",
        ),
        (["--method.solver={num_terms: {}}"], "method.solver.num_terms: got {}, expected int."),
        (["--method={name: 3}"], "method needs the name of a class"),
        (["--task=nowhere_at_all.MyTask"], "task: importing nowhere_at_all failed"),
        (
            ["--method.curvature=gauss"],
            "method.curvature: got 'gauss', expected one of hessian, gauss_newton.",
        ),
        (["--method.preconditioner=second_moments"], "SGD keeps no second moments"),
        (["--method.truncation=3"], "method: Implicit has no truncation."),
        (["--method={name: Unrolled, max_graphs: 0}"], "max_graphs must be at least 1, got 0"),
        (
            ["--method=Unrolled", "--method.max_graphs=some"],
            "method.max_graphs: got 'some', expected int or null.",
        ),
        (
            ["--method.second_order=reversed"],
            "method.second_order: got 'reversed', expected one of reverse, forward, finite_difference.",
        ),
        (["--method=null"], "method=null trains without tuning"),
        (["--tune={}"], "needs something to tune"),
        (["--tune={lr: {}}"], "'lr' cannot be tuned with Implicit"),
        (["--tune={lr: {per: step}}"], "train.episodes"),
        (["--tune={example_weights: {per: element}}"], "tune.example_weights.per=element"),
        (["--tune={example_weights: {init: 1.5}}"], "between 0 and 1"),
        (["--tune={augmentation: {log: true}}"], "takes no keys"),
        (["--tune={wait_decay: {}}"], "no setting 'wait_decay'"),
        (["--tune={weight_decay: {log: true, init: 0}}"], "positive start"),
        (["--tune={weight_decay: {low: 2, high: 1}}"], "must be below"),
        (["--train.steps=10"], "Give either train.steps or train.epochs"),
        (["--train.epochs=1", "--train.hyper_every=50"], "The first hyper step would be at"),
        (["--train.hyper_every=null"], "there would be no hyper step"),
        (["--train.episodes=3"], "a scheduler goes on"),
        (["--train.episodes=3", "--scheduler=null"], "one hyper step after each"),
        (["--train.device=cuda:77"], "train.device=cuda:77 cannot be used"),
        (["--train.device=meta"], "holds no numbers"),
        (["--train.device=toaster"], "train.device=toaster cannot be used"),
        (["--train.seed=-1"], "train.seed: got -1, expected int from 0 to 2**32 - 1."),
        (["--train.clip_norm=-1"], "train.clip_norm: got -1, expected positive, finite number or null."),
        (["--task.label_noise=1"], "task.label_noise"),
        (["--train.part=val"], "overfits them"),
        (["--task.train_size=5000"], "5000"),
        (["--model=torch.nn.Lineer"], "Linear"),
        (["--model=torch.nn.Identity"], "expected (2, 10)"),
        (
            ["--model", "torch.nn.Linear", "--model.in_features=3", "--model.out_features=10"],
            "fails on inputs of shape",
        ),
        (["--compare.grid_points=0"], "compare.grid_points: got 0, expected int of at least 1."),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_argument_is_refused(arguments: list[str], message: str, digits: Path, tmp_path: Path) -> None:
    assert message in refused("train", "--config", digits, "--output.folder", tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("{name: Unrolled, max_graphs: 3, offload: cpu}", "offload"),
        ("{name: Unrolled, max_graphs: 3, memory: 5}", "memory"),
        ("{name: Unrolled, memory: 1.5}", "memory"),
        ("{name: Unrolled, max_graphs: 3, second_order: forward}", "second_order"),
        ("{name: ForwardMode, max_graphs: 3}", "method: ForwardMode has no max_graphs."),
    ],
)
def test_ways_that_do_not_go_together_are_refused(method: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(f"{UNROLLED_START}\nmethod: {method}\n")
    assert message in refused("train", "--config", file, "--output.folder", tmp_path / "run")


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("{name: Unrolled}", Unrolled(truncation=10)),
        ("{name: Unrolled, max_graphs: 3}", Unrolled(truncation=10, max_graphs=3)),
        ("{name: Unrolled, max_graphs: 3, second_order: reverse}", Unrolled(truncation=10, max_graphs=3)),
        (
            "{name: Unrolled, second_order: finite_difference, max_snapshots: 4}",
            Unrolled(truncation=10, max_snapshots=4, second_order="finite_difference"),
        ),
        ("{solver: CG}", Implicit(CG())),
        ("{solver: {name: CG, max_steps: 3}}", Implicit(CG(3))),
        ("{solver: cg, max_steps: 3}", Implicit(CG(3))),  # as in version 0.1
    ],
)
def test_the_method_of_a_configuration(method: str, expected: Implicit | Unrolled, tmp_path: Path) -> None:
    file = tmp_path / "good.yaml"
    file.write_text(f"{UNROLLED_START}\nmethod: {method}\n")
    assert make_method(read_config(file)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: [1, 2", "is no YAML"),
        ("- a list", "must hold sections"),
        ("train: 3", "train is a section"),
        ("tune: {weight_decay: 1.0e-3}", "tune.weight_decay is a section"),
        ("3: {}", "Keys are names"),
        ("train: {stesp: 3}", "The nearest is train.steps"),
        ("train: {steps: many}", "train.steps: got 'many', expected int of at least 1 or null."),
        ("train: !!python/object/apply:os.getcwd []", "is no YAML"),
    ],
)
def test_a_bad_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    assert message in refused("train", "--config", file, "--output.folder", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "command"),
        (["trian"], "invalid choice"),
        (["resume", "nowhere"], "nowhere is no folder of a run"),
        (["report", "nowhere"], "nowhere"),
        (["compare", "--seeds=0"], "--seeds and --jobs must be at least 1"),
        (["compare", "--compare.space={optimizer.wait_decay: [0, 1]}"], "SGD has no wait_decay"),
        (["compare", "--compare.samplers=[grd]"], "Did you mean 'grid'?"),
        (["compare", "--compare.grid_points=1"], "at least 2 points"),
        (["compare", "--method=null", "--tune={}"], "needs a configuration that tunes"),
    ],
)
def test_a_bad_command_is_refused(arguments: list[str], message: str, digits: Path) -> None:
    if arguments[:1] == ["compare"]:
        arguments = ["compare", "--config", str(digits), *arguments[1:]]
    assert message in refused(*arguments)


def test_a_folder_that_holds_a_run_is_not_overwritten(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    told = refused("train", "--config", digits, "--output.folder", tmp_path / "run")
    assert f"torch-hypergrad resume {tmp_path / 'run'}" in told


def test_a_printed_configuration_can_be_run(digits: Path, tmp_path: Path) -> None:
    printed = run_command("train", "--config", digits, "--train.seed", 7, "--print_config")
    (tmp_path / "printed.yaml").write_text(printed.stdout)
    assert main(["train", "--config", str(tmp_path / "printed.yaml"), "--dry_run=true"]) == 0
    assert yaml.safe_load(printed.stdout)["train"]["seed"] == 7


# ---- mutated configurations --------------------------------------------------------------------------------

JUNK = [
    *(None, True, False, 0, 1, -1, 3, 2**63, 0.5, -0.5, 1e-12, 1e30, float("nan"), float("inf")),
    *(
        "",
        "x",
        "none",
        "auto",
        "element",
        "../x",
        "é\u2028",
        "1e-3",
        "null",
        "SGD",
        "Adam",
        "ASGD",
        "LBFGS",
        "ResNet18",
        "Neumann",
        "torch.nn.Identity",
    ),
    *([], [1], ["a", None], {}, {"a": 1}, {"per": "step"}, {"lr": 0.1, "betas": 3}, [[1], {"b": []}]),
]
SOURCES = [yaml.safe_load(text) for text in CONFIGURATIONS.values()] + [
    yaml.safe_load(file.read_text()) for file in SHIPPED
]


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = content.items() if isinstance(content, dict) else ()
    return [path] * bool(path) + [place for key, value in inner for place in places(value, (*path, key))]


def section_of(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        content = content[key]
    return content


@st.composite
def mutated(draw: st.DrawFn, sources: Sequence[Any] = SOURCES, most_faults: int = 3) -> str:
    """A valid configuration with some faults."""
    content = copy.deepcopy(draw(st.sampled_from(sources)))
    for _ in range(draw(st.integers(1, most_faults))):
        there = places(content)
        if not there:
            break
        path = draw(st.sampled_from(there))
        section, key = section_of(content, path), path[-1]
        kind = draw(st.sampled_from(["value", "value", "value", "remove", "rename", "move", "add"]))
        if kind == "value":
            section[key] = copy.deepcopy(draw(st.sampled_from(JUNK)))
        elif kind == "remove":
            del section[key]
        elif kind == "rename":
            section[f"{key}{draw(st.sampled_from(['', 's', '_', '.0', ' ']))}"[draw(st.integers(0, 1)) :]] = (
                section.pop(key)
            )
        elif kind == "move":
            content[draw(st.sampled_from([f.name for f in fields(Config)]))] = section.pop(key)
        else:
            section[draw(st.sampled_from(["lr", "name", "options", "steps", "per", "solver", "x", 3]))] = 1
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    cut = draw(st.sampled_from([None, None, None, None, len(text) // 2]))
    return text[:cut]


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=mutated())
def test_mutated_configurations_are_valid_or_refused_in_one_line(text: str) -> None:
    out, err = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "mutated.yaml")
        file.write_text(text, encoding="utf-8")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(
                ["train", "--config", str(file), "--output.folder", f"{folder}/run", "--dry_run=true"]
            )
        assert [path.name for path in Path(folder).iterdir()] == ["mutated.yaml"], "a run has started"
    lines = err.getvalue().splitlines()
    if code == 0:
        assert out.getvalue() == "The configuration can be run.\n"
    else:
        assert code == 2
        assert len(lines) == 1, lines
        assert lines[0].startswith("torch-hypergrad: error: ")
        assert out.getvalue() == ""


class StopSoon(StopRequest):
    """A stop after three training steps, so that no mutation trains for ever."""

    def __init__(self) -> None:
        super().__init__(signal=signal.SIGINT)
        self._left = 3

    @property
    def requested(self) -> bool:
        self._left -= 1
        return self._left < 0


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(text=mutated(SOURCES[: len(CONFIGURATIONS)], most_faults=1))
def test_mutated_configurations_train_or_end_in_one_line(text: str) -> None:
    err = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "stop_on_signals", lambda: contextlib.nullcontext(StopSoon()))
        patch.chdir(folder)
        Path("mutated.yaml").write_text(text, encoding="utf-8")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            code = main(["train", "--config", "mutated.yaml"])
    last = err.getvalue().splitlines()[-1]
    assert code in (0, 1, 2, 3, 128 + signal.SIGINT), last
    assert code in (0, 3) or last.startswith(("torch-hypergrad: ", "Stopped. Go on with: "))


def test_checks_let_the_defaults_pass() -> None:
    with pytest.raises(ConfigError, match="Give either"):
        check(Config())


OLD = {
    "data: {name: mnist, train_on: val}\nmodel: {name: mlp, options: {hidden: [3]}}": {
        "task": {"name": "ImageClassification", "data": "mnist"},
        "model": {"name": "MLP", "hidden": [3]},
    },
    "optimizer: {options: {lr: 0.5}}\nhyper_optimizer: {name: SGD, options: {}}": {
        "optimizer": {"name": "SGD", "lr": 0.5},
        "hyper_optimizer": {"name": "SGD"},
    },
    "model: {module: my.Net, options: {a: 1}}\nscheduler: {name: null}": {
        "model": {"name": "my.Net", "a": 1},
    },
    "scheduler: {name: StepLR, options: {step_size: 2}, every: epoch}": {
        "scheduler": {"name": "StepLR", "step_size": 2}
    },
    "method: {name: implicit, solver: nystrom, rank: 3, curvature: gauss_newton, truncation: null}": {
        "method": {
            "name": "Implicit",
            "solver": {"name": "Nystrom", "rank": 3},
            "curvature": "gauss_newton",
        }
    },
    "method: {num_terms: 3, name: implicit}": {
        "method": {"name": "Implicit", "solver": {"name": "Neumann", "num_terms": 3}}
    },
    "method: {name: unrolled, max_graphs: 2}": {"method": {"name": "Unrolled", "max_graphs": 2}},
    "method: {name: forward}": {"method": {"name": "ForwardMode"}},
    "method: {name: none}": {"method": None},
    "output: {tensorboard: false, log_every: 3}": {"output": {"loggers": [], "log_every": 3}},
    "compare: {setting: lr, high: 2, grid_size: 7}": {
        "compare": {
            "space": {"optimizer.lr": {"type": "float", "low": 1e-5, "high": 2, "log": True}},
            "grid_points": 7,
        }
    },
}


@pytest.mark.parametrize("text", OLD)
def test_configurations_of_version_0_1_are_read(text: str) -> None:
    content = yaml.safe_load(text)
    assert is_old(content)
    new = today(content)
    assert {section: new[section] for section in OLD[text]} == OLD[text]
    assert not is_old(new)
    section(Config, new)
    if "train_on" in text:
        assert new["train"] == {"part": "val"}
    if "every: epoch" in text:
        assert new["train"] == {"scheduler_every": "epoch"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--optimizer.lr=0.5"], {"name": "SGD", "lr": 0.5}),
        (["--optimizer=Adam"], {"name": "Adam"}),
        (["--optimizer.name=Adam", "--optimizer.lr=1e-3"], {"name": "Adam", "lr": 1e-3}),
        (
            ["--optimizer={name: SGD, momentum: 0.9}", "--optimizer.lr=1"],
            {"name": "SGD", "momentum": 0.9, "lr": 1},
        ),
    ],
)
def test_a_name_begins_a_class_anew_and_arguments_change_one(
    given: list[str], expected: dict[str, Any]
) -> None:
    content: dict[str, Any] = {}
    assert _take_config([*given, "--train.steps=1", "--dry_run"], content, [], ["--dry_run"]) == ["--dry_run"]
    assert content["optimizer"] == expected


def test_arguments_of_arguments_change_likewise() -> None:
    content: dict[str, Any] = {}
    words = ["--method.solver.num_terms", "5", "--method.num_batches", "2", "--tune.betas.0.per", "tensor"]
    _take_config(words, content, [], [])
    assert content["method"] == {
        "name": "Implicit",
        "solver": {"name": "Neumann", "num_terms": 5},
        "num_batches": 2,
    }
    assert content["tune"] == {"betas.0": {"per": "tensor"}}
    _take_config(["--method.solver", "CG", "--method.solver.rtol", "1e-3"], content, [], [])
    assert content["method"]["solver"] == {"name": "CG", "rtol": 1e-3}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--method.help"], ["Implicit", "Unrolled", "ForwardMode", "DrMAD"]),
        (["--method.help", "Implicit"], ["--method.solver", "--method.curvature", "num_batches"]),
        (["--method.solver.help", "Neumann"], ["--method.solver.num_terms", "default: 20"]),
        (["--optimizer.help", "SGD"], ["--optimizer.momentum"]),
        (["--task.help", "TabularRegression"], ["--task.target", "the column to be told"]),
        (["--model.help", "CNN"], ["--model.width"]),
    ],
)
def test_help_of_a_named_class(
    words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *words]) == 0
    shown = capsys.readouterr().out
    assert all(part in shown for part in parts), shown
    assert "--model.input_shape" not in shown


def test_help_of_a_class_that_does_not_exist() -> None:
    assert "there is no Implicitt. The nearest is Implicit" in refused("train", "--method.help", "Implicitt")
    assert "names no class" in refused("train", "--model.hidden.help", "x")
