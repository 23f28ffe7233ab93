"""Splits of data into folds, and what must hold of folds that are tuned together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from ..hyper_optimizer import HyperOptimizer
from ..solvers.base import check_positive_int


def stratified_folds(labels: Any, num_folds: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Rows in random order, in folds that have the same share of each class.

    Args:
        labels: the class of each row, of shape ``(n,)``: a tensor, an array or a list.
        num_folds: two or more.
        seed: of the order.

    Returns:
        For each fold the rows to train on and those to validate on, int64 and ascending. Each row is
        validated on once.

    Raises:
        TypeError, ValueError: if a class has fewer rows than there are folds, so that one would be without
            it, there is only one class, or ``num_folds`` is below 2.
    """
    check_positive_int(num_folds, "stratified_folds: num_folds")
    if num_folds < 2:
        raise ValueError(f"stratified_folds: num_folds must be at least 2, got {num_folds}.")
    classes = torch.as_tensor(labels).cpu()
    if classes.dim() != 1:
        raise ValueError(
            f"stratified_folds: labels must have shape (n,), one class for each row, got "
            f"{tuple(classes.shape)}."
        )
    counts = Counter(classes.tolist())
    if len(counts) < 2:
        raise ValueError(
            f"stratified_folds: all {len(classes)} rows are of one class, {next(iter(counts), None)!r}, so "
            "there is nothing to tell apart. Take more rows, or scikit-learn's KFold."
        )
    rarest, num = min(counts.items(), key=lambda pair: pair[1])
    if num < num_folds:
        fewer = f"at most {num} folds" if num > 1 else "a simple split in the place of folds"
        raise ValueError(
            f"stratified_folds: the class {rarest!r} has {num} of the {len(classes)} rows, so that one of "
            f"{num_folds} folds would be without it. Take {fewer}, or more rows of this class."
        )
    split = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    pairs = split.split(classes.numpy(), classes.numpy())
    return [(torch.as_tensor(train), torch.as_tensor(val)) for train, val in pairs]


def check_folds(folds: Sequence[Any]) -> None:
    """Refuses folds that do not belong together.

    Raises:
        TypeError, ValueError: with the number of the fold, and what is wrong with it.
    """
    for fold in folds:
        if not isinstance(fold, HyperOptimizer):
            raise TypeError(f"CrossValidation takes a list of HyperOptimizers, got {fold!r} in it.")
    if len(folds) < 2:
        raise ValueError(f"CrossValidation takes two folds or more, got {len(folds)}.")
    for number, fold in enumerate(folds[1:], start=1):
        different = _difference(folds[0], fold)
        if different is not None:
            raise ValueError(
                f"Fold {number} differs from fold 0: {different}. All folds are tuned by the same values: "
                "make them by one function."
            )
    _check_apart(folds)


def _difference(first: HyperOptimizer, fold: HyperOptimizer) -> str | None:
    """In what another fold is not as the first one; the sizes of parameters may differ."""
    ours, theirs = first._hyperparameters, fold._hyperparameters
    tuned, before = theirs.values(), ours.values()
    if list(tuned) != list(before):
        return f"it tunes {', '.join(tuned)}, and fold 0 {', '.join(before)}, in this order"
    for one, other in zip(theirs.settings, ours.settings):
        if one.spec.per != other.spec.per:
            return f"{one.label!r} is tuned per {one.spec.per}, and per {other.spec.per} in fold 0"
    for name, value in tuned.items():
        if value.shape != before[name].shape:
            return f"{name!r} has shape {tuple(value.shape)}, and {tuple(before[name].shape)} in fold 0"
        if not torch.equal(value.cpu(), before[name].cpu()):
            return f"it begins with other values of {name!r}"
    for mine, first_one in zip(theirs.all, ours.all):
        if mine.scale != first_one.scale:
            return f"{mine.label!r} has {mine.scale}, and {first_one.scale} in fold 0"
    names = [[name for name, _ in one.model.named_parameters()] for one in (fold, first)]
    if names[0] != names[1]:
        return f"its model has the parameters {', '.join(names[0])}, and that of fold 0 {', '.join(names[1])}"
    return None


def _check_apart(folds: Sequence[HyperOptimizer]) -> None:
    """Refuses folds that train the same parameters."""
    trained: dict[tuple[Any, int], int] = {}
    for number, fold in enumerate(folds):
        for group in fold.optimizer.param_groups:
            for p in group["params"]:
                other = trained.setdefault((p.device, p.data_ptr()), number) if p.numel() else number
                if other != number:
                    raise ValueError(
                        f"Fold {number} trains a parameter of fold {other}: each fold needs a model of its "
                        "own, such as copy.deepcopy(model)."
                    )
