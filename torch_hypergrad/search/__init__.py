"""Search over what has no gradient, on Optuna's own objects, with hypergradients inside each trial."""

from ..extras import check_installed

check_installed("search", "numpy", "optuna")

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
