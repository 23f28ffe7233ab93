"""Both problems as problems of optimization: training to a tolerance, and tuning by scipy or over folds."""

from ..extras import check_installed

check_installed("bilevel", "numpy", "scipy", "sklearn")

from .cross_validation import CrossValidation
from .fit import Fit, fit
from .folds import stratified_folds
from .minimize import minimize
from .tolerances import cubic, exponential, quadratic

__all__ = [
    "CrossValidation",
    "Fit",
    "cubic",
    "exponential",
    "fit",
    "minimize",
    "quadratic",
    "stratified_folds",
]
