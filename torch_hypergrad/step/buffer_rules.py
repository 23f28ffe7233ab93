"""What a module says of its buffers: how they move with the weights, and how its output depends on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn

from .buffer_calls import Values

After: TypeAlias = Callable[..., Values]
Reads: TypeAlias = Callable[..., "Tensor | None"]


@dataclass(frozen=True)
class BufferRule:
    """How the buffers of a kind of module move, and how its output depends on them.

    Args:
        after: ``after(module, buffers, *args, **kwargs) -> dict``, the buffers after a call of the module
            with these arguments, in the mode that it is in, in differentiable arithmetic; those that are left
            out do not move.
        reads: ``reads(module, buffers, *args, **kwargs) -> Tensor``, the output of the call as a function of
            the buffers, or None where it does not read them. None: it never does.
    """

    after: After
    reads: Reads | None = None


_RULES: dict[type[nn.Module], BufferRule] = {}


def register_buffers(module_type: type[nn.Module], *, after: After, reads: Reads | None = None) -> None:
    """Says how the floating-point buffers of a kind of module move, so that hypergradients go through them.

    The arguments are those of :class:`BufferRule`. It holds for classes that inherit ``forward`` unchanged.
    Buffers of other modules are constants of differentiation. For :class:`Implicit` each entry must follow
    from the same entry before, linearly, as in a running mean; and a training loss that reads it takes it for
    a constant.

    Example:
        >>> class Center(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_buffer("mean", torch.zeros(()))
        ...     def forward(self, x):
        ...         if not self.training:
        ...             return x - self.mean
        ...         self.mean.lerp_(x.detach().mean(), 0.1)
        ...         return x - x.mean()
        >>> register_buffers(
        ...     Center,
        ...     after=lambda m, old, x: {"mean": old["mean"].lerp(x.mean(), 0.1)} if m.training else {},
        ...     reads=lambda m, buffers, x: None if m.training else x - buffers["mean"])
    """
    _RULES[module_type] = BufferRule(after, reads)


def rule_of(module: nn.Module) -> BufferRule | None:
    """The rule of a module, None if it has none."""
    base = next((base for base in type(module).__mro__ if base in _RULES), None)
    return None if base is None or type(module).forward is not base.forward else _RULES[base]
