"""``Cholesky(blocks=k)`` against dense algebra, and stacked problems against one HyperOptimizer for each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from problems import wrapped
from torch_hypergrad import Cholesky, HyperOptimizer, Hyperparameter, Implicit, SolverError
from torch_hypergrad.bilevel import fit

BLOCKS, SIZE = 4, 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive_blocks(scales: Tensor | None = None) -> Tensor:
    """Of shape ``(BLOCKS, SIZE, SIZE)``."""
    parts = random(BLOCKS, SIZE, SIZE)
    matrices = parts @ parts.mT + torch.eye(SIZE, dtype=torch.float64)
    return matrices if scales is None else matrices * scales[:, None, None]


def solve(matrix: Tensor, b: Tensor, **options):
    """The solution, its statistics, and how many products it took."""
    seen = []

    def product(v: Tensor) -> Tensor:
        seen.append(v)
        return matrix @ v

    x, info = Cholesky(**options).solve(product, b)
    return x, info, len(seen)


@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0, 1.0), (1e-6, 1.0, 1e3, 1e6)], ids=["alike", "unlike"])
def test_blocks_have_the_solution_of_the_dense_system(damping, scales):
    matrix, b = torch.block_diag(*positive_blocks(torch.tensor(scales))), random(BLOCKS * SIZE, seed=1)
    x, info, num_products = solve(matrix, b, damping=damping, blocks=BLOCKS)
    dense = matrix + damping * torch.eye(len(b), dtype=torch.float64)
    torch.testing.assert_close(x, torch.linalg.solve(dense, b), rtol=1e-10, atol=0)
    assert info.num_matvecs == num_products == SIZE + 1
    assert info.damping == damping
    assert info.residual == pytest.approx(float((b - dense @ x).norm() / b.norm()), abs=1e-13)


def test_a_right_hand_side_that_is_zero_somewhere_or_everywhere():
    matrix, b = torch.block_diag(*positive_blocks()), random(BLOCKS * SIZE, seed=1)
    b[SIZE : 2 * SIZE] = 0
    x, _, _ = solve(matrix, b, blocks=BLOCKS)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-10, atol=1e-14)
    x, info, _ = solve(matrix, torch.zeros_like(b), blocks=BLOCKS)
    assert not x.any()
    assert info.residual == 0


@pytest.mark.parametrize("coupling", [1e-6, 1e-3, 0.1])
def test_coupling_is_refused_also_of_a_small_block_beside_large_ones(coupling):
    """Block 1 has entries of 1e-6 times those of block 0, and its right-hand side too."""
    scales = torch.tensor([1.0, 1e-6, 1.0, 1.0])
    matrix = torch.block_diag(*positive_blocks(scales))
    matrix[SIZE, 2 * SIZE] = matrix[2 * SIZE, SIZE] = coupling * 1e-6
    b = random(BLOCKS * SIZE, seed=1) * scales.repeat_interleave(SIZE)
    solve(torch.block_diag(*positive_blocks(scales)), b, blocks=BLOCKS)
    with pytest.raises(
        SolverError, match=r"in block 1 .*depend on each other.*shape \(4, \.\.\.\).*leave blocks"
    ):
        solve(matrix, b, blocks=BLOCKS)


def test_coupling_that_the_solution_does_not_feel_is_no_error():
    """All blocks and right-hand sides alike: the sum over a row of blocks solves the coupled system too."""
    one, other = positive_blocks()[0], 0.1 * torch.eye(SIZE, dtype=torch.float64)
    pattern = torch.eye(BLOCKS, dtype=torch.float64)
    matrix = torch.kron(pattern, one) + torch.kron(1 - pattern, other)
    b = random(SIZE, seed=1).repeat(BLOCKS)
    x, _, _ = solve(matrix, b, blocks=BLOCKS)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-10, atol=0)


@pytest.mark.parametrize("blocks", [3, 21])
def test_a_number_of_blocks_that_does_not_divide_is_refused(blocks):
    matrix, b = torch.block_diag(*positive_blocks()), random(BLOCKS * SIZE, seed=1)
    with pytest.raises(SolverError, match=rf"20 parameters do not fall into {blocks} blocks of one size"):
        solve(matrix, b, blocks=blocks)


@pytest.mark.parametrize(
    ("blocks", "error", "words"),
    [(0, ValueError, "at least 1, got 0"), (2.0, TypeError, "an int, got 2.0"), (True, TypeError, "an int")],
)
def test_a_number_of_blocks_that_is_none_is_refused(blocks, error, words):
    with pytest.raises(error, match=rf"Cholesky: blocks must be {words}"):
        Cholesky(blocks=blocks)


def test_an_indefinite_block_is_named_with_a_damping_that_helps():
    matrices, b = positive_blocks(), random(BLOCKS * SIZE, seed=1)
    matrices[2] -= 3 * torch.eye(SIZE, dtype=torch.float64)
    smallest = torch.linalg.eigvalsh(matrices[2]).min().item()
    assert smallest < 0
    words = rf"block 2 \(of 4, counted from 0\).*5 x 5.*eigenvalue is {smallest:.3g}\..*above {-smallest:.3g}"
    with pytest.raises(SolverError, match=words):
        solve(torch.block_diag(*matrices), b, blocks=BLOCKS)
    solve(torch.block_diag(*matrices), b, blocks=BLOCKS, damping=1.01 * -smallest)


def test_a_single_matrix_that_is_indefinite_speaks_of_no_blocks():
    with pytest.raises(
        SolverError, match=r"^Cholesky: the training Hessian, 2 x 2 .*eigenvalue is -1\."
    ) as caught:
        solve(torch.tensor([[1.0, 0.0], [0.0, -1.0]]), torch.ones(2))
    assert "block" not in str(caught.value)


def test_products_that_are_not_finite_are_refused():
    matrices = positive_blocks()
    matrices[1, 0, 0] = torch.nan
    with pytest.raises(SolverError, match="smallest eigenvalue is nan"):
        solve(torch.block_diag(*matrices), random(BLOCKS * SIZE, seed=1), blocks=BLOCKS)


# ---- stacked ridge problems through a HyperOptimizer ------------------------------------------------------


class Stacked(nn.Module):
    """Linear models in one parameter, of shape ``(models, features)`` or transposed."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*shape, dtype=torch.float64))


def stacked_loss(model: nn.Module, batch) -> Tensor:
    x, y = batch  # (models, rows, features), (models, rows)
    weight = model.weight if model.weight.shape[0] == len(x) else model.weight.T
    return ((x @ weight[:, :, None])[:, :, 0] - y).square().mean(1).sum()


TRAIN = random(BLOCKS, 12, SIZE, seed=2), random(BLOCKS, 12, seed=3)
VAL = random(BLOCKS, 9, SIZE, seed=4), random(BLOCKS, 9, seed=5)


def tuned(model: nn.Module, decay: Tensor, scale: Tensor, **method) -> HyperOptimizer:
    """A decay for each weight, and one scale of the targets that all losses read."""

    def train_loss(model: nn.Module, batch) -> Tensor:
        return stacked_loss(model, (batch[0], scale * batch[1]))

    tune = [Hyperparameter("weight_decay", per="element", init=decay), Hyperparameter.of(scale, "scale")]
    return wrapped(model, tune, Implicit(**method), train_loss=train_loss, val_loss=stacked_loss)


def a_scale() -> Tensor:
    return torch.tensor(0.9, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("second_order", ["reverse", "forward"])
def test_stacked_problems_have_the_hypergradients_of_separate_ones(second_order):
    decays = 0.1 + random(BLOCKS, SIZE, seed=6).square()
    solver = Cholesky(blocks=BLOCKS)
    model = Stacked(BLOCKS, SIZE)
    together = tuned(model, decays.flatten(), a_scale(), solver=solver, second_order=second_order)
    fit(together, TRAIN, tol=1e-10, method="newton")
    found = together.evaluate(VAL)
    by_decay, by_scale, losses = [], [], []
    for one in range(BLOCKS):
        train, val = (tuple(part[one : one + 1] for part in batch) for batch in (TRAIN, VAL))
        alone = tuned(Stacked(1, SIZE), decays[one], a_scale(), solver=Cholesky())
        fit(alone, train, tol=1e-10, method="newton")
        result = alone.evaluate(val)
        by_decay.append(result.hypergradient["weight_decay/weight"][0])
        by_scale.append(result.hypergradient["scale"])
        losses.append(result.val_loss)
    assert found.val_loss == pytest.approx(sum(losses), rel=1e-10)
    assert found.num_matvecs == SIZE + 1
    torch.testing.assert_close(
        found.hypergradient["weight_decay/weight"], torch.stack(by_decay), rtol=1e-7, atol=1e-10
    )
    torch.testing.assert_close(found.hypergradient["scale"], sum(by_scale), rtol=1e-7, atol=1e-10)


def test_products_by_finite_differences_are_near_enough():
    decays = 0.1 + random(BLOCKS, SIZE, seed=6).square()
    solver = Cholesky(blocks=BLOCKS)
    exact, near = (
        tuned(Stacked(BLOCKS, SIZE), decays.flatten(), a_scale(), solver=solver, second_order=order)
        for order in ("reverse", "finite_difference")
    )
    for hyper in (exact, near):
        fit(hyper, TRAIN, tol=1e-6)
    for name, value in exact.hypergradient(VAL).items():
        torch.testing.assert_close(near.hypergradient(VAL)[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["transposed", "coupled", "with biases beside"])
def test_stacks_that_are_none_are_refused(kind):
    model = Stacked(SIZE, BLOCKS) if kind == "transposed" else Stacked(BLOCKS, SIZE)
    if kind == "with biases beside":
        model.bias = nn.Parameter(torch.zeros(BLOCKS, dtype=torch.float64))

    def train_loss(model: nn.Module, batch) -> Tensor:
        if kind == "with biases beside":
            return stacked_loss(model, (batch[0], batch[1] - model.bias[:, None]))
        coupling = model.weight.sum().square() if kind == "coupled" else 0.0
        return stacked_loss(model, batch) + coupling

    tune = [Hyperparameter("weight_decay", init=0.3)]
    hyper = wrapped(
        model, tune, Implicit(Cholesky(blocks=BLOCKS)), train_loss=train_loss, val_loss=stacked_loss
    )
    fit(hyper, TRAIN, tol=1e-8)
    with pytest.raises(
        SolverError, match=r"[Bb]locks depend on each other.*one parameter of shape \(4, \.\.\.\)"
    ):
        hyper.hypergradient(VAL)
