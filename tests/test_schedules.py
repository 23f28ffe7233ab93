"""One value for each training step, on every rule with a learning rate or a decay,
against finite differences."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from problems import random_batch, tanh_mlp, wrapped
from torch_hypergrad import Hyperparameter, Unrolled
from torch_hypergrad.testing import check_hypergradient

BATCHES, VAL = [random_batch(8, 4, seed) for seed in range(5)], random_batch(8, 4, seed=100)
OPTIMIZERS: dict[str, Any] = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "ASGD": partial(torch.optim.ASGD, lr=0.1),
    "Adam": partial(torch.optim.Adam, lr=0.05, eps=1e-2),
    "AdamW": partial(torch.optim.AdamW, lr=0.05, eps=1e-2),
    "NAdam": partial(torch.optim.NAdam, lr=0.05, eps=1e-2),
    "RAdam": partial(torch.optim.RAdam, lr=0.05, eps=1e-2),
    "Adamax": partial(torch.optim.Adamax, lr=0.05, eps=1e-2),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.05, eps=1e-2),
    "Adadelta": partial(torch.optim.Adadelta, lr=0.5, eps=1e-2),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.05, eps=1e-2),
}


@pytest.mark.parametrize("setting", ["lr", "weight_decay"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_schedule_is_that_of_finite_differences(kind: str, setting: str) -> None:
    options = {"lr": OPTIMIZERS[kind].keywords["lr"], "weight_decay": 0.1}
    tune = [Hyperparameter(setting, per="step", num_steps=len(BATCHES), init=options[setting])]
    optimizer = partial(OPTIMIZERS[kind], weight_decay=options["weight_decay"])
    # float64 numbers in the optimizer's state: ASGD's eta and NAdam's mu_product follow the default dtype
    torch.set_default_dtype(torch.float64)
    try:
        entries = check_hypergradient(
            lambda: wrapped(tanh_mlp(), tune, Unrolled(), optimizer), BATCHES, VAL, num_entries=len(BATCHES)
        )
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(entries) == len(BATCHES)
    assert any(abs(entry.computed) > 1e-6 for entry in entries)
