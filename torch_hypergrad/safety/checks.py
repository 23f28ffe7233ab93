"""What a HyperOptimizer refuses when it is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .hyperparameter_set import HyperparameterSet
from .methods import Method
from .training import Loss


def check_types(
    model: Any, optimizer: Any, train_loss: Any, method: Any, hyper_optimizer: Any, val_loss: Any, grad_transform: Any
) -> None:
    """Refuses arguments of the wrong types."""
    for name, value, kind in (("model", model, nn.Module), ("optimizer", optimizer, Optimizer), ("method", method, Method)):
        if not isinstance(value, kind):
            shown = value.__name__ + " (a class: make an instance of it)" if isinstance(value, type) else repr(value)
            raise TypeError(f"HyperOptimizer: {name} must be a {kind.__name__}, got {shown}.")
    for name, value, optional in (
        ("train_loss", train_loss, False),
        ("hyper_optimizer", hyper_optimizer, False),
        ("val_loss", val_loss, True),
        ("grad_transform", grad_transform, True),
    ):
        if not (callable(value) or (optional and value is None)):
            example = ", such as functools.partial(torch.optim.Adam, lr=1e-2)" if name == "hyper_optimizer" else ""
            raise TypeError(f"HyperOptimizer: {name} must be a function{example}, got {value!r}.")


def check_not_compiled(modules: Sequence[nn.Module]) -> None:
    """Refuses compiled modules."""
    for name, module in (named for root in modules for named in root.named_modules()):
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"The module {name or type(module).__name__!r} is compiled, and torch.compile gives no second derivative, "
                "which this method needs. Pass the module from before torch.compile, or take "
                "Unrolled(second_order='finite_difference')."
            )


def check_hyper_optimizer(made: Any, hyperparameters: HyperparameterSet) -> None:
    """Refuses what ``hyper_optimizer`` made if it cannot move the hyperparameters."""
    example = "Pass functools.partial(torch.optim.Adam, lr=1e-2) or the like."
    if not isinstance(made, Optimizer):
        raise TypeError(
            f"hyper_optimizer must make a torch Optimizer from a list of tensors, but made a {type(made).__name__}. {example}"
        )
    if isinstance(made, torch.optim.LBFGS):
        raise ValueError(
            "hyper_optimizer made an LBFGS, whose step calls a closure many times; a hyper step has one hypergradient. "
            f"{example}"
        )
    held = {id(p) for group in made.param_groups for p in group["params"]}
    if held != {id(tuned.leaf) for tuned in hyperparameters.all}:
        raise ValueError(
            f"hyper_optimizer made an optimizer of {len(held)} other tensors than the {len(hyperparameters.all)} tensors that "
            f"it was given: make it from these. {example}"
        )


def parameter_names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The model's names for the optimizer's parameters, one list for each group. Refuses those that cannot be trained."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = []
    for g, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if id(p) not in names:
                raise ValueError(
                    f"The optimizer's group {g} holds a parameter of shape {tuple(p.shape)} that is not one of the model's. "
                    "Likely causes: an optimizer made for another model, or before the model's parameters were replaced."
                )
            if p.is_complex() or p.layout is not torch.strided:
                raise ValueError(
                    f"The parameter {names[id(p)]!r} is {'complex' if p.is_complex() else 'sparse'}. Update rules are for "
                    "real, dense parameters: hold real and imaginary parts as two parameters, or make it dense."
                )
        found.append([names[id(p)] for p in group["params"]])
    return found


def check_tuned_tensors(hyperparameters: HyperparameterSet, optimizer: Optimizer, val_loss: Loss | None) -> None:
    """Refuses tuned tensors that are trained too, or that validation would see."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for tuned in hyperparameters.tensors:
        if id(tuned.leaf) in trained:
            raise ValueError(
                f"{tuned.name!r} is both tuned and trained: the optimizer holds it as a parameter. Take it out of the one or "
                "the other."
            )
    if hyperparameters.tensors and val_loss is None:
        raise ValueError(
            f"tune holds {hyperparameters.tensors[0].name!r}, which the training loss reads, and val_loss is not given. "
            "Validation must not see what is tuned (example weights, augmentation): pass val_loss=..., a plain loss."
        )
