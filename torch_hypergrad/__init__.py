"""Gradient-based hyperparameter optimization for PyTorch."""

from .device.host_memory import keep_freed_memory
from .errors import (
    HypergradientError,
    NonFiniteError,
    NotTwiceDifferentiableError,
    SolverError,
    TrajectoryError,
)
from .hyper_optimizer import Evaluation, HyperOptimizer, HyperReport
from .methods import DrMAD, ForwardMode, Implicit, Method, Unrolled
from .methods.unrolled import t1t2
from .solvers import CG, Cholesky, Identity, Neumann, Nystrom, SolveInfo, Solver
from .step.buffer_rules import BufferRule, register_buffers
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
    "TrajectoryError",
    "Unrolled",
    "UpdateRule",
    "keep_freed_memory",
    "register_buffers",
    "register_update",
    "t1t2",
]
