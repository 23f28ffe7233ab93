"""The order of the package: each module imports from lower ones alone, siblings know no more than their base,
every public name is there and documented, and no file outgrows its reader."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import torch_hypergrad

PACKAGE = Path(torch_hypergrad.__file__).parent
MAX_LINES = 400

# From the bottom up. What stands on one line knows nothing of its neighbours;
# what stands nowhere here is the user's layer, above all of these.
ORDER = (
    ("errors", "extras"),
    ("ground",),
    ("device",),
    ("solvers", "updates"),
    ("tune",),
    ("step",),
    ("history",),
    ("methods",),
    ("safety",),
    ("hyper_optimizer",),
    ("bilevel", "search", "testing", "transforms"),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}

# The same inside rooms. In those that are not here, siblings know no more than their base.
INNER_ORDER = {
    "ground": (("vectors",), ("buckets", "autodiff")),
    "device": (("capture", "host_memory", "offload", "readings"),),
    "tune": (
        ("adaptive_step", "granularity", "scale"),
        ("hyperparameter",),
        ("tuned",),
        ("hyperparameter_set",),
        ("hypergradient",),
    ),
    "step": (
        ("batch", "buffer_calls", "user_functions"),
        ("buffer_rules", "state"),
        ("live_model", "live_optimizer"),
        ("live", "handed_buffers"),
        ("running",),
        ("gradient",),
        ("traced", "update"),
        ("mean_gradient", "reverse", "stationarity"),
        ("gauss_newton", "second_order"),
        ("transition", "validation"),
        ("problem",),
        ("inner_problem",),
    ),
    "history": (("base", "generators", "packing"), ("snapshots", "straight_path"), ("graphs",)),
    "methods": (("base",), ("sweep",), ("drmad", "forward_mode", "implicit", "unrolled")),
    "safety": (("checkpoint", "checks", "trust", "watch"), ("hyper_step",)),
    "bilevel": (("fit", "folds", "tolerances"), ("cross_validation",), ("minimize",)),
    "search": (
        ("cost", "samplers", "space"),
        ("names", "storage"),
        ("heartbeat",),
        ("study",),
        ("objective",),
        ("hybrid",),
    ),
}

# The same inside the user's layer. A report reads the files of runs, and knows nothing of what wrote them.
EXPERIMENT_ORDER = (
    ("config", "messages"),
    ("import_path",),
    ("checks", "edits", "loggers", "loopback", "old", "options", "order", "plain", "stopping"),
    ("networks", "parsing", "view"),
    ("tasks", "values"),
    ("run_folder",),
    ("catalog", "metrics", "objective"),
    ("build",),
    ("results", "trained"),
    ("export",),
    ("loop",),
    ("start",),
    ("study", "workers"),
    ("compare", "search"),
    ("seeds",),
)
TASKS_ORDER = (("base", "splits", "tables"), ("checked", "pictures"), ("images", "tabular", "text"))
EXPERIMENT_LEVEL = {name: level for level, names in enumerate(EXPERIMENT_ORDER) for name in names}
# The first may not import the second, though it is lower: solvers know vectors alone.
APART = {("solvers", "device"), ("solvers", "ground")}
TOP = len(ORDER)

FILES = sorted(PACKAGE.rglob("*.py"))


def dotted(file: Path) -> tuple[str, ...]:
    """The module's name inside the package: ("updates", "adam");
    a package's own file is ("updates", "__init__")."""
    return file.relative_to(PACKAGE).with_suffix("").parts


MODULES = {dotted(file) for file in FILES}


def submodules(base: tuple[str, ...], names: list[str]) -> Iterator[tuple[str, ...]]:
    """What ``from base import names`` reads: submodules where names are such,
    else the module ``base`` itself."""
    for name in names:
        inner = (*base, name)
        yield inner if inner in MODULES or (*inner, "__init__") in MODULES else base


def imports_of(source: str, module: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The modules of the package that ``source`` imports, wherever in the file, relatively or absolutely."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package, *inner = alias.name.split(".")
                if package == PACKAGE.name:
                    yield tuple(inner)
        elif isinstance(node, ast.ImportFrom):
            path = tuple(node.module.split(".")) if node.module else ()
            names = [alias.name for alias in node.names]
            if node.level:
                yield from submodules((*module[: len(module) - node.level], *path), names)
            elif path and path[0] == PACKAGE.name:
                yield from submodules(path[1:], names)


def complaint(module: tuple[str, ...], imported: tuple[str, ...]) -> str | None:
    """Why ``module`` may not import ``imported``, or None."""
    if module == ("__init__",):
        return None
    if not imported:
        return None if module[0] not in LEVEL else "is the whole package"
    own, other = module[0], imported[0]
    if own == other == "experiment":
        return complaint_in_experiment(module[1:], imported[1:])
    if own == other:
        return None if module[-1] == "__init__" else complaint_in_room(own, module[1], imported[1:])
    if (own, other) in APART:
        return f"may not know {other}"
    own_level, other_level = LEVEL.get(own, TOP), LEVEL.get(other, TOP)
    if other_level < own_level or own_level == other_level == TOP:
        return None
    if other_level == TOP:
        return "belongs to the user's layer, or needs a place in ORDER"
    return f"is on level {other_level} and the importing module on level {own_level}"


def complaint_in_room(room: str, own: str, imported: tuple[str, ...]) -> str | None:
    """The same for two modules of one room."""
    if room not in INNER_ORDER:
        return None if imported == ("base",) else "is a sibling other than base"
    if imported[:1] == (own,):  # both are in a room of this room
        return None if imported[1:] == ("base",) else "is a sibling other than base"
    level = {name: level for level, names in enumerate(INNER_ORDER[room]) for name in names}
    if imported and own in level and level.get(imported[0], TOP) < level[own]:
        return None
    return f"is no lower than the importing module in the order of {room}"


def complaint_in_experiment(module: tuple[str, ...], imported: tuple[str, ...]) -> str | None:
    """The same for two modules of the user's layer."""
    own, other = module[0], imported[0] if imported else "__init__"
    if own == "report":
        return None if other in ("report", "config", "old") else "is not for a report, which reads files"
    if own == other == "tasks":
        level = {name: level for level, names in enumerate(TASKS_ORDER) for name in names}
        lower = level.get(imported[1], TOP) < level.get(module[1], TOP)
        return None if lower else "is no lower than the importing module in the order of tasks"
    if other == "report" or EXPERIMENT_LEVEL.get(other, TOP) < EXPERIMENT_LEVEL[own]:
        return None
    return (
        f"is on level {EXPERIMENT_LEVEL.get(other, 'none')} "
        f"and the importing module on level {EXPERIMENT_LEVEL[own]}"
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: "/".join(dotted(file)))
def test_a_module_imports_from_lower_ones_alone(file):
    module = dotted(file)
    found = {other: complaint(module, other) for other in imports_of(file.read_text(), module)}
    assert not {".".join(other): why for other, why in found.items() if why}


def test_every_level_is_a_module():
    assert set(LEVEL) <= {module[0] for module in MODULES}
    inner = {module[1] for module in MODULES if module[0] == "experiment"}
    assert set(EXPERIMENT_LEVEL) == inner - {"__init__", "report"}
    for room, order in INNER_ORDER.items():
        files = {module[1] for module in MODULES if module[0] == room}
        assert {name for names in order for name in names} == files - {"__init__"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (("ground", "vectors"), "from ..updates import rule_of"),
        (("ground", "vectors"), "from .buckets import Bucket"),
        (("solvers", "cg"), "from ..step.transition import Transition"),
        (("solvers", "cg"), "from ..device.readings import Readings"),
        (("solvers", "cg"), "from .neumann import Neumann"),
        (("solvers", "cg"), "from . import neumann"),
        (("history", "snapshots"), "from .graphs import KeptGraphs"),
        (("history", "snapshots"), "from ..methods import Unrolled"),
        (("step", "gradient"), "from .transition import Transition"),
        (("step", "live_model"), "from .live_optimizer import LiveOptimizer"),
        (("updates", "adam"), "def late():\n    from .sgd import sgd"),
        (("updates", "adam"), "from ..tune.hyperparameter import Hyperparameter"),
        (("updates", "__init__"), "from ..step.update import UpdateStage"),
        (("step", "update"), "from .. import methods"),
        (("methods", "unrolled"), "from torch_hypergrad.hyper_optimizer import HyperOptimizer"),
        (("methods", "unrolled"), "import torch_hypergrad.testing"),
        (("methods", "unrolled"), "from torch_hypergrad import CG"),
        (("testing",), "from .cli import main"),
        (("hyper_optimizer",), "from .search import create_study"),
        (("bilevel", "minimize"), "from ..search import create_study"),
        (("search", "cost"), "from .study import create_study"),
        (("search", "names"), "from .storage import make_storage"),
        (("step", "update"), "from ..experiment.config import Config"),
        (("experiment", "tasks", "images"), "from .loop import Run"),
        (("experiment", "tasks", "pictures"), "from .images import pixels"),
        (("experiment", "report", "curves"), "from ..loop import Run"),
    ],
)
def test_the_walls_stop_what_breaks_the_order(module, source):
    assert any(complaint(module, other) for other in imports_of(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (("solvers", "cg"), "from .base import Solver\nfrom ..errors import SolverError\nimport torch"),
        (("solvers", "__init__"), "from .cg import CG"),
        (
            ("methods", "implicit"),
            "from ..ground import autodiff\nfrom ..solvers import Solver\nfrom ..history import History",
        ),
        (("step", "live_optimizer"), "from ..updates.base import scalar_dtype"),
        (("step", "transition"), "from .gradient import GradientStage"),
        (("cli",), "from .experiment import start\nfrom .experiment.config import Config"),
        (("cli",), "from .search import create_study"),
        (("search", "names"), "from .samplers import Reinforce\nfrom .space import make_space"),
        (("search", "hybrid"), "from ..hyper_optimizer import HyperOptimizer"),
        (("experiment", "loop"), "from ..hyper_optimizer import HyperOptimizer\nfrom .build import Parts"),
        (("experiment", "report", "curves"), "from .read import RunData\nfrom ..config import ConfigError"),
    ],
)
def test_the_walls_let_the_rest_pass(module, source):
    assert not [other for other in imports_of(source, module) if complaint(module, other)]


@pytest.mark.parametrize("name", torch_hypergrad.__all__)
def test_a_public_name_is_there_and_documented(name):
    thing = getattr(torch_hypergrad, name)
    text = inspect.getdoc(thing)
    assert text, f"{name} has no docstring"
    assert not text.startswith(f"{name}("), (
        f"{name} has no docstring of its own, only what dataclass makes up"
    )


@pytest.mark.parametrize(
    "name", [n for n in torch_hypergrad.__all__ if inspect.isclass(getattr(torch_hypergrad, n))]
)
def test_the_public_methods_of_a_public_class_are_documented(name):
    thing = getattr(torch_hypergrad, name)
    methods = [m for m, value in vars(thing).items() if not m.startswith("_") and inspect.isfunction(value)]
    assert not [m for m in methods if not inspect.getdoc(getattr(thing, m))]


def test_public_names_are_sorted_out():
    """The public API is what is exported, no more: no name twice, no private one, no module left over."""
    exported = torch_hypergrad.__all__
    assert len(set(exported)) == len(exported)
    assert not [name for name in exported if name.startswith("_")]
    assert not [name for name in exported if inspect.ismodule(getattr(torch_hypergrad, name))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: "/".join(dotted(file)))
def test_a_file_stays_short(file):
    assert len(file.read_text().splitlines()) < MAX_LINES


@pytest.mark.parametrize("file", FILES, ids=lambda file: "/".join(dotted(file)))
def test_a_file_says_what_it_holds(file):
    assert ast.get_docstring(ast.parse(file.read_text()))
