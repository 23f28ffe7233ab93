"""Values and other messages, as part of a message of one line."""

from __future__ import annotations

from typing import Any


def one_line(message: object) -> str:
    """Its text with single spaces in place of line ends."""
    return " ".join(str(message).split())


def shortened(value: Any) -> str:
    """A value in a message, on one line."""
    text = "null" if value is None else one_line(repr(value))
    return text if len(text) < 80 else text[:77] + "..."
