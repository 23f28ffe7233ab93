"""Update rules: one optimizer's step as a pure function, one file for each family."""

from torch.optim import LBFGS, Optimizer, SparseAdam

from . import adam, adaptive, muon, rprop, sgd  # noqa: F401  (each registers its rules)
from .base import FRACTION, POSITIVE, UpdateRule, register_update, registered_rule, registered_types
from .from_higher import higher_rule

_REFUSED: dict[type[Optimizer], str] = {
    LBFGS: "its step calls the loss many times, in a line search, and is not one differentiable update",
    SparseAdam: "its step reads which entries a gradient has, and sparse gradients have no derivative",
}


def rule_of(optimizer: Optimizer) -> UpdateRule:
    """The update rule of ``optimizer``.

    Raises:
        ValueError: if there is none; the message says how to register one.
    """
    kind = type(optimizer)
    for refused, reason in _REFUSED.items():
        if isinstance(optimizer, refused):
            raise ValueError(
                f"{kind.__name__} cannot be wrapped: {reason}. Use SGD, Adam or another first-order "
                "optimizer."
            )
    rule = registered_rule(optimizer) or higher_rule(optimizer)
    if rule is None:
        known = ", ".join(sorted(t.__name__ for t in registered_types()))
        raise ValueError(
            f"There is no update rule for {kind.__module__}.{kind.__qualname__}. A hypergradient needs the "
            f"optimizer's step as a differentiable function. Known: {known}. Register a rule of your own "
            "with torch_hypergrad.register_update (docs/extending.md)."
        )
    return rule


__all__ = ["FRACTION", "POSITIVE", "UpdateRule", "register_update", "rule_of"]
