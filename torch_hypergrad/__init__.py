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
from .methods import ForwardMode, Implicit, Method, Unrolled
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
]
