"""Gradient-based hyperparameter optimization for PyTorch."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # each is imported when it is first asked for: torch takes seconds, and the help needs none
    from .device.host_memory import keep_freed_memory
    from .errors import (
        HypergradientError,
        NonFiniteError,
        NotTwiceDifferentiableError,
        SolverError,
        TrajectoryError,
    )
    from .experiment.trained import TrainedModel, load_run
    from .hyper_optimizer import Evaluation, HyperOptimizer, HyperReport
    from .methods import DrMAD, ForwardMode, Implicit, Method, Unrolled
    from .methods.unrolled import t1t2
    from .solvers import CG, Cholesky, Identity, Neumann, Nystrom, SolveInfo, Solver
    from .step.buffer_rules import BufferRule, register_buffers
    from .transforms import clip_grad_norm
    from .tune.adaptive_step import AdaptiveStep
    from .tune.hyperparameter import Hyperparameter, TensorHyperparameter
    from .updates import UpdateRule, register_update

__version__ = "0.1.0"

__all__ = [
    "CG",
    "AdaptiveStep",
    "BufferRule",
    "Cholesky",
    "DrMAD",
    "Evaluation",
    "ForwardMode",
    "HyperOptimizer",
    "HyperReport",
    "HypergradientError",
    "Hyperparameter",
    "Identity",
    "Implicit",
    "Method",
    "Neumann",
    "NonFiniteError",
    "NotTwiceDifferentiableError",
    "Nystrom",
    "SolveInfo",
    "Solver",
    "SolverError",
    "TensorHyperparameter",
    "TrainedModel",
    "TrajectoryError",
    "Unrolled",
    "UpdateRule",
    "clip_grad_norm",
    "keep_freed_memory",
    "load_run",
    "register_buffers",
    "register_update",
    "t1t2",
]

_HOMES = {
    "keep_freed_memory": "device.host_memory",
    "HypergradientError": "errors",
    "NonFiniteError": "errors",
    "NotTwiceDifferentiableError": "errors",
    "SolverError": "errors",
    "TrajectoryError": "errors",
    "TrainedModel": "experiment.trained",
    "load_run": "experiment.trained",
    "Evaluation": "hyper_optimizer",
    "HyperOptimizer": "hyper_optimizer",
    "HyperReport": "hyper_optimizer",
    "DrMAD": "methods",
    "ForwardMode": "methods",
    "Implicit": "methods",
    "Method": "methods",
    "Unrolled": "methods",
    "t1t2": "methods.unrolled",
    "CG": "solvers",
    "Cholesky": "solvers",
    "Identity": "solvers",
    "Neumann": "solvers",
    "Nystrom": "solvers",
    "SolveInfo": "solvers",
    "Solver": "solvers",
    "BufferRule": "step.buffer_rules",
    "register_buffers": "step.buffer_rules",
    "clip_grad_norm": "transforms",
    "AdaptiveStep": "tune.adaptive_step",
    "Hyperparameter": "tune.hyperparameter",
    "TensorHyperparameter": "tune.hyperparameter",
    "UpdateRule": "updates",
    "register_update": "updates",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
