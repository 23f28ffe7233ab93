"""Products with the derivative of the training gradient: the Hessian, its Gauss-Newton part, and mixed derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from . import autodiff
from .errors import HypergradientError
from .readings import Reading, in_turn, now_or_later
from .vectors import norm

PerParameter: TypeAlias = Sequence[Tensor | None]
"""One tensor for each parameter of the optimizer; None for zero."""

Pull: TypeAlias = Callable[[PerParameter], "list[Tensor | None]"]
"""From the adjoint of the training gradient to a product with its derivative."""


@dataclass(frozen=True)
class BatchGraph:
    """The training loss on one batch, and what was computed on the way.

    Args:
        loss: the loss, with graph.
        grads: its gradients, with graph; None for parameters that it does not depend on.
        outputs: what the model returned, with graph, where that was asked for.
    """

    loss: Tensor
    grads: PerParameter
    outputs: Sequence[Tensor] = ()


class GradientGraph:
    """The mean training gradient over some batches, whose graph all products share.

    Args:
        batches: the graphs.
        params: the optimizer's parameters.
        tensors: the tuned tensors that the training loss reads.
    """

    error: ClassVar[None] = None
    """Products are exact."""

    def __init__(self, batches: Sequence[BatchGraph], params: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        self._params, self._tensors = list(params), list(tensors)
        self._batches = list(batches)
        self.active = [any(batch.grads[i] is not None for batch in batches) for i in range(len(params))]
        self._inputs = [p for p, active in zip(params, self.active) if active]

    def mean(self) -> list[Tensor | None]:
        """The gradient for each parameter, without graph."""
        means: list[Tensor | None] = []
        for of_batches in zip(*(batch.grads for batch in self._batches)):
            present = [g.detach() for g in of_batches if g is not None]
            means.append(torch.stack(present).sum(0) / len(self._batches) if present else None)
        return means

    def hessian_product(self, adj_grads: PerParameter) -> list[Tensor | None]:
        """``(dg/dtheta)^T v`` by one double backward pass for each batch, for each parameter."""
        return self._spread(self._pull(adj_grads, self._inputs))

    def mixed_product(self, adj_grads: PerParameter) -> list[Tensor | None]:
        """``(dg/dlambda)^T v`` for each tuned tensor of the training loss."""
        return self._pull(adj_grads, self._tensors)

    def gauss_newton(self) -> tuple[Pull, Reading[None] | None]:
        r"""The Gauss-Newton part of the Hessian, :math:`v \mapsto J^\top H_{loss} J v`, where J is the Jacobian of the
        model's outputs in the parameters and :math:`H_{loss}` the Hessian of the loss in the outputs. It is positive
        semi-definite for every loss that is convex in the outputs, such as cross-entropy and squared error. Beside it, what
        raises the second error below once it is read, None if that was possible at once.

        Raises:
            HypergradientError: if there are no outputs, or the loss depends on the parameters otherwise than through them.

        Source: Schraudolph 2002; Martens 2020, section 8.
        """
        parts, checks = zip(*map(self._gauss_newton_of, self._batches))

        def pull(adj_grads: PerParameter) -> list[Tensor | None]:
            tangents = [adj_grads[i] for i, active in enumerate(self.active) if active]
            if len(parts) == 1:
                return self._spread(parts[0](tangents))
            products = [part(tangents) for part in parts]
            return self._spread([_mean(of_param, len(parts)) for of_param in zip(*products)])

        return pull, reduce(in_turn, checks)

    def _gauss_newton_of(
        self, batch: BatchGraph
    ) -> tuple[Callable[[PerParameter], list[Tensor | None]], Reading[None] | None]:
        outputs, params = list(batch.outputs), self._inputs
        if not outputs:
            raise HypergradientError(
                "curvature='gauss_newton' needs the model's outputs, and train_loss got none with a graph: it does not call "
                "model(...), or detaches what comes back. Call the model itself in train_loss, or use curvature='hessian'."
            )
        with torch.enable_grad():
            adj_outputs = autodiff.gradients([batch.loss], outputs, create_graph=True)
        whole = [g for g, active in zip(batch.grads, self.active) if active]
        check = _check_through_outputs(whole, outputs, adj_outputs, params)
        push = autodiff.linearized(outputs, params)
        used = [a for a in adj_outputs if a is not None]

        def product(tangents: PerParameter) -> list[Tensor | None]:
            tan_outputs = push(tangents)
            tan_used = [t for t, a in zip(tan_outputs, adj_outputs) if a is not None]
            curved = autodiff.gradients(used, outputs, tan_used, retain_graph=True)  # H_loss is symmetric
            if all(c is None for c in curved):
                return [None] * len(params)
            pairs = [(o, c) for o, c in zip(outputs, curved) if c is not None]
            return autodiff.gradients([o for o, _ in pairs], params, [c for _, c in pairs], retain_graph=True)

        return product, check

    def _pull(self, adj_grads: PerParameter, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        pairs = [(g, v) for batch in self._batches for g, v in zip(batch.grads, adj_grads) if g is not None and v is not None]
        share = 1 / len(self._batches)
        adjoints = [v if share == 1 else v * share for _, v in pairs]
        return autodiff.gradients([g for g, _ in pairs], inputs, adjoints, retain_graph=True)

    def _spread(self, products: Sequence[Tensor | None]) -> list[Tensor | None]:
        """One entry for each parameter from one for each active parameter."""
        waiting = iter(products)
        return [next(waiting) if active else None for active in self.active]


def _mean(parts: Sequence[Tensor | None], num: int) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.stack(present).sum(0) / num if present else None


def _check_through_outputs(
    whole: PerParameter, outputs: Sequence[Tensor], adj_outputs: PerParameter, params: Sequence[Tensor]
) -> Reading[None] | None:
    """Refuses a loss whose gradient is not the one that comes through the outputs."""
    through = autodiff.gradients(outputs, params, [_detached(a, o) for a, o in zip(adj_outputs, outputs)], retain_graph=True)
    pairs = [(_detached(w, p), _detached(t, p)) for w, t, p in zip(whole, through, params)]
    norms = [norm([w - t for w, t in pairs]), norm([w for w, _ in pairs]), norm([t for _, t in pairs])]
    tolerance = max(torch.finfo(t.dtype).eps for t in [*outputs, *params]) ** 0.5
    return now_or_later(norms, partial(_refuse_other_ways, tolerance))


def _refuse_other_ways(tolerance: float, norms: Sequence[float]) -> None:
    difference, size = norms[0], max(norms[1:])
    if difference > tolerance * size:
        raise HypergradientError(
            f"curvature='gauss_newton': the training gradient has norm {size:.3g}, and {difference:.3g} of it does not come "
            "through the model's outputs. A penalty on the weights inside train_loss does that, or a part of the model called "
            "by itself. Use the optimizer's weight_decay for the penalty, compute the loss from what model(...) returns, or "
            "use curvature='hessian'."
        )


def _detached(tensor: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tensor is None else tensor.detach()


@contextmanager
def captured_outputs(model: nn.Module | None) -> Iterator[list[Tensor]]:
    """Collects what ``model`` returns while the block runs: every floating-point tensor with a graph, of every call.
    Nothing for None.

    The caller gets views of them, each a node of its own: of logits and the features that they were computed from, the
    derivative in the features is then that of the loss alone, not the one through the logits.
    """
    outputs: list[Tensor] = []
    if model is None:
        yield outputs
        return

    def view(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_floating_point()):
            return leaf
        outputs.append(leaf.view_as(leaf))
        return outputs[-1]

    handle = model.register_forward_hook(lambda module, arguments, output: tree_map(view, output))
    try:
        yield outputs
    finally:
        handle.remove()
