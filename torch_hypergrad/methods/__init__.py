"""Ways to compute a hypergradient, one in each file."""

from .base import Method, Recording, Statistics, Validation
from .forward_mode import ForwardMode
from .implicit import Implicit
from .unrolled import Unrolled

__all__ = ["ForwardMode", "Implicit", "Method", "Recording", "Statistics", "Unrolled", "Validation"]
