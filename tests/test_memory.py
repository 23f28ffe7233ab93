"""Memory that is shared: adjoints that are one tensor, written to in place;
and tensors that are compared as memory."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_hypergrad import HyperOptimizer, Hyperparameter, Unrolled, register_update
from torch_hypergrad.device.host_memory import same_bits
from torch_hypergrad.step.state import Part, State
from torch_hypergrad.testing import check_hypergradient


class Lagging(torch.optim.Optimizer):
    """Moves by the gradient and by the buffer as it was before the step, so that autograd gives one
    and the same tensor as the adjoint of the parameter and of the buffer."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
                p.add_(buffer).sub_(p.grad, alpha=group["lr"])
                buffer.mul_(0.5).sub_(p.grad, alpha=group["lr"])


@register_update(Lagging, {"lr": (0.0, math.inf)})
def lagging(
    param: Tensor, grad: Tensor, state: dict[str, Any], settings: Any
) -> tuple[Tensor, dict[str, Any]]:
    buffer = state.get("buffer", torch.zeros_like(param))
    return param + buffer - settings["lr"] * grad, {"buffer": 0.5 * buffer - settings["lr"] * grad}


@pytest.mark.parametrize("per", ["group", "element"])
def test_a_rule_whose_adjoints_share_memory(per: Any) -> None:
    torch.manual_seed(0)
    batches = torch.randn(5, 4, 3, dtype=torch.float64)

    def make() -> HyperOptimizer:
        torch.manual_seed(1)
        model = nn.Linear(3, 2).double()
        optimizer = Lagging(model.parameters())
        tune = [Hyperparameter("lr", per=per)]
        return HyperOptimizer(
            model,
            optimizer,
            lambda m, x: (m(x) - 1).pow(4).mean(),
            tune,
            Unrolled(),
            partial(torch.optim.SGD, lr=0.0),
        )

    for entry in check_hypergradient(make, list(batches[:4]), batches[4]):
        assert entry.computed == pytest.approx(entry.reference, rel=1e-7)


def adjoint(param: Tensor, **state: Tensor) -> State:
    return State((Part(None, param, state),))  # type: ignore[arg-type]


def test_parameters_adjoint_that_nobody_shares_is_written_to_as_it_is() -> None:
    own = torch.arange(3.0)
    assert adjoint(own, momentum=torch.ones(3)).owning_params().params[0] is own


@pytest.mark.parametrize("shared", [lambda own: own, lambda own: own.view(3, 1), lambda own: own[1:]])
def test_parameters_adjoint_that_somebody_shares_is_copied(shared: Any) -> None:
    own = torch.arange(3.0)
    other = shared(own)
    (copied,) = adjoint(own, momentum=other).owning_params().params
    copied += 1
    assert own.tolist() == [0, 1, 2]
    assert copied.tolist() == [1, 2, 3]


def test_an_expanded_adjoint_is_copied() -> None:
    (copied,) = adjoint(torch.ones(()).expand(3)).owning_params().params
    copied[0] = 2
    assert copied.tolist() == [2, 1, 1]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.int8, torch.bool]
)
@pytest.mark.parametrize("size", [0, 1, 5, 4097])
def test_one_other_bit_anywhere_is_seen(dtype: torch.dtype, size: int) -> None:
    a = torch.ones(size, dtype=dtype)
    assert same_bits(a, a.clone())
    for at in {0, size // 2, size - 1} & set(range(size)):
        b = a.clone()
        b[at] = 0
        assert not same_bits(a, b)
        assert not same_bits(b, a)


def test_nan_equals_itself() -> None:
    assert same_bits(torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.nan]))


def test_parts_of_a_vector_are_compared_alone() -> None:
    vector = torch.arange(7.0)
    assert same_bits(vector[1:4], torch.tensor([1.0, 2.0, 3.0]))
    assert not same_bits(vector[1:4], vector[2:5])


def test_what_is_no_block_of_memory_is_compared_by_numbers() -> None:
    table = torch.arange(6.0).view(2, 3)
    assert same_bits(table.T, table.T.contiguous())
    assert not same_bits(table.T, table.T + 1)
