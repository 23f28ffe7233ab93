"""What is kept of the steps since the last hyper step, to go back over them."""

from .base import History
from .generators import GeneratorPath
from .graphs import KeptGraphs, Newest, Shelf, Within
from .snapshots import Snapshots

__all__ = ["GeneratorPath", "History", "KeptGraphs", "Newest", "Shelf", "Snapshots", "Within"]
