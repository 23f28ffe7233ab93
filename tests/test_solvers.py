"""Nystrom, preconditioning with second moments and Gauss-Newton curvature, against dense linear algebra."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from problems import FROZEN, Ridge, random_batch, wrapped
from torch_hypergrad import (
    CG,
    Cholesky,
    HypergradientError,
    HyperOptimizer,
    Hyperparameter,
    Identity,
    Implicit,
    Neumann,
    Nystrom,
    SolveInfo,
    Solver,
    SolverError,
    register_update,
)

RIDGE = Ridge.make()


def entry(hypergradient: dict[str, Tensor]) -> Tensor:
    (only,) = hypergradient.values()
    return only.reshape(-1)


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def spectrum(eigenvalues: list[float], seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(
        torch.randn(len(eigenvalues), len(eigenvalues), generator=generator, dtype=torch.float64)
    ).Q
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


def vector(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- Nystrom -----------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    eigenvalues=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=12),
    rank=st.integers(1, 15),
    damping=st.sampled_from([0.0, 1e-2, 1.0]),
    seed=st.integers(0, 100),
)
def test_nystrom_solves_positive_definite_systems(
    eigenvalues: list[float], rank: int, damping: float, seed: int
) -> None:
    matrix, b = spectrum(eigenvalues, seed), vector(len(eigenvalues), seed)
    x, info = Nystrom(rank, damping, max_steps=200, rtol=1e-12).solve(lambda v: matrix @ v, b)
    expected = torch.linalg.solve(matrix + damping * torch.eye(len(b), dtype=b.dtype), b)
    assert relative_error(x, expected) < 1e-5  # the condition number times the residual
    assert info.num_matvecs > min(rank, len(b))
    assert info.residual is not None
    assert info.residual < 1e-11


def test_nystrom_takes_fewer_iterations_than_conjugate_gradients() -> None:
    """With the large eigenvalues out of the way, at most half as many iterations are left."""
    matrix, b = spectrum([10.0**k for k in range(5, 0, -1)] + [1.0 + 0.02 * k for k in range(45)]), vector(50)
    _, plain = CG(100, rtol=1e-10).solve(lambda v: matrix @ v, b)
    _, info = Nystrom(20, max_steps=100, rtol=1e-10).solve(lambda v: matrix @ v, b)
    assert info.num_matvecs - 20 <= plain.num_matvecs / 2


@pytest.mark.parametrize("rank", [4, 6])
def test_nystrom_without_iterations_is_exact_for_a_matrix_of_its_rank(rank: int) -> None:
    matrix, b = spectrum([5.0, 3.0, 2.0, 1.0] + [0.0] * 16), vector(20)
    x, info = Nystrom(rank, damping=0.1, max_steps=0).solve(lambda v: matrix @ v, b)
    expected = torch.linalg.solve(matrix + 0.1 * torch.eye(20, dtype=torch.float64), b)
    assert relative_error(x, expected) < 1e-10
    assert info.num_matvecs == rank + 1
    assert info.residual is not None
    assert info.residual < 1e-10


def test_nystrom_without_iterations_reports_its_residual() -> None:
    matrix, b = spectrum([5.0, 3.0, 2.0, 1.0, 0.5]), vector(5)
    x, info = Nystrom(2, damping=0.1, max_steps=0).solve(lambda v: matrix @ v, b)
    residual = b - matrix @ x - 0.1 * x
    assert info.residual == pytest.approx(float(residual.norm() / b.norm()), rel=1e-10)
    assert info.residual > 0.01


def test_nystrom_leaves_the_global_random_numbers_alone_and_gives_the_same_twice() -> None:
    matrix, b = spectrum([5.0, 3.0, 2.0, 1.0, 0.5]), vector(5)
    before = torch.get_rng_state()
    first, _ = Nystrom(2, max_steps=3).solve(lambda v: matrix @ v, b)
    second, _ = Nystrom(2, max_steps=3).solve(lambda v: matrix @ v, b)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("eigenvalues", "solver", "words"),
    [
        ([-1.0, -2.0, -3.0], Nystrom(2), "Nystrom met a direction of curvature -"),
        ([3.0, 2.0, 1.0, -1.0], Nystrom(1), "needs positive ones"),
        ([0.0, 0.0], Nystrom(1), "curvature 0 in iteration 1"),
        ([3.0, 2.0, 1.0, -1.0], Nystrom(4, damping=0.5), r"Nystrom\(damping=...\) above .*gauss_newton"),
        ([float("nan"), 1.0], Nystrom(1), "not finite"),
    ],
)
def test_nystrom_refuses_what_is_not_positive_definite(
    eigenvalues: list[float], solver: Nystrom, words: str
) -> None:
    matrix = torch.diag(torch.tensor(eigenvalues, dtype=torch.float64))
    with pytest.raises(SolverError, match=words):
        solver.solve(lambda v: matrix @ v, vector(len(eigenvalues), 1))


def test_nystrom_damps_a_matrix_that_is_zero() -> None:
    x, _ = Nystrom(2, damping=0.5).solve(torch.zeros_like, vector(4))
    assert relative_error(x, 2 * vector(4)) < 1e-12


@pytest.mark.parametrize("solver", [Nystrom(3, max_steps=50, rtol=1e-13), Nystrom(6), Nystrom(30)], ids=str)
def test_nystrom_on_ridge(solver: Nystrom) -> None:
    hyper = RIDGE.at_optimum(Implicit(solver))
    assert relative_error(entry(hyper.hypergradient(RIDGE.val)), RIDGE.hypergradient()) < 1e-8


# ---- the optimizer's second moments ------------------------------------------------------------------------

STEPPED: dict[str, tuple[Any, Callable[[dict[str, Any]], Tensor]]] = {
    "Adam": (
        partial(torch.optim.Adam, lr=0.01, betas=(0.8, 0.9), eps=0.1),
        lambda state: (state["exp_avg_sq"] / (1 - 0.9**3)).sqrt() + 0.1,
    ),
    "AdamW": (
        partial(torch.optim.AdamW, lr=0.01, betas=(0.8, 0.9), eps=0.1),
        lambda state: (state["exp_avg_sq"] / (1 - 0.9**3)).sqrt() + 0.1,
    ),
    "AMSGrad": (
        partial(torch.optim.Adam, lr=0.01, betas=(0.8, 0.9), eps=0.1, amsgrad=True),
        lambda state: (state["max_exp_avg_sq"] / (1 - 0.9**3)).sqrt() + 0.1,
    ),
    "NAdam": (
        partial(torch.optim.NAdam, lr=0.01, betas=(0.8, 0.9), eps=0.1),
        lambda state: (state["exp_avg_sq"] / (1 - 0.9**3)).sqrt() + 0.1,
    ),
    "RAdam": (
        partial(torch.optim.RAdam, lr=0.01, betas=(0.8, 0.9), eps=0.1),
        lambda state: (state["exp_avg_sq"] / (1 - 0.9**3)).sqrt() + 0.1,
    ),
    "Adamax": (partial(torch.optim.Adamax, lr=0.01), lambda state: state["exp_inf"]),
    "RMSprop": (
        partial(torch.optim.RMSprop, lr=0.01, eps=0.1),
        lambda state: state["square_avg"].sqrt() + 0.1,
    ),
    "centered": (
        partial(torch.optim.RMSprop, lr=0.01, eps=0.1, centered=True),
        lambda state: (state["square_avg"] - state["grad_avg"] ** 2).sqrt() + 0.1,
    ),
    "Adagrad": (partial(torch.optim.Adagrad, lr=0.01, eps=0.1), lambda state: state["sum"].sqrt() + 0.1),
    "Adadelta": (
        partial(torch.optim.Adadelta, lr=0.01, eps=0.1),
        lambda state: (state["square_avg"] + 0.1).sqrt(),
    ),
}


def after_steps(optimizer: Any, method: Implicit, num_steps: int = 3, **options: Any) -> HyperOptimizer:
    """Ridge, a few steps from the optimum."""
    hyper = RIDGE.at_optimum(method, optimizer=optimizer, **options)
    for _ in range(num_steps - 1):
        hyper.step(RIDGE.train)
    return hyper


def state_and_weights(hyper: HyperOptimizer) -> tuple[dict[str, Any], Tensor]:
    (weight,) = hyper.model.parameters()
    state = {key: value.reshape(-1) for key, value in hyper.optimizer.state[weight].items()}
    return state, weight.detach().reshape(-1).clone()


@pytest.mark.parametrize("kind", STEPPED)
def test_the_preconditioner_is_what_the_optimizer_divides_by(kind: str) -> None:
    """One term: q = scale * D^-1 b, with D from torch's own state;
    AdamW's decay has the same D in its derivative."""
    optimizer, diagonal = STEPPED[kind]
    hyper = after_steps(optimizer, Implicit(Identity(scale=0.5), preconditioner="second_moments"))
    state, w = state_and_weights(hyper)
    d = diagonal(state)
    expected = -0.5 * w * RIDGE.val_gradient(w) / (1 if kind == "AdamW" else d)
    assert relative_error(entry(hyper.hypergradient(RIDGE.val)), expected) < 1e-10


@pytest.mark.parametrize(
    "solver",
    [
        Nystrom(3, rtol=1e-13),
        Cholesky(),
        CG(50, rtol=1e-13, damping=0.7),
        Neumann(400, damping=0.7),
        Nystrom(3, damping=0.7, rtol=1e-13),
        Cholesky(damping=0.7),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_preconditioned_systems_have_the_solution_of_the_plain_one(kind: str, solver: Any) -> None:
    """(H + decay + damping D) q = b, or with AdamW (H + D decay + damping D) q = b, in dense algebra."""
    optimizer, diagonal = STEPPED[kind]
    hyper = after_steps(optimizer, Implicit(solver, preconditioner="second_moments"))
    state, w = state_and_weights(hyper)
    x, _ = RIDGE.train
    d = diagonal(state)
    slope = d if kind == "AdamW" else torch.ones_like(d)
    matrix = x.T @ x / len(x) + (slope * RIDGE.decay + solver.damping * d).diag()
    expected = -slope * w * torch.linalg.solve(matrix, RIDGE.val_gradient(w))
    assert relative_error(entry(hyper.hypergradient(RIDGE.val)), expected) < 1e-7
    report = hyper.hyper_step(RIDGE.val)
    assert report.residual is not None
    assert report.residual < 1e-7


def test_the_residual_is_that_of_the_system_itself() -> None:
    optimizer, diagonal = STEPPED["Adam"]
    hyper = after_steps(optimizer, Implicit(CG(2, damping=0.3), preconditioner="second_moments"))
    state, w = state_and_weights(hyper)
    x, _ = RIDGE.train
    q = -entry(hyper.hypergradient(RIDGE.val)) / w
    matrix = x.T @ x / len(x) + (RIDGE.decay + 0.3 * diagonal(state)).diag()
    b = RIDGE.val_gradient(w)
    report = hyper.hyper_step(RIDGE.val)
    assert report.residual == pytest.approx(float((b - matrix @ q).norm() / b.norm()), rel=1e-8)
    assert report.num_matvecs == 3


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.ASGD])
def test_an_optimizer_without_second_moments_is_refused(optimizer: Any) -> None:
    with pytest.raises(ValueError, match=r"GD keeps no second moments.*preconditioner=None.*Adam"):
        wrapped(
            nn.Linear(3, 1),
            [Hyperparameter("weight_decay")],
            Implicit(CG(), preconditioner="second_moments"),
            partial(optimizer, lr=0.1),
        )


def test_second_moments_of_zero_are_refused() -> None:
    """The third input is always 0, and so are its gradient and its decay; eps is 0 too."""
    batch = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[1.0]])
    optimizer = partial(torch.optim.Adam, lr=0.0, eps=0.0)
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    method = Implicit(CG(damping=1.0), preconditioner="second_moments")
    hyper = wrapped(model, [Hyperparameter("weight_decay")], method, optimizer)
    hyper.step(batch)
    nn.init.zeros_(model.weight)  # Adam's own step there is 0 / 0
    with pytest.raises(SolverError, match=r"1 of 3 entries.*eps above 0"):
        hyper.hypergradient(batch)


class Whole(torch.optim.SGD):
    """SGD whose rule runs on one parameter at a time, and whose stationarity mixes the entries."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


MIX = torch.eye(6, dtype=torch.float64) + 0.3 * torch.ones(6, 6, dtype=torch.float64)


@register_update(
    Whole,
    {"lr": (0.0, float("inf")), "weight_decay": (0.0, float("inf"))},
    stationarity=lambda param, grad, state, settings: (grad + settings["weight_decay"] * param) @ MIX,
    moves_optimum=("weight_decay",),
    elementwise=False,
)
def whole(param: Tensor, grad: Tensor, state: Any, settings: Any) -> tuple[Tensor, Any]:
    return param - settings["lr"] * (grad + settings["weight_decay"] * param), state


def test_a_rule_that_is_not_elementwise_has_the_same_optimum() -> None:
    """F times an invertible matrix is zero where F is, so the hypergradient is that of plain ridge;
    A is not symmetric."""
    hyper = RIDGE.at_optimum(Implicit(Nonsymmetric()), optimizer=partial(Whole, lr=0.0))
    assert relative_error(entry(hyper.hypergradient(RIDGE.val)), RIDGE.hypergradient()) < 1e-8


class Nonsymmetric(Solver):
    """Dense and exact, for any matrix."""

    def solve(self, matvec: Callable[[Tensor], Tensor], b: Tensor) -> tuple[Tensor, SolveInfo]:
        matrix = torch.stack([matvec(row) for row in torch.eye(len(b), dtype=b.dtype)], dim=1)
        return torch.linalg.solve(matrix, b), SolveInfo(len(b), None)


# ---- Gauss-Newton ------------------------------------------------------------------------------------------


def classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def labelled(seed: int, num: int = 12) -> tuple[Tensor, Tensor]:
    x, _ = random_batch(num, 4, seed)
    return x, torch.randint(3, (num,), generator=torch.Generator().manual_seed(seed))


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """Of the outputs (example by output) in the flat parameters, row by row."""
    rows = [torch.autograd.grad(o, list(model.parameters()), retain_graph=True) for o in model(x).reshape(-1)]
    return torch.stack([flat(row) for row in rows])


def dense_gauss_newton(model: nn.Module, batch: Any, weights: Tensor | None = None) -> Tensor:
    """sum_i w_i J_i^T (diag(p_i) - p_i p_i^T) J_i / n, with the softmax's Hessian written out by hand."""
    x, _ = batch
    jacobians = jacobian(model, x).view(len(x), 3, -1)
    p = model(x).softmax(1).detach()
    total = torch.zeros(jacobians.shape[2], jacobians.shape[2], dtype=torch.float64)
    for i in range(len(x)):
        total += (
            (1 if weights is None else weights[i])
            * jacobians[i].T
            @ (p[i].diag() - p[i].outer(p[i]))
            @ jacobians[i]
        )
    return total / len(x)


def gradient(model: nn.Module, batch: Any) -> Tensor:
    return flat(torch.autograd.grad(cross_entropy(model, batch), list(model.parameters())))


@pytest.mark.parametrize("num_batches", [1, 2])
@pytest.mark.parametrize(
    "solver", [CG(100, rtol=1e-13), Nystrom(5, max_steps=100, rtol=1e-13), Cholesky()], ids=str
)
def test_gauss_newton_against_dense_algebra(solver: Any, num_batches: int) -> None:
    model, batches, val = classifier(), [labelled(0), labelled(1)], labelled(9)
    tune = [Hyperparameter("weight_decay", per="element", init=0.05)]
    method = Implicit(solver, num_batches, curvature="gauss_newton")
    hyper = wrapped(model, tune, method, partial(torch.optim.SGD, lr=0.0), train_loss=cross_entropy)
    for batch in batches:
        hyper.step(batch)
    used = batches[-num_batches:]
    matrix = torch.stack([dense_gauss_newton(model, batch) for batch in used]).mean(0)
    matrix += 0.05 * torch.eye(len(matrix), dtype=torch.float64)
    expected = -flat(model.parameters()) * torch.linalg.solve(matrix, gradient(model, val))
    assert relative_error(flat(hyper.hypergradient(val).values()), expected) < 1e-8


def test_gauss_newton_with_two_outputs_in_a_dict() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.unused = (
                nn.Linear(4, 6, dtype=torch.float64),
                nn.Linear(4, 2, dtype=torch.float64),
            )

        def forward(self, x: Tensor) -> dict[str, Any]:
            hidden = self.body(x)
            return {
                "logits": [hidden[:, :3].tanh()],
                "other": hidden[:, 3:].square(),
                "unused": self.unused(x),
                "name": "x",
            }

    def loss(model: nn.Module, batch: Any) -> Tensor:
        found = model(batch[0])
        return F.cross_entropy(found["logits"][0], batch[1]) + F.cross_entropy(found["other"], batch[1])

    torch.manual_seed(0)
    model, batch, val = TwoHeads(), labelled(0), labelled(1)
    tune = [Hyperparameter("weight_decay", per="element", init=0.05)]
    method = Implicit(Cholesky(), curvature="gauss_newton")
    hyper = wrapped(model, tune, method, partial(torch.optim.SGD, lr=0.0), train_loss=loss)
    hyper.step(batch)
    body = list(model.body.parameters())
    total = 0.05 * torch.eye(30, dtype=torch.float64)
    for head in (lambda x: model(x)["logits"][0], lambda x: model(x)["other"]):
        out = head(batch[0])
        rows = [flat(torch.autograd.grad(o, body, retain_graph=True)) for o in out.reshape(-1)]
        jacobians, p = torch.stack(rows).view(12, 3, 30), out.softmax(1).detach()
        for i in range(12):
            total += jacobians[i].T @ (p[i].diag() - p[i].outer(p[i])) @ jacobians[i] / 12
    val_gradient = flat(torch.autograd.grad(loss(model, val), body))
    found = hyper.hypergradient(val)
    computed = flat([found["weight_decay/body.weight"], found["weight_decay/body.bias"]])
    assert relative_error(computed, -flat(body) * torch.linalg.solve(total, val_gradient)) < 1e-8


def test_gauss_newton_with_features_beside_the_logits() -> None:
    """Features that the logits come from, one of which the loss reads too, as a squared error:
    J^T J of these on top."""

    class WithFeatures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = classifier()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            hidden = self.net[1](self.net[0](x))
            logits = self.net[2](hidden)
            return logits, hidden, logits

    def loss(model: nn.Module, batch: Any) -> Tensor:
        logits, hidden, _ = model(batch[0])
        return F.cross_entropy(logits, batch[1]) + hidden[:, 0].square().mean() / 2

    model, batch, val = WithFeatures(), labelled(0), labelled(9)
    tune = [Hyperparameter("weight_decay", per="element", init=0.05)]
    method = Implicit(Cholesky(), curvature="gauss_newton")
    hyper = wrapped(model, tune, method, partial(torch.optim.SGD, lr=0.0), train_loss=loss)
    hyper.step(batch)
    params = list(model.parameters())
    hidden = model(batch[0])[1][:, 0]
    rows = [torch.autograd.grad(h, params, retain_graph=True, materialize_grads=True) for h in hidden]
    jacobians = torch.stack([flat(row) for row in rows])
    matrix = dense_gauss_newton(model.net, batch) + jacobians.T @ jacobians / 12
    matrix += 0.05 * torch.eye(len(matrix), dtype=torch.float64)
    val_gradient = flat(torch.autograd.grad(loss(model, val), params))
    expected = -flat(params) * torch.linalg.solve(matrix, val_gradient)
    assert relative_error(flat(hyper.hypergradient(val).values()), expected) < 1e-8


def test_mixed_products_stay_exact_with_gauss_newton() -> None:
    """One weight for each training example:
    the hypergradient of weight i is -(gradient of loss i) . q / n."""
    model, batch, val = classifier(), labelled(0), labelled(9)
    weights = torch.linspace(0.5, 2.0, 12, dtype=torch.float64).requires_grad_()

    def train_loss(model: nn.Module, batch: Any) -> Tensor:
        return (weights * F.cross_entropy(model(batch[0]), batch[1], reduction="none")).mean()

    hyper = HyperOptimizer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0, weight_decay=0.05),
        train_loss,
        [("weights", weights)],
        Implicit(Cholesky(), curvature="gauss_newton"),
        FROZEN,
        val_loss=cross_entropy,
    )
    hyper.step(batch)
    matrix = dense_gauss_newton(model, batch, weights.detach())
    matrix += 0.05 * torch.eye(len(matrix), dtype=torch.float64)
    q = torch.linalg.solve(matrix, gradient(model, val))
    each = torch.stack([gradient(model, (batch[0][i : i + 1], batch[1][i : i + 1])) for i in range(12)])
    assert relative_error(hyper.hypergradient(val)["weights"], -each @ q / 12) < 1e-8


def test_gauss_newton_is_the_hessian_of_a_linear_model() -> None:
    hyper = RIDGE.at_optimum(Implicit(Cholesky(), curvature="gauss_newton"))
    assert relative_error(entry(hyper.hypergradient(RIDGE.val)), RIDGE.hypergradient()) < 1e-8


def test_gauss_newton_is_positive_where_the_hessian_is_not() -> None:
    """Far from a minimum: the Hessian has a negative eigenvalue, of which CG complains;
    the series converges all the same."""
    model, batch, val = classifier(3), labelled(0), labelled(9)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)

    def found(solver: Any, curvature: Any) -> Tensor:
        tune = [Hyperparameter("weight_decay", init=0.01)]
        hyper = wrapped(
            model,
            tune,
            Implicit(solver, curvature=curvature),
            partial(torch.optim.SGD, lr=0.0),
            train_loss=cross_entropy,
        )
        hyper.step(batch)
        return entry(hyper.hypergradient(val))

    with pytest.raises(SolverError, match="gauss_newton"):
        found(CG(200), "hessian")
    exact = found(Cholesky(), "gauss_newton")
    assert relative_error(found(CG(500, rtol=1e-12), "gauss_newton"), exact) < 1e-6
    assert relative_error(found(Neumann(500), "gauss_newton"), exact) < 0.05


def penalized(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model, batch) + 0.01 * sum(p.square().sum() for p in model.parameters())


def by_parts(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model[2](model[1](model[0](batch[0]))), batch[1])


@pytest.mark.parametrize(
    ("train_loss", "words"),
    [
        (penalized, "does not come through the model's outputs.*weight_decay.*curvature='hessian'"),
        (by_parts, "does not call model.*curvature='hessian'"),
    ],
)
def test_a_loss_that_is_no_function_of_the_outputs_is_refused(train_loss: Any, words: str) -> None:
    model = classifier()
    tune = [Hyperparameter("weight_decay", init=0.05)]
    method = Implicit(CG(), curvature="gauss_newton")
    hyper = wrapped(model, tune, method, partial(torch.optim.SGD, lr=0.0), train_loss=train_loss)
    hyper.step(labelled(0))
    with pytest.raises(HypergradientError, match=words):
        hyper.hypergradient(labelled(9))
    assert not model._forward_hooks


def test_gauss_newton_with_a_frozen_layer_and_second_moments() -> None:
    """All options together: the first layer is frozen, so the model is linear in what is trained."""
    model, batch, val = classifier(), labelled(0), labelled(9)
    for p in model[0].parameters():  # type: ignore[index]
        p.requires_grad_(False)
    tune = [Hyperparameter("weight_decay", per="element", init=0.05)]
    adam = partial(torch.optim.Adam, lr=0.01, betas=(0.8, 0.9))

    def found(method: Implicit) -> Tensor:
        torch.manual_seed(0)
        hyper = wrapped(model, tune, method, adam, train_loss=cross_entropy)
        hyper.step(batch)
        values = flat(hyper.hypergradient(val).values())
        hyper.restart()
        return values

    exact = found(Implicit(Cholesky(), curvature="hessian"))
    with_all = Implicit(CG(100, rtol=1e-13), curvature="gauss_newton", preconditioner="second_moments")
    assert relative_error(found(with_all), exact) < 1e-8
