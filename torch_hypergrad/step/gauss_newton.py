"""Reverse mode with the Gauss-Newton part of the Hessian in its place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import HypergradientError
from ..ground import autodiff
from ..ground.vectors import norm
from .gradient import GradientStage
from .reverse import Reverse
from .state import PerParameter, State, Step


class GaussNewton(Reverse):
    r"""A gradient whose products take the Gauss-Newton part of the Hessian, :math:`v \mapsto J^\top H_{loss}
    J v`, where J is the Jacobian of the model's outputs in the parameters and :math:`H_{loss}` the Hessian of
    the loss in the outputs. It is positive semi-definite for every loss that is convex in the outputs, such
    as cross-entropy and squared error. Mixed products are exact.

    Raises:
        HypergradientError: if there are no outputs, or the loss depends on the parameters otherwise than
            through them.

    Source: Schraudolph 2002; Martens 2020, section 8.
    """

    def __init__(
        self, stage: GradientStage, step: Step | None, state: State | None, *, batch: Any = None
    ) -> None:
        with _outputs_of(stage.live.model.model) as outputs:
            super().__init__(stage, step, state, batch=batch)
        if not outputs:
            raise HypergradientError(
                "curvature='gauss_newton' needs the model's outputs, and train_loss got none with a graph: "
                "it does not call model(...), or detaches what comes back. Call the model itself in "
                "train_loss, or use curvature='hessian'."
            )
        assert self.loss is not None
        params = self._active()
        with torch.enable_grad(), self._going_back():
            self._adj_outputs = autodiff.gradients([self.loss], outputs, create_graph=True)
            whole = [g for g in self.grads if g is not None]
            self.doubts = _outside_of_outputs(whole, outputs, self._adj_outputs, params)
            self._push, self._outputs = autodiff.linearized(outputs, params), outputs

    def product(self, v: PerParameter) -> list[Tensor | None]:
        active = [u for u, g in zip(v, self.grads) if g is not None]
        with self._going_back():
            # H_loss is symmetric.
            curved = autodiff.pulled(self._adj_outputs, self._push(active), self._outputs, retain_graph=True)
            found = autodiff.pulled(self._outputs, curved, self._active(), retain_graph=True)
        return self._spread(iter(found))

    @staticmethod
    def judge(numbers: Sequence[float]) -> None:
        """Refuses a gradient that does not come through the outputs, by its ``doubts``."""
        difference, size, tolerance = numbers
        if difference > tolerance:
            raise HypergradientError(
                f"curvature='gauss_newton': the training gradient has norm {size:.3g}, and {difference:.3g} "
                "of it does not come through the model's outputs. A penalty on the weights inside "
                "train_loss does that, or a part of the model called by itself. Use the optimizer's "
                "weight_decay for the penalty, compute the loss from what model(...) returns, or use "
                "curvature='hessian'."
            )


def _outside_of_outputs(
    whole: PerParameter, outputs: Sequence[Tensor], adj_outputs: PerParameter, params: Sequence[Tensor]
) -> list[Tensor]:
    """How much of the gradient does not come through the outputs, its norm, and what rounding may make of
    it."""
    adjoints = [_detached(a, o) for a, o in zip(adj_outputs, outputs)]
    through = autodiff.gradients(outputs, params, adjoints, retain_graph=True)
    pairs = [(_detached(w, p), _detached(t, p)) for w, t, p in zip(whole, through, params)]
    difference = norm([w - t for w, t in pairs])
    size = torch.maximum(norm([w for w, _ in pairs]), norm([t for _, t in pairs]))
    return [difference, size, size * max(torch.finfo(t.dtype).eps for t in [*outputs, *params]) ** 0.5]


def _detached(tensor: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tensor is None else tensor.detach()


@contextmanager
def _outputs_of(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what ``model`` returns while the block runs: every floating-point tensor with a graph, of
    every call.

    The caller gets views of them, each a node of its own: of logits and the features that they were computed
    from, the derivative in the features is then that of the loss alone, not the one through the logits.
    """
    outputs: list[Tensor] = []

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
