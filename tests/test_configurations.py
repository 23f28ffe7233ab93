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
from torch_hypergrad import Unrolled
from torch_hypergrad.cli import main
from torch_hypergrad.experiment import start
from torch_hypergrad.experiment.build import make_method
from torch_hypergrad.experiment.checks import check
from torch_hypergrad.experiment.config import Config, ConfigError
from torch_hypergrad.experiment.parsing import read_config
from torch_hypergrad.experiment.stopping import StopRequest

SHIPPED = sorted(CONFIGS.glob("*.yaml"))


NO_SOLVER = [
    "--method.solver=null",
    "--method.num_terms=null",
    "--method.damping=null",
    "--method.num_batches=null",
]


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
        ["--method.solver=nystrom", "--method.num_terms=null", "--method.rank=5", "--method.max_steps=10"],
        ["--method.solver=nystrom", "--method.num_terms=null", "--method.max_steps=0"],
        ["--method.curvature=gauss_newton"],
        ["--method.preconditioner=second_moments", "--optimizer={name: AdamW, options: {lr: 0.01}}"],
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
    for key in every_key():
        text = entries[key]
        assert "(type: " in text, key
        assert "default: " in text, key
        assert len(text.split("(type: ")[0].split()) >= 4, f"{key} has no meaning: {text}"


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.nmae=mnist"], "Unknown key data.nmae on the command line. The nearest is data.name"),
        (["--tuen=3"], "The nearest is tune"),
        (["--tune.weight_decay.pre=group"], "The nearest is tune.weight_decay.per"),
        (["--batch_size=3"], "The nearest is train.batch_size"),
        (["--tune.betas.0.per=group"], "--tune '{betas.0: {per: VALUE}}'"),
        (["--train.batch_size=1.5"], "train.batch_size: expected int or null. Got 1.5."),
        (["--train.batch_size=0"], "train.batch_size must be at least 1, got 0"),
        (["--data.name=mnst"], "got mnst. The nearest is mnist."),
        (["--tune.weight_decay.per=elment"], "The nearest is element."),
        (["--optimizer.name=Adm"], "optimizer.name=Adm is no class of torch.optim. The nearest is Adam."),
        (["--optimizer.options.mometum=0.9"], "momentum"),
        (["--optimizer.options.lr=-1"], "Invalid learning rate"),
        (["--scheduler.name=StepRL"], "The nearest is StepLR."),
        (["--scheduler.name=ReduceLROnPlateau"], "needs a metric"),
        (["--hyper_optimizer.options={lr: fast}"], "hyper_optimizer.options.lr"),
        (
            ["--method.rtol=0.1"],
            "method.rtol=0.1 does not go with method.name=implicit with method.solver=neumann",
        ),
        (
            ["--method.rank=3"],
            "method.rank=3 does not go with method.name=implicit with method.solver=neumann",
        ),
        (
            ["--method.solver=nystrom", "--method.num_terms=null", "--method.rank=0"],
            "method.rank must be at least 1, got 0",
        ),
        (
            ["--method.solver=cg", "--method.num_terms=null", "--method.max_steps=0"],
            "CG: max_steps must be at least 1, got 0",
        ),
        (["--method.curvature=gauss"], "method.curvature: expected"),
        (["--method.preconditioner=second_moments"], "SGD keeps no second moments"),
        (["--method.truncation=3"], "method.truncation=3 does not go with"),
        (["--method.max_graphs=3"], "method.max_graphs=3 does not go with method.name=implicit"),
        (["--method.max_graphs=0"], "method.max_graphs must be at least 1, got 0"),
        (["--method.max_graphs=some"], "method.max_graphs: expected int or null"),
        (
            ["--method.second_order=reversed"],
            "expected one of reverse, forward, finite_difference; got reversed.",
        ),
        (["--method.name=none"], "method.name=none trains without tuning"),
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
        (["--train.episodes=3", "--scheduler.name=null"], "one hyper step after each"),
        (["--train.device=cuda:77"], "train.device=cuda:77 cannot be used"),
        (["--train.device=meta"], "holds no numbers"),
        (["--train.device=toaster"], "train.device=toaster cannot be used"),
        (["--train.seed=-1"], "train.seed must be in"),
        (["--train.clip_norm=-1"], "train.clip_norm must be positive"),
        (["--data.label_noise=1"], "data.label_noise"),
        (["--data.train_on=val"], "overfits them"),
        (["--data.train_size=5000"], "5000"),
        (["--model.module=torch.nn.Lineer"], "Linear"),
        (["--model.module=torch.nn.Identity"], "one logit for each class"),
        (
            ["--model.module=torch.nn.Linear", "--model.options={in_features: 3, out_features: 10}"],
            "fails on images of shape",
        ),
        (["--compare.low=0"], "0 < compare.low < compare.high"),
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
        (
            "{name: unrolled, max_graphs: 3, offload: cpu}",
            "method.max_graphs=3 does not go with method.offload=cpu",
        ),
        (
            "{name: unrolled, max_graphs: 3, second_order: forward}",
            "method.max_graphs=3 does not go with method.second_order=forward",
        ),
        ("{name: forward, max_graphs: 3}", "method.max_graphs=3 does not go with method.name=forward"),
    ],
)
def test_ways_that_do_not_go_together_are_refused(method: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(f"{UNROLLED_START}\nmethod: {method}\n")
    assert message in refused("train", "--config", file, "--output.folder", tmp_path / "run")


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("{name: unrolled}", Unrolled(truncation=10)),
        ("{name: unrolled, max_graphs: 3}", Unrolled(truncation=10, max_graphs=3)),
        ("{name: unrolled, max_graphs: 3, second_order: reverse}", Unrolled(truncation=10, max_graphs=3)),
        (
            "{name: unrolled, second_order: finite_difference, max_snapshots: 4}",
            Unrolled(truncation=10, max_snapshots=4, second_order="finite_difference"),
        ),
    ],
)
def test_the_method_of_a_configuration(method: str, expected: Unrolled, tmp_path: Path) -> None:
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
        ("train: {steps: many}", "expected int or null. Got many."),
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
        (["compare", "--compare.setting=wait_decay"], "compare.setting=wait_decay"),
        (["compare", "--method.name=none", "--tune={}", *NO_SOLVER], "needs a configuration that tunes"),
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
        "resnet18",
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


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
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
