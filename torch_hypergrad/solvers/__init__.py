"""Solvers of linear systems, one in each file."""

from .base import SolveInfo, Solver
from .cg import CG
from .cholesky import Cholesky
from .identity import Identity
from .neumann import Neumann
from .nystrom import Nystrom

__all__ = ["CG", "Cholesky", "Identity", "Neumann", "Nystrom", "SolveInfo", "Solver"]
