"""Tasks: what a network is to learn. A task of one's own is a subclass of :class:`Task`."""

from .base import Batch, Examples, InMemory, Metric, Split, Task
from .images import ImageClassification
from .tabular import TabularClassification, TabularRegression
from .text import TextBytes

__all__ = [
    "Batch",
    "Examples",
    "ImageClassification",
    "InMemory",
    "Metric",
    "Split",
    "TabularClassification",
    "TabularRegression",
    "Task",
    "TextBytes",
]
