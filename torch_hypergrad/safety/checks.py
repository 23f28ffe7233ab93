"""What a HyperOptimizer refuses when it is made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..methods import Implicit, Method
from ..solvers.base import check_number
from ..step.live_model import is_compiled
from ..step.user_functions import Loss
from ..step.validation import Batches
from ..tune.hyperparameter_set import HyperparameterSet


def check_types(
    model: Any,
    optimizer: Any,
    train_loss: Any,
    method: Any,
    hyper_optimizer: Any,
    val_loss: Any,
    grad_transform: Any,
) -> None:
    """Refuses arguments of the wrong types."""
    for name, value, kind in (
        ("model", model, nn.Module),
        ("optimizer", optimizer, Optimizer),
        ("method", method, Method),
    ):
        if not isinstance(value, kind):
            shown = (
                value.__name__ + " (a class: make an instance of it)"
                if isinstance(value, type)
                else repr(value)
            )
            raise TypeError(f"HyperOptimizer: {name} must be a {kind.__name__}, got {shown}.")
    for name, value, optional in (
        ("train_loss", train_loss, False),
        ("hyper_optimizer", hyper_optimizer, False),
        ("val_loss", val_loss, True),
        ("grad_transform", grad_transform, True),
    ):
        if not (callable(value) or (optional and value is None)):
            example = (
                ", such as functools.partial(torch.optim.Adam, lr=1e-2)" if name == "hyper_optimizer" else ""
            )
            raise TypeError(f"HyperOptimizer: {name} must be a function{example}, got {value!r}.")


def check_one_process(model: nn.Module) -> None:
    """Refuses models that average over processes, or keep a part of each parameter there."""
    for module in model.modules():
        kind = type(module).__name__
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel") or kind.startswith("FSDP"):
            raise ValueError(
                f"The model is wrapped in {kind}. A HyperOptimizer takes gradients in its own process alone, "
                "so the processes would drift apart. Pass the module inside (model.module), and train in "
                "one process."
            )
    for name, p in model.named_parameters():
        if hasattr(p, "device_mesh"):
            raise ValueError(
                f"The parameter {name!r} is a DTensor, as FSDP2's fully_shard makes them: each process holds "
                "a part. A HyperOptimizer works on whole parameters in one process: wrap the model before "
                "it is sharded."
            )


def check_memory(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuses parameters whose memory is not their own."""
    names = {id(p): name for name, p in model.named_parameters()}
    by_storage: dict[int, list[Tensor]] = {}
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if p.numel():
            by_storage.setdefault(p.untyped_storage().data_ptr(), []).append(p)
    for sharing in by_storage.values():
        places = sorted((p.data_ptr(), p.data_ptr() + _extent(p), names.get(id(p), "?")) for p in sharing)
        for (_, end, name), (start, _, other) in pairwise(places):
            if start < end:
                raise ValueError(
                    f"The parameters {name!r} and {other!r} lie in the same memory, so that an update of one "
                    "is an update of the other. Make one parameter of them (nn.Parameter is shared by "
                    "assigning it), or clone one."
                )
        storage = sharing[0].untyped_storage()
        # The storage object itself is one of the users that are counted; of CUDA's recurrent layers all
        # others are parameters.
        others = torch._C._storage_Use_Count(storage._cdata) - 1 - len(sharing)
        if others > 0 and (len(sharing) > 1 or _extent(sharing[0]) < storage.nbytes()):
            raise ValueError(
                f"The parameter {places[0][2]!r} is a part of a tensor that somebody else holds too. A loss "
                "that reads that tensor reads the parameter's memory without its derivative. Make the "
                "parameter of a clone: nn.Parameter(part.clone())."
            )


def _extent(p: Tensor) -> int:
    """Bytes from a tensor's first entry to its last."""
    return p.element_size() * (1 + sum((size - 1) * abs(stride) for size, stride in zip(p.shape, p.stride())))


def check_not_compiled(modules: Sequence[nn.Module]) -> None:
    """Refuses compiled modules."""
    for name, module in (named for root in modules for named in root.named_modules()):
        if is_compiled(module):
            raise ValueError(
                f"The module {name or type(module).__name__!r} is compiled, and torch.compile gives no "
                "second derivative, which this method needs. Pass the module from before torch.compile, or "
                "take Unrolled(second_order='finite_difference')."
            )


def check_hyper_optimizer(made: Any, hyperparameters: HyperparameterSet) -> None:
    """Refuses what ``hyper_optimizer`` made if it cannot move the hyperparameters."""
    example = "Pass functools.partial(torch.optim.Adam, lr=1e-2) or the like."
    if not isinstance(made, Optimizer):
        raise TypeError(
            "hyper_optimizer must make a torch Optimizer from a list of tensors, but made a "
            f"{type(made).__name__}. {example}"
        )
    if isinstance(made, torch.optim.LBFGS):
        raise ValueError(
            "hyper_optimizer made an LBFGS, whose step calls a closure many times; a hyper step has one "
            f"hypergradient. {example}"
        )
    held = {id(p) for group in made.param_groups for p in group["params"]}
    if held != {id(tuned.leaf) for tuned in hyperparameters.all}:
        raise ValueError(
            f"hyper_optimizer made an optimizer of {len(held)} other tensors than the "
            f"{len(hyperparameters.all)} tensors that it was given: make it from these. {example}"
        )


def parameter_names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The model's names for the optimizer's parameters, one list for each group. Refuses those that cannot be
    trained."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = []
    for g, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if id(p) not in names:
                raise ValueError(
                    f"The optimizer's group {g} holds a parameter of shape {tuple(p.shape)} that is not one "
                    "of the model's. Likely causes: an optimizer made for another model, or before the "
                    "model's parameters were replaced."
                )
            if p.is_complex() or p.layout is not torch.strided:
                raise ValueError(
                    f"The parameter {names[id(p)]!r} is {'complex' if p.is_complex() else 'sparse'}. Update "
                    "rules are for real, dense parameters: hold real and imaginary parts as two parameters, "
                    "or make it dense."
                )
        found.append([names[id(p)] for p in group["params"]])
    return found


def check_tuned_tensors(
    hyperparameters: HyperparameterSet, optimizer: Optimizer, val_loss: Loss | None
) -> None:
    """Refuses tuned tensors that are trained too, or that validation would see."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for tuned in hyperparameters.tensors:
        if id(tuned.tensor) in trained:
            raise ValueError(
                f"{tuned.name!r} is both tuned and trained: the optimizer holds it as a parameter. Take it "
                "out of the one or the other."
            )
    if hyperparameters.tensors and val_loss is None:
        raise ValueError(
            f"tune holds {hyperparameters.tensors[0].name!r}, which the training loss reads, and val_loss is "
            "not given. Validation must not see what is tuned (example weights, augmentation): pass "
            "val_loss=..., a plain loss."
        )


def check_rtol(rtol: Any, method: Method) -> None:
    """Refuses a tolerance that is none, or that nothing can keep to."""
    if rtol is None:
        return
    if not isinstance(method, Implicit):
        raise TypeError(
            f"rtol={rtol!r} is the tolerance of a linear solve, and {type(method).__name__} has none. Leave "
            "it out, or take method=Implicit(CG())."
        )
    if not method.solver.keeps_rtol:
        raise TypeError(
            f"rtol={rtol!r}: {method.solver!r} does a fixed amount of work and cannot keep to a tolerance. "
            "Leave it out, or take CG, or Nystrom with max_steps above 0."
        )
    check_number(rtol, "rtol", positive=False)


def validation_batches(given: Any, not_given: Any, batches: Any, sizes: Any) -> Batches:
    """What validation is computed on. Refuses both or neither, and weights that are none."""
    if (given is not_given) == (batches is None):
        raise TypeError(
            "Pass either one validation batch, or batches=..., several of them; got "
            f"{'neither' if batches is None else 'both'}."
        )
    if batches is None:
        if sizes is not None:
            raise TypeError("sizes are the weights of batches=...; one validation batch has none.")
        return Batches([given])
    if not isinstance(batches, Iterable) or isinstance(batches, (Tensor, dict, str)):
        raise TypeError(
            "batches must be a list, a loader or another iterable of validation batches, got "
            f"{type(batches).__name__}. Pass a single batch as the first argument."
        )
    if sizes is not None:
        try:
            numbers = [float(size) for size in sizes]
        except (TypeError, ValueError):
            numbers = [math.nan]
        if not all(math.isfinite(number) and number > 0 for number in numbers):
            raise ValueError(f"sizes must be positive numbers, one for each of batches, got {sizes!r}.")
        sizes = numbers
    return Batches(batches, sizes)
