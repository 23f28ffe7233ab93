"""Recorded solves of the implicit method: with the stand-in for CUDA graphs,
on a CPU that is treated as a device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_hypergrad.hyper_optimizer
from problems import Ridge, mse, random_batch, wrapped
from test_capture import StandIn, network
from torch_hypergrad import (
    CG,
    HypergradientError,
    HyperOptimizer,
    Hyperparameter,
    Identity,
    Implicit,
    Neumann,
    Nystrom,
    SolverError,
)
from torch_hypergrad.device import readings
from torch_hypergrad.device.capture import NUM_WARM_UPS

BATCHES = [random_batch(8, 4, seed) for seed in range(4)]
VAL = random_batch(8, 4, seed=100)
SGD = partial(torch.optim.SGD, lr=0.1, weight_decay=0.02)
ADAMW = partial(torch.optim.AdamW, lr=0.01, eps=1e-3)
NADAM = partial(torch.optim.NAdam, lr=0.01, eps=1e-3, decoupled_weight_decay=True)
PER_GROUP = Hyperparameter("weight_decay", init=0.1)
PER_ELEMENT = Hyperparameter("weight_decay", per="element", init=0.1)
NEUMANN = Neumann(5, scale=0.01, damping=20.0)
NUM_WINDOWS = 7


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(torch_hypergrad.hyper_optimizer, "recorder_for", lambda tensors: stand_in)
    monkeypatch.setattr(readings, "at_once", lambda tensor: False)
    return stand_in


def made(
    method: Implicit, recorder: StandIn | None, optimizer: Any = ADAMW, tune: Any = PER_ELEMENT
) -> HyperOptimizer:
    """With a recorder: captured. The model has dropout and buffers, the optimizer two groups,
    the loss a tuned tensor."""
    model = network()
    half = len(list(model.parameters())) // 2
    groups = [
        {"params": list(model.parameters())[:half]},
        {"params": list(model.parameters())[half:], "weight_decay": 0.3},
    ]
    scale = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    loss = lambda model, batch: scale.exp() * mse(model, batch)  # noqa: E731
    moving = partial(torch.optim.SGD, lr=0.1)
    hyper = HyperOptimizer(
        model,
        optimizer(groups),
        loss,
        [tune, ("scale", scale)],
        method,
        moving,
        val_loss=mse,
        capture=recorder is not None,
    )
    if recorder is not None:
        recorder.memory = lambda: list(hyper._problem.live.model.memory())
    return hyper


def run(hyper: HyperOptimizer, batches: Any = BATCHES, num_windows: int = NUM_WINDOWS) -> list[Any]:
    """What the hyper steps report, and the values after them. A scheduler moves the learning rate."""
    torch.manual_seed(1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(hyper.optimizer, 0.97)
    found: list[Any] = []
    for t in range(num_windows):
        for batch in (batches[t % len(batches)], batches[(t + 1) % len(batches)]):
            hyper.step(batch)
            scheduler.step()
        report = hyper.hyper_step(VAL)
        found += [report.hypergradient_norm, report.residual, report.num_matvecs]
        found += [value.tolist() for value in hyper.values().values()]
    return found


WHOLE = {
    "per group": (Implicit(NEUMANN), SGD, PER_GROUP),
    "per element": (Implicit(NEUMANN), SGD, PER_ELEMENT),
    "decoupled decay": (Implicit(NEUMANN), ADAMW, PER_ELEMENT),
    "decoupled decay, per group": (Implicit(NEUMANN), ADAMW, PER_GROUP),
    "a schedule of momenta": (Implicit(NEUMANN), NADAM, PER_ELEMENT),
    "estimated scale": (Implicit(Neumann(10, damping=30.0)), ADAMW, PER_ELEMENT),
    "no product": (Implicit(Identity(0.1)), ADAMW, PER_ELEMENT),
    "second moments": (
        Implicit(Neumann(5, damping=500.0), preconditioner="second_moments"),
        ADAMW,
        PER_ELEMENT,
    ),
    "Gauss-Newton": (Implicit(NEUMANN, curvature="gauss_newton"), ADAMW, PER_ELEMENT),
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_whole_solve_is_replayed(case: str, recorder: StandIn) -> None:
    """Values, learning rates, step counts and second moments are new at each hyper step,
    and none makes a recording."""
    method, optimizer, tune = WHOLE[case]
    hyper, eager = made(method, recorder, optimizer, tune), made(method, None, optimizer, tune)
    assert run(hyper) == run(eager)
    for ours, theirs in zip(hyper.model.state_dict().values(), eager.model.state_dict().values()):
        assert torch.equal(ours, theirs)
    assert recorder.recordings == 2  # the gradient and the solve
    assert recorder.replays == (3 * NUM_WINDOWS - NUM_WARM_UPS) + (NUM_WINDOWS - NUM_WARM_UPS)


PRODUCTS = {
    "conjugate gradients": Implicit(CG(3, damping=50.0)),
    "with a low-rank picture": Implicit(Nystrom(2, damping=50.0, max_steps=2)),
    "several batches": Implicit(NEUMANN, num_batches=2),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_else_each_product_is_replayed(case: str, recorder: StandIn) -> None:
    """Eager products share the graph of a gradient, and are summed up in another order."""
    hyper, eager = made(PRODUCTS[case], recorder), made(PRODUCTS[case], None)
    for ours, theirs in zip(run(hyper), run(eager)):
        assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=1e-9, atol=1e-14)
    assert recorder.recordings == 2  # the gradient and a product
    assert recorder.replays > (2 * NUM_WINDOWS - NUM_WARM_UPS) + 3 * (NUM_WINDOWS - 1)


def test_what_has_no_recorded_products_is_eager(recorder: StandIn) -> None:
    """Gauss-Newton products of a solver that waits, and differences of gradients."""
    methods = [
        Implicit(CG(3, damping=20.0), curvature="gauss_newton"),
        Implicit(NEUMANN, second_order="finite_difference"),
    ]
    for count, method in enumerate(methods, start=1):
        assert run(made(method, recorder)) == run(made(method, None))
        assert recorder.recordings == count  # the gradient


def test_batches_of_two_sizes_make_two_recordings(recorder: StandIn) -> None:
    batches = [BATCHES[0], tuple(part[:5] for part in BATCHES[1])]
    hyper, eager = made(Implicit(NEUMANN), recorder), made(Implicit(NEUMANN), None)
    assert run(hyper, batches, 10) == run(eager, batches, 10)
    assert recorder.recordings == 2 * 2


def test_buffers_that_the_loss_reads_are_those_before_the_gradient(recorder: StandIn) -> None:
    """The gradient is taken once before the solve, which moves them."""

    class Chasing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 1).double()
            self.register_buffer("level", torch.ones((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            self.level.mul_(1.5)
            return torch.tanh(self.inner(x)) * self.level.clone()

    found = []
    for capture in (recorder, None):
        torch.manual_seed(0)
        hyper = wrapped(Chasing(), [PER_GROUP], Implicit(NEUMANN), SGD, capture=capture is not None)
        if capture is not None:
            recorder.memory = lambda hyper=hyper: list(hyper._problem.live.model.memory())
        hyper.step(BATCHES[0])
        found.append([hyper.hypergradient(VAL)["weight_decay/group0"].item() for _ in range(6)])
    assert found[0] == found[1]
    assert recorder.recordings == 2


# ---- against what is known otherwise -----------------------------------------------------------------------


def at_optima(method: Implicit, num: int) -> list[tuple[Tensor, Tensor]]:
    """Hypergradients at the optima of ridge regressions with other data and decays,
    one after the other, and the truth."""
    hyper = Ridge.make().at_optimum(method, capture=True)
    found = []
    for seed in range(num):
        ridge = Ridge.make(seed=10 * seed)
        ridge = Ridge(ridge.train, ridge.val, ridge.decay + 1 + seed)
        hyper.set_values({"weight_decay/weight": ridge.decay[None]})
        with torch.no_grad():
            hyper.model.weight.copy_(ridge.optimum())  # type: ignore[operator]
        hyper.step(ridge.train)
        found.append((hyper.hypergradient(ridge.val)["weight_decay/weight"][0], ridge.hypergradient()))
    return found


@pytest.mark.parametrize("method", [Implicit(Neumann(200)), Implicit(CG(50, 1e-13))], ids=str)
def test_ridge_regressions_have_their_closed_forms(method: Implicit, recorder: StandIn) -> None:
    for found, exact in at_optima(method, 8):
        torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-12)
    assert recorder.recordings == 2


@pytest.mark.parametrize("preconditioner", [None, "second_moments"])
def test_decoupled_decay_is_that_of_a_dense_solve_at_every_step_count(
    preconditioner: Any, recorder: StandIn
) -> None:
    """``-D w (H + D W + damping)^-1 b`` with ``D = sqrt(v / (1 - beta2^t)) + eps`` from the optimizer's own
    state; with the preconditioner the damping is in units of D."""
    ridge, decay, damping, eps = Ridge.make(), 0.5, 2.0, 0.1
    tune = [Hyperparameter("weight_decay", per="element", init=decay)]
    optimizer = partial(torch.optim.AdamW, lr=0.05, betas=(0.8, 0.9), eps=eps)
    method = Implicit(Neumann(300, damping=damping), preconditioner=preconditioner)
    hyper = wrapped(
        nn.Linear(6, 1, bias=False).double(), tune, method, optimizer, train_loss=ridge.loss, capture=True
    )
    hessian = ridge.matrix() - ridge.decay.diag()
    for t in range(1, NUM_WINDOWS + 1):
        hyper.step(ridge.train)
        (state,) = hyper.optimizer.state.values()
        d = (state["exp_avg_sq"][0] / (1 - 0.9**t)).sqrt() + eps
        w = hyper.model.weight.detach()[0]
        damped = (damping * d if preconditioner else torch.full_like(d, damping)).diag()
        q = torch.linalg.solve(hessian + decay * d.diag() + damped, ridge.val_gradient(w))
        found = hyper.hypergradient(ridge.val)["weight_decay/weight"][0]
        torch.testing.assert_close(found, -d * w * q, rtol=1e-8, atol=1e-12)
    assert recorder.recordings == 2


# ---- what goes wrong ---------------------------------------------------------------------------------------


def late(hyper: HyperOptimizer, good: Any, bad: Any, refused: Callable[[], Any]) -> None:
    """The bad batch comes when all has been recorded, and good ones after it."""
    for batch in [*[good] * 5, bad, good]:
        hyper.step(batch)
        if batch is bad:
            with refused():
                hyper.hypergradient(VAL)
        else:
            hyper.hypergradient(VAL)


def test_a_replayed_series_that_diverges_is_refused(recorder: StandIn) -> None:
    x, y = BATCHES[0]
    hyper = wrapped(nn.Linear(4, 1).double(), [PER_GROUP], Implicit(Neumann(50, scale=0.1)), capture=True)
    late(
        hyper,
        (x, y),
        (100 * x, y),
        partial(pytest.raises, SolverError, match="Neumann diverged: relative residual .* 50 terms"),
    )
    assert recorder.recordings == 2


def test_replayed_gauss_newton_refuses_a_penalty_on_the_weights(recorder: StandIn) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return mse(model, batch[:2]) + batch[2] * sum(p.square().sum() for p in model.parameters())

    none, some = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    method = Implicit(Neumann(5, scale=0.01), curvature="gauss_newton")
    hyper = wrapped(
        nn.Linear(4, 1).double(), [PER_GROUP], method, train_loss=loss, val_loss=mse, capture=True
    )
    refused = partial(pytest.raises, HypergradientError, match="does not come through the model's outputs")
    late(hyper, (*BATCHES[0], none), (*BATCHES[0], some), refused)
    assert recorder.recordings == 2


def test_a_loss_that_waits_is_reported_and_solved_eagerly(recorder: StandIn) -> None:
    recorder.objection = "it waits for the device, in loss.py, line 3"
    hyper, eager = made(Implicit(NEUMANN), recorder), made(Implicit(NEUMANN), None)
    with pytest.warns(UserWarning, match=r"loss\.py, line 3") as caught:
        found = run(hyper)
    assert ["the solve of the implicit method" in str(warning.message) for warning in caught] == [False, True]
    assert found == run(eager)
    assert (recorder.warm_ups, recorder.recordings) == (2, 0)
