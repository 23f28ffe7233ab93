"""Running statistics that follow the weights (``Implicit``), the checker, and users' modules.

For the implicit method a network with one normalization is written out in tensors, with statistics that are a
function of the weights, and its linear system is solved densely with autograd's Hessian. One test trains
plain torch to its optimum instead, for each perturbed value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_hypergrad
from problems import FROZEN, REPLAY, mse, random_batch
from test_implicit import minimize
from test_running_statistics import (
    BATCHES,
    CASES,
    NUMBERS,
    SCALE,
    Case,
    check,
    differences,
    entries,
    evaluated,
    in_parts,
    make_hyper,
    squares,
    vectors,
)
from torch_hypergrad import (
    CG,
    Cholesky,
    ForwardMode,
    HypergradientError,
    HyperOptimizer,
    Hyperparameter,
    Implicit,
    Neumann,
    Unrolled,
)
from torch_hypergrad.methods import Method
from torch_hypergrad.testing import check_hypergradient, derivative

# ---- a module of the user's that says how its buffers move -------------------------------------------------


class RunningCenter(nn.Module):
    """Subtracts the mean of the batch in train mode, and a running one in evaluation mode."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("running", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x - self.running
        mean = x.mean(0)
        self.running.copy_((0.5 * (self.running + mean)).detach())
        return x - mean

    def moved(self, buffers: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        return {"running": 0.5 * (buffers["running"] + x.mean(0))} if self.training else {}

    def read(self, buffers: dict[str, Tensor], x: Tensor) -> Tensor | None:
        return None if self.training else x - buffers["running"]


class PastCenter(RunningCenter):
    """Subtracts what the mean was so far in both modes: each step reads the buffer, and replaces it."""

    def forward(self, x: Tensor) -> Tensor:
        centered = x - self.running
        if self.training:
            self.running = (0.5 * (self.running + x.mean(0))).detach()
        return centered

    def read(self, buffers: dict[str, Tensor], x: Tensor) -> Tensor | None:
        return x - buffers["running"]


@cache
def registered(kind: type[RunningCenter]) -> Callable[..., nn.Module]:
    torch_hypergrad.register_buffers(kind, after=kind.moved, reads=kind.read)
    return kind


# ---- the implicit method against dense algebra -------------------------------------------------------------

DECAY, DAMPING = 0.1, 20.0
EPS = 1e-5


@dataclass(frozen=True, eq=False)
class Problem:
    """A network 6-5-3 with BatchNorm, the batches that are recorded, and what of it is special.

    Args:
        momentum: of the running statistics.
        twice: the training loss calls the layer with two parts of the batch.
        scale: a tuned factor of the inputs, in training alone.
        follows: whether the statistics follow the weights; else they stay what they are.
        frozen: the layer is in evaluation mode in training too.
        val_in_train_mode: validation uses the statistics of its own batch.
        center: RunningCenter in the place of BatchNorm.
    """

    num_batches: int = 1
    momentum: float | None = 0.1
    twice: bool = False
    scale: Tensor | None = None
    follows: bool = True
    frozen: bool = False
    val_in_train_mode: bool = False
    center: bool = False

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return [random_batch(9, 6, seed, 3) for seed in range(self.num_batches)]

    @property
    def val(self) -> tuple[Tensor, Tensor]:
        return random_batch(12, 6, 100, 3)

    def parts(self, batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
        x, y = batch
        return [(x[:4], y[:4]), (x[4:], y[4:])] if self.twice else [batch]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], scale: Tensor | None) -> Tensor:
        """As the user writes it."""
        return sum(squares(model, part, scale) for part in self.parts(batch))  # type: ignore[return-value]

    def val_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return squares(model, batch) if self.val_in_train_mode else evaluated(model, batch)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        batch_norm = nn.BatchNorm1d(5, eps=EPS, momentum=self.momentum)
        norm = registered(RunningCenter)(5) if self.center else batch_norm
        model = nn.Sequential(nn.Linear(6, 5), norm, nn.Tanh(), nn.Linear(5, 3)).double()
        next(norm.buffers()).normal_(std=0.3)
        if self.frozen:
            norm.eval()
        return model


class Written:
    """The problem in tensors: ``flat`` are all weights in the order of the model's parameters."""

    def __init__(self, problem: Problem) -> None:
        self.problem, model = problem, problem.model()
        self.shapes = [p.shape for p in model.parameters()]
        self.flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        self.start = next(model[1].buffers()).clone(), torch.ones(5, dtype=torch.float64)

    def outputs(self, flat: Tensor, x: Tensor, statistics: tuple[Tensor, Tensor] | None) -> Tensor:
        w, b, *affine, head, head_bias = self.weights(flat)
        hidden = x @ w.T + b
        mean, var = (hidden.mean(0), hidden.var(0, correction=0)) if statistics is None else statistics
        if self.problem.center:
            return torch.tanh(hidden - mean) @ head.T + head_bias
        return torch.tanh((hidden - mean) / (var + EPS).sqrt() * affine[0] + affine[1]) @ head.T + head_bias

    def weights(self, flat: Tensor) -> list[Tensor]:
        sizes = [shape.numel() for shape in self.shapes]
        return [part.view(shape) for part, shape in zip(flat.split(sizes), self.shapes)]

    def statistics(self, flat: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Where they rest: the mean over the batches. With two calls in a loss and momentum m, that is
        ``r = (1 - m)^2 r + (1 - m) m s1 + m s2``; a cumulative average weighs all calls equally."""
        problem = self.problem
        if not problem.follows:
            return self.start
        w, b, *_ = self.weights(flat)
        means, variances = [], []
        for batch in problem.batches:
            calls = [x @ w.T + b if scale is None else (x * scale) @ w.T + b for x, _ in problem.parts(batch)]
            m = problem.momentum or 0.0
            shares = [(1 - m) / (2 - m), 1 / (2 - m)] if problem.twice else [1.0]
            means.append(sum(share * hidden.mean(0) for share, hidden in zip(shares, calls)))
            variances.append(sum(share * hidden.var(0, correction=1) for share, hidden in zip(shares, calls)))
        return sum(means) / len(means), sum(variances) / len(variances)  # type: ignore[return-value]

    def train_outputs(self, flat: Tensor, scale: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Outputs and targets of all calls."""
        used = self.start if self.problem.frozen else None
        parts = [part for batch in self.problem.batches for part in self.problem.parts(batch)]
        return [(self.outputs(flat, x if scale is None else x * scale, used), y) for x, y in parts]

    def train_loss(self, flat: Tensor, scale: Tensor | None) -> Tensor:
        losses = [(out - y).square().mean() for out, y in self.train_outputs(flat, scale)]
        return torch.stack(losses).sum() / self.problem.num_batches

    def val_loss(self, flat: Tensor, scale: Tensor | None) -> Tensor:
        x, y = self.problem.val
        used = None if self.problem.val_in_train_mode else self.statistics(flat, scale)
        return (self.outputs(flat, x, used) - y).square().mean()

    def gauss_newton(self) -> Tensor:
        """The outer products of the outputs' derivatives, for a mean of squares."""
        matrix = torch.zeros(len(self.flat), len(self.flat), dtype=torch.float64)
        for i, (out, _) in enumerate(self.train_outputs(self.flat, None)):
            jacobian = torch.autograd.functional.jacobian(
                lambda v, i=i: self.train_outputs(v, None)[i][0].reshape(-1), self.flat
            )
            matrix += 2 / out.numel() / self.problem.num_batches * jacobian.T @ jacobian
        return matrix

    def hypergradient(self, curvature: str = "hessian") -> tuple[Tensor, Tensor | None]:
        """By the decay of each weight, and by the scale: ``dL/ds - d/ds (gradient . q)``."""
        flat = self.flat.clone().requires_grad_()
        scale = None if self.problem.scale is None else self.problem.scale.clone().requires_grad_()
        value = self.val_loss(flat, scale)
        leaves = [flat] if scale is None else [flat, scale]
        b, *directs = torch.autograd.grad(value, leaves, allow_unused=True)
        if curvature == "hessian":
            fixed = None if scale is None else scale.detach()
            matrix = torch.autograd.functional.hessian(lambda v: self.train_loss(v, fixed), self.flat)
        else:
            matrix = self.gauss_newton()
        system = matrix + (DECAY + DAMPING) * torch.eye(len(flat), dtype=flat.dtype)
        assert torch.linalg.eigvalsh(system)[0] > 0.1
        q = torch.linalg.solve(system, b)
        if scale is None:
            return -self.flat * q, None
        (gradient,) = torch.autograd.grad(self.train_loss(flat, scale), [flat], create_graph=True)
        (mixed,) = torch.autograd.grad(gradient @ q, [scale])
        return -self.flat * q, -mixed if directs[0] is None else directs[0] - mixed


def implicit(problem: Problem, method: Implicit) -> tuple[Tensor, Tensor | None]:
    """The same by torch_hypergrad, with the statistics at rest."""
    model, scale = problem.model(), None if problem.scale is None else problem.scale.clone().requires_grad_()
    hyper = HyperOptimizer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0, weight_decay=DECAY),
        lambda model, batch: problem.loss(model, batch, scale),
        [Hyperparameter("weight_decay", per="element"), *([] if scale is None else [("scale", scale)])],
        replace(method, num_batches=problem.num_batches),
        FROZEN,
        val_loss=problem.val_loss,
    )
    for batch in problem.batches:
        hyper.step(batch)
    written = Written(problem)
    for buffer, value in zip(model[1].buffers(), written.statistics(written.flat, problem.scale)):
        buffer.copy_(value)
    before = [buffer.clone() for buffer in model.buffers()]
    found = hyper.hypergradient(problem.val)
    assert all(map(torch.equal, before, model.buffers()))
    decays = [value.reshape(-1) for key, value in found.items() if key != "scale"]
    return torch.cat(decays), found.get("scale")


def assert_near(found: Tensor, expected: Tensor, rtol: float = 1e-8) -> None:
    assert float((found - expected).norm() / expected.norm()) < rtol


INPUT_SCALE = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
PROBLEMS = {
    "one batch": Problem(),
    "two batches": Problem(2),
    "momentum 0.5": Problem(2, momentum=0.5),
    "momentum none": Problem(2, momentum=None),
    "called twice": Problem(twice=True, momentum=0.3),
    "called twice, two batches": Problem(2, twice=True, momentum=0.3),
    "called twice, momentum none": Problem(twice=True, momentum=None),
    "scale": Problem(scale=INPUT_SCALE),
    "scale, two batches": Problem(2, scale=INPUT_SCALE),
    "scale, called twice": Problem(2, twice=True, momentum=0.3, scale=INPUT_SCALE),
    "a module of the user's": Problem(2, center=True, scale=INPUT_SCALE),
    "a module of the user's, called twice": Problem(twice=True, momentum=0.5, center=True),
    "momentum 0": Problem(momentum=0.0, follows=False),
    "frozen": Problem(follows=False, frozen=True),
    "validation in train mode": Problem(2, scale=INPUT_SCALE, val_in_train_mode=True),
}
SOLVERS = [Cholesky(DAMPING), CG(200, rtol=1e-12, damping=DAMPING), Neumann(400, damping=DAMPING)]


@pytest.mark.parametrize("kind", PROBLEMS)
def test_statistics_that_follow_the_weights(kind: str) -> None:
    """Against a dense solve; and the answer for statistics that stay where they are is another one."""
    problem = PROBLEMS[kind]
    expected = Written(problem).hypergradient()
    found = implicit(problem, Implicit(Cholesky(DAMPING)))
    assert_near(found[0], expected[0])
    if problem.scale is not None:
        assert_near(found[1], expected[1])
    if problem.follows and not problem.val_in_train_mode:
        at_rest = Written(problem)
        staying = Written(replace(problem, follows=False))
        staying.start = at_rest.statistics(at_rest.flat, problem.scale)
        for constant, right in zip(staying.hypergradient(), expected):
            if right is not None:
                assert (constant - right).norm() > 0.01 * right.norm()


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("kind", ["two batches", "scale, called twice"])
def test_statistics_that_follow_the_weights_with_each_solver(kind: str, solver: Any) -> None:
    expected, found = Written(PROBLEMS[kind]).hypergradient(), implicit(PROBLEMS[kind], Implicit(solver))
    assert_near(found[0], expected[0])
    if expected[1] is not None:
        assert_near(found[1], expected[1])


@pytest.mark.parametrize("second_order", ["forward", "finite_difference"])
@pytest.mark.parametrize("kind", ["two batches", "scale, called twice"])
def test_statistics_that_follow_the_weights_with_other_products(kind: str, second_order: str) -> None:
    method = Implicit(Cholesky(DAMPING), second_order=second_order)  # type: ignore[arg-type]
    expected, found = Written(PROBLEMS[kind]).hypergradient(), implicit(PROBLEMS[kind], method)
    rtol = 1e-8 if second_order == "forward" else 1e-5
    assert_near(found[0], expected[0], rtol)
    if expected[1] is not None:
        assert_near(found[1], expected[1], rtol)


@pytest.mark.parametrize("kind", ["one batch", "two batches"])
def test_statistics_that_follow_the_weights_with_gauss_newton(kind: str) -> None:
    found, _ = implicit(PROBLEMS[kind], Implicit(Cholesky(DAMPING), curvature="gauss_newton"))
    assert_near(found, Written(PROBLEMS[kind]).hypergradient("gauss_newton")[0])


def settled(model: nn.Module, batch: Any) -> None:
    """Statistics come to rest while the weights do."""
    with torch.no_grad():
        for _ in range(50):  # a momentum of 0.5 leaves 1e-15 of where they were
            model(batch[0])


def test_implicit_against_plain_training_to_convergence() -> None:
    """One decay for each tensor. BatchNorm's ``eps`` is large, since decay of weights whose scale does not
    matter has no optimum."""
    batch, val = random_batch(30, 4, 0), random_batch(30, 4, 1)
    torch.manual_seed(1)
    norm = nn.BatchNorm1d(3, eps=1.0, momentum=0.5)
    model = nn.Sequential(nn.Linear(4, 3), norm, nn.Tanh(), nn.Linear(3, 1)).double()

    def val_loss_at_optimum(decays: list[float]) -> float:
        def penalized() -> Tensor:
            return (
                mse(model, batch) + sum(d * p.square().sum() for d, p in zip(decays, model.parameters())) / 2
            )

        model.train()
        minimize(model, penalized)
        settled(model, batch)
        return evaluated(model, val).item()

    def loss_at(shift: float, i: int) -> float:
        return val_loss_at_optimum([0.1 + shift if j == i else 0.1 for j in range(6)])

    references = [derivative(partial(loss_at, i=i), 0.01)[0] for i in range(6)]
    val_loss_at_optimum([0.1] * 6)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, weight_decay=0.1)
    tune = [Hyperparameter("weight_decay", per="tensor")]
    hyper = HyperOptimizer(model, optimizer, mse, tune, Implicit(Cholesky()), FROZEN, val_loss=evaluated)
    hyper.step(batch)
    computed = torch.stack(list(hyper.hypergradient(val).values()))
    expected = torch.tensor(references, dtype=torch.float64)
    torch.testing.assert_close(computed, expected, rtol=1e-5, atol=1e-8)
    assert expected.abs().max() > 1e-3


# ---- the checker -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [REPLAY, ForwardMode()], ids=str)
@pytest.mark.parametrize("kind", ["momentum_none", "called_twice", "residual"])
def test_the_checker_compares_with_training_whose_statistics_move(kind: str, method: Method) -> None:
    case = CASES[kind]
    checked = check_hypergradient(lambda: make_hyper(case, NUMBERS, method), case.batches, case.val)
    plain = {
        key: differences(case, entry) for key, entry in entries(NUMBERS, make_hyper(case, NUMBERS, method))
    }
    assert {entry.name for entry in checked} == set(plain)
    for entry in checked:
        assert entry.reference == pytest.approx(plain[entry.name], rel=1e-6)


# ---- modules of the user's under unrolling -----------------------------------------------------------------


def freeze_since_step_4(model: nn.Module, number: int) -> None:
    if number == 4:
        model[1].eval()


SHIFTED = [(x + 1, y) for x, y in BATCHES]
"""Batches whose mean is not about zero, so that it depends on the weights."""


def of_center(kind: type[RunningCenter], **options: Any) -> Case:
    return Case(partial(vectors, kind), **options)


OWN = {
    "running": of_center(RunningCenter),
    "running, called twice": of_center(RunningCenter, train_loss=in_parts),
    "running, scale": of_center(RunningCenter, scale=SCALE),
    "running, frozen": of_center(RunningCenter, before_step=freeze_since_step_4, batches=SHIFTED),
    "past": of_center(PastCenter),
    "past, scale": of_center(PastCenter, scale=SCALE),
}


@pytest.mark.parametrize("kind", OWN)
def test_a_module_of_the_users(kind: str) -> None:
    for of_user in (RunningCenter, PastCenter):
        registered(of_user)
    for method in (REPLAY, ForwardMode(), Unrolled(max_graphs=3), Unrolled(max_snapshots=2)):
        check(OWN[kind], NUMBERS, method)
    check(OWN[kind], NUMBERS, Unrolled(second_order="forward"))
    check(OWN[kind], NUMBERS, Unrolled(second_order="finite_difference"), rtol=1e-5)
    check(OWN[kind], NUMBERS, Unrolled(truncation=4), since=len(BATCHES) - 4)
    check(OWN[kind], NUMBERS, Unrolled(truncation=4, max_graphs=9), since=len(BATCHES) - 4)


@pytest.mark.parametrize("method", [REPLAY, ForwardMode(), Unrolled(second_order="forward")], ids=str)
def test_reading_what_an_earlier_call_has_moved_is_refused(method: Any) -> None:
    """Training's own gradient does not go through it, so that the second derivative is none of a loss."""
    registered(PastCenter)
    with pytest.raises(HypergradientError, match="reads buffers that it also moves"):
        check(of_center(PastCenter, train_loss=in_parts), NUMBERS, method)
