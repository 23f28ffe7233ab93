"""Search over what has no gradient, on Optuna's own objects, with hypergradients inside each trial."""

try:
    import optuna as _optuna  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "optuna":
        raise
    raise ModuleNotFoundError(
        "torch_hypergrad.search is built on Optuna, which is not installed: pip install "
        "'torch-hypergrad[search]'.",
        name="optuna",
    ) from None

from .cost import best_so_far, hyper_step_cost
from .heartbeat import watched
from .hybrid import TrialTuning, hypergradients
from .names import PRUNERS, SAMPLERS, make_pruner, make_sampler
from .objective import objective_of, pruned_on_error
from .space import make_space
from .storage import make_storage
from .study import create_study

__all__ = [
    "PRUNERS",
    "SAMPLERS",
    "TrialTuning",
    "best_so_far",
    "create_study",
    "hyper_step_cost",
    "hypergradients",
    "make_pruner",
    "make_sampler",
    "make_space",
    "make_storage",
    "objective_of",
    "pruned_on_error",
    "watched",
]
