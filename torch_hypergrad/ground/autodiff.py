"""Gradients of gradients: the one place that knows autograd's corners."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import reduce
from itertools import zip_longest
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, _engine_run_backward, get_gradient_edge
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import NotTwiceDifferentiableError


def sqrt(x: Tensor) -> Tensor:
    """Square root whose derivative at 0 is 0 instead of infinite.

    Where a second moment ``v`` is 0, every gradient so far was 0, and the chain rule through ``v``
    contributes nothing: ``m / (sqrt(v) + eps)`` has the derivative ``dm / eps`` there (see
    ``docs/notation.md``).
    """
    if not x.requires_grad:
        return x.sqrt()
    zero = x == 0
    # torch.where brings numbers to the device as tensors, and waits for them: these are made there.
    return torch.where(zero, x.new_zeros(()), torch.where(zero, x.new_ones(()), x).sqrt())


def leaf(tensor: Tensor) -> Tensor:
    """The tensor's values as something to differentiate with respect to."""
    return tensor.detach().requires_grad_()


def is_float(value: object) -> bool:
    """Whether it is something to differentiate: a tensor of a floating-point type."""
    return isinstance(value, Tensor) and value.is_floating_point()


Output: TypeAlias = "Tensor | GradientEdge"
"""A tensor, or where it stands in its graph."""


def edge(tensor: Tensor) -> Output:
    """Where the tensor stands in its graph: as good as the tensor to go back from, without its values."""
    return tensor if tensor.grad_fn is None else get_gradient_edge(tensor)


def _has_graph(output: Output) -> bool:
    return isinstance(output, GradientEdge) or output.requires_grad


def gradients(
    outputs: Sequence[Output],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor | None] | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> list[Tensor | None]:
    """``torch.autograd.grad`` that gives None for what does not matter, also where no output has a graph. A
    missing vector stands for ones.

    The vectors have the shapes of their outputs: ``torch.autograd.grad`` itself asks that of each, which
    takes as long as a small network's gradient, and then calls the same function.
    """
    given = [None] * len(outputs) if grad_outputs is None else grad_outputs
    pairs = [(o, g) for o, g in zip(outputs, given) if _has_graph(o)]
    if not pairs or not inputs:
        return [None] * len(inputs)
    with explain_missing_second_derivative():
        found = _engine_run_backward(
            tuple(o for o, _ in pairs),
            tuple(torch.ones_like(o) if g is None else g for o, g in pairs),  # type: ignore[arg-type]
            create_graph if retain_graph is None else retain_graph,
            create_graph,
            tuple(inputs),
            True,  # inputs may be unused
            accumulate_grad=False,
        )
    return list(found)


def pulled(
    outputs: Sequence[Output | None],
    adjoints: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    *,
    retain_graph: bool | None = None,
) -> list[Tensor | None]:
    """Vector-Jacobian products, where outputs and adjoints that are None count nothing."""
    pairs = [(o, a) for o, a in zip(outputs, adjoints) if o is not None and a is not None]
    return gradients([o for o, _ in pairs], inputs, [a for _, a in pairs], retain_graph=retain_graph)


def add_lists(lists: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """Entry by entry; None, and what is missing at the end of a list, counts nothing."""
    total: list[Tensor | None] = []
    for column in zip_longest(*lists):
        first, *others = [t for t in column if t is not None] or [None]
        total.append(reduce(torch.add, others, first) if others else first)
    return total


def linearized(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
    """The Jacobian of ``outputs`` with respect to ``inputs`` as a function from tangents to tangents.

    Built from reverse passes alone: the vector-Jacobian product is linear in its vector, and its own
    transpose is the Jacobian-vector product. A tangent of None is zero.
    """
    dummies = [torch.zeros_like(output).requires_grad_() for output in outputs]
    with torch.enable_grad():
        transposed = gradients(outputs, inputs, dummies, create_graph=True)

    def push(tangents: Sequence[Tensor | None]) -> list[Tensor]:
        pushed = pulled(transposed, tangents, dummies, retain_graph=True)
        return [torch.zeros_like(d) if t is None else t for d, t in zip(dummies, pushed)]

    return push


def num_nodes() -> int:
    """How many nodes of graphs this thread has made so far."""
    return torch.autograd._get_sequence_nr()


@contextmanager
def weighing(others: Iterable[Tensor]) -> Iterator[Callable[[], int]]:
    """Gives a function that tells how many bytes the graphs made inside hold now, of memory that is none of
    ``others``'.

    Raises:
        RuntimeError: of torch, which names saved tensor hooks, where something inside goes with none.
    """
    known = {tensor.untyped_storage()._cdata for tensor in others}
    held: dict[int, tuple[StorageWeakRef, int]] = {}

    def pack(tensor: Tensor) -> tuple[Tensor, int]:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return tensor, tensor._version

    def unpack(packed: tuple[Tensor, int]) -> Tensor:
        tensor, version = packed
        if tensor._version != version:  # torch looks at no counters where there are hooks
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: a tensor of shape {tuple(tensor.shape)} is at version {tensor._version}; "
                f"expected version {version} instead."
            )
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield lambda: sum(size for storage, size in held.values() if not storage.expired())


def set_versions(tensors: Sequence[Tensor], versions: Sequence[int]) -> None:
    """Sets the version counters, by which autograd knows whether a graph is still valid."""
    set_version = torch._C._autograd._unsafe_set_version_counter
    if _SETS_MANY_VERSIONS:
        set_version(tuple(tensors), tuple(versions))
    else:
        for tensor, version in zip(tensors, versions):
            set_version(tensor, version)  # type: ignore[arg-type]


def _sets_many_versions() -> bool:
    """torch 2.6 takes one tensor at a time."""
    tensor = torch.zeros(())
    try:
        torch._C._autograd._unsafe_set_version_counter((tensor,), (0,))
    except TypeError:
        return False
    return True


_SETS_MANY_VERSIONS = _sets_many_versions()

_ATTENTION_KERNELS = (
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
)


@contextmanager
def differentiable_kernels(*, recurrent: bool) -> Iterator[None]:
    """Selects the kernels that can be differentiated twice.

    Fused attention has no second derivative: the math kernel has. cuDNN's recurrent layers have none
    either: for a model that contains one, cuDNN is off.
    """
    without_cudnn = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
    before = [enabled() for enabled, _ in _ATTENTION_KERNELS]
    if before == [False, False, False, True] and not recurrent:  # inside another such block
        yield
        return
    try:
        # torch.nn.attention.sdpa_kernel does the same in a tenth of a millisecond, which every step waits
        # for.
        for (_, enable), wanted in zip(_ATTENTION_KERNELS, (False, False, False, True)):
            enable(wanted)
        with without_cudnn:
            yield
    finally:
        for (_, enable), was in zip(_ATTENTION_KERNELS, before):
            enable(was)


def refuse_reentrant_checkpoints(loss: Tensor) -> None:
    """Looks for what hides parameters from ``torch.autograd.grad``: they would not be trained."""
    if any(node.name() == "CheckpointFunctionBackward" for node in _nodes([loss])):
        raise ValueError(
            "The training loss calls torch.utils.checkpoint with use_reentrant=True, which hides the "
            "parameters inside from torch.autograd.grad: they would get no gradient. Pass "
            "use_reentrant=False."
        )


_WRONG_THIRD_DERIVATIVES = {"NativeLayerNorm": "LayerNorm", "NativeBatchNorm": "BatchNorm or InstanceNorm"}


def refuse_wrong_third_derivatives(loss: Tensor) -> None:
    """Looks for gradients in the loss itself (a gradient penalty), whose second derivatives are third
    derivatives: torch has wrong ones, which fail against differences."""
    for node in _nodes([loss]):
        name, _, rest = node.name().partition("BackwardBackward")
        if rest and name in _WRONG_THIRD_DERIVATIVES and getattr(node, "_saved_train", True):
            raise NotTwiceDifferentiableError(
                "The training loss contains a gradient (a penalty on it, for instance) of "
                f"{_WRONG_THIRD_DERIVATIVES[name]}, whose third derivative is wrong or missing in PyTorch. "
                "Use second_order='finite_difference', which Unrolled and Implicit take, or write the "
                "normalization in plain arithmetic."
            )


def refuse_unseen_padding(loss: Tensor, num_seen: int) -> None:
    """Looks for more embeddings with ``padding_idx`` than the ``num_seen`` that were called through a module:
    derivatives of their gradient leave out that the padding row is read."""
    if (
        sum(node.name().startswith("EmbeddingBackward") and _padded(node) for node in _nodes([loss]))
        > num_seen
    ):
        raise NotTwiceDifferentiableError(
            "The training loss calls torch.nn.functional.embedding with padding_idx, or nn.Embedding with a "
            "weight that is computed: derivatives of its gradient leave out that the padding row is read. "
            "Call it through a plain nn.Embedding, or leave out padding_idx."
        )


def _padded(node: Node) -> bool:
    padding = getattr(node, "_saved_padding_idx", -1)
    return 0 <= padding < 2**63  # torch shows -1, which means none, as an unsigned number


def refuse_wrong_second_derivatives(grads: Sequence[Tensor]) -> None:
    """Looks for functions without a right second derivative in the graph of gradients.

    autograd would leave those marked ``once_differentiable`` out in silence: the node that raises is not on
    the way to the parameters. And torch's fused weight norm has a second derivative that fails
    ``torch.autograd.gradgradcheck``.
    """
    for node in _nodes(grads):
        if node.name() == "torch::autograd::Error":
            raise NotTwiceDifferentiableError(_explanation("a function is marked once_differentiable."))
        if node.name().startswith("WeightNormInterfaceBackward"):
            raise NotTwiceDifferentiableError(
                "The training loss contains torch's weight norm, whose second derivative is wrong in "
                "PyTorch. Use Unrolled(second_order='finite_difference'), or a parametrization of your own "
                "that returns g * v / v.norm(dim=1, keepdim=True)."
            )


def _nodes(tensors: Sequence[Tensor]) -> Iterator[Node]:
    """All nodes of the graphs behind tensors."""
    seen: set[Node] = set()
    waiting = [tensor.grad_fn for tensor in tensors]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]


_NO_SECOND_DERIVATIVE = (
    "double backward",
    "Double backward",
    "is not implemented",
    "once_differentiable",
    "differentiate twice",
)


@contextmanager
def explain_missing_second_derivative() -> Iterator[None]:
    """Turns autograd's various messages about missing second derivatives into one that names the remedy."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if not any(words in str(error) for words in _NO_SECOND_DERIVATIVE):
            raise
        raise NotTwiceDifferentiableError(_explanation(f"PyTorch said: {str(error).strip()}")) from error


@contextmanager
def explain_missing_forward_derivative() -> Iterator[None]:
    """Names the remedy where a function has no formula for dual numbers."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if "forward" not in str(error) and "jvp" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise NotTwiceDifferentiableError(
            f"A part of the training loss cannot be computed with dual numbers. PyTorch said: {reason}. Use "
            "second_order='reverse', or 'finite_difference', which needs first derivatives alone."
        ) from error


def _explanation(reason: str) -> str:
    return (
        f"A part of the training loss cannot be differentiated twice: {reason} Hypergradients need the "
        "derivative of the gradient. Compiled modules and custom functions often have none: pass the module "
        "before torch.compile, write the custom backward in differentiable operations, or take "
        "Unrolled(second_order='finite_difference')."
    )
