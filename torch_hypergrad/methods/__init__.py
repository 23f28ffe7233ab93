"""Ways to compute a hypergradient, one in each file."""

from .base import Method, Statistics, Validate, Window
from .drmad import DrMAD
from .forward_mode import ForwardMode
from .implicit import Implicit
from .unrolled import Unrolled

__all__ = ["DrMAD", "ForwardMode", "Implicit", "Method", "Statistics", "Unrolled", "Validate", "Window"]
