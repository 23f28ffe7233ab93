"""Which graphs ``Unrolled`` keeps by itself: those that are light, and those that fit; and what a step leaves
besides. The answer is the same whatever is kept, which is held against replayed steps here, and those against
finite differences elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from problems import FROZEN, REPLAY, mse, random_batch
from test_kept_graphs import assert_all_close, graphs_of
from test_modules import ADAM, SGD, build
from test_snapshots import live_bytes
from torch_hypergrad import HyperOptimizer, Hyperparameter, NonFiniteError, Unrolled, register_update
from torch_hypergrad.ground.autodiff import weighing
from torch_hypergrad.methods import unrolled
from torch_hypergrad.updates.base import Pulled

NUM_STEPS = 8
DECAY = Hyperparameter("weight_decay", per="tensor", init=0.01)
NOTHING = Unrolled(memory=1)
HALF = Unrolled(memory=20_000)


def heavy() -> nn.Module:
    """Few weights, many numbers on the way: a graph weighs more than a state."""
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def light() -> nn.Module:
    """The other way round."""
    return nn.Sequential(nn.Linear(4, 300), nn.Tanh(), nn.Linear(300, 1)).double()


def batches(size: int, number: int = NUM_STEPS) -> list[Any]:
    return [random_batch(size, 4, seed) for seed in range(number)]


MANY = batches(100)


def trained(
    method: Unrolled,
    make: Callable[[], nn.Module] = heavy,
    batches: Any = MANY,
    loss: Any = mse,
    optimizer: Any = SGD,
    tune: Any = DECAY,
) -> HyperOptimizer:
    torch.manual_seed(0)
    model = make()
    hyper = HyperOptimizer(model, optimizer(model.parameters()), loss, [tune], method, FROZEN, val_loss=mse)
    torch.manual_seed(1)
    for batch in batches:
        hyper.step(batch)
    return hyper


VAL = random_batch(8, 4, seed=100)


# ---- which are kept ----------------------------------------------------------------------------------------


def weights_of(hyper: HyperOptimizer) -> list[int]:
    return list(hyper._window._history._shelf._held.values())  # type: ignore[attr-defined]


def test_light_graphs_are_kept_whatever_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unrolled, "DEFAULT_MEMORY", 0.0)
    assert len(graphs_of(trained(Unrolled(), light, batches(2)))) == NUM_STEPS
    assert len(graphs_of(trained(Unrolled(), heavy))) == 0
    assert len(graphs_of(trained(NOTHING, light, batches(2)))) == 0  # asked for


def test_by_default_a_tenth_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    (weight,) = set(weights_of(trained(Unrolled())))
    for number in (0, 3, NUM_STEPS):
        monkeypatch.setattr(unrolled, "total_memory", lambda device, n=number: 10 * n * weight + 10)
        assert sorted(graphs_of(trained(Unrolled()))) == list(range(number))
        assert sorted(graphs_of(trained(Unrolled(memory=0.2)))) == list(range(min(2 * number, NUM_STEPS)))
        assert sorted(graphs_of(trained(Unrolled(memory=number * weight + 1)))) == list(range(number))


@pytest.mark.parametrize("kind", ["dropout", "batch_norm", "tied", "frozen", "sometimes", "lstm"])
@pytest.mark.parametrize("number", [0, 3, NUM_STEPS])
def test_the_answer_is_that_of_replay(kind: str, number: int) -> None:
    make, tune = partial(build, kind), Hyperparameter("lr", per="tensor")
    heaviest = max(weights_of(trained(Unrolled(), make, batches(8), optimizer=ADAM)))
    method = Unrolled(memory=number * heaviest + 1)
    kept = trained(method, make, batches(8), optimizer=ADAM, tune=tune)
    assert number - 1 <= len(graphs_of(kept)) <= NUM_STEPS  # one of a new kind is not weighed
    assert number or not graphs_of(kept)
    replayed = trained(REPLAY, make, batches(8), optimizer=ADAM, tune=tune)
    for ours, theirs in zip(kept.model.state_dict().values(), replayed.model.state_dict().values()):
        assert torch.equal(ours, theirs)
    expected = replayed.hypergradient(VAL)
    for _ in range(2):  # the second time every step is replayed
        assert_all_close(kept.hypergradient(VAL), expected)


def test_a_truncation_gives_room() -> None:
    (weight,) = set(weights_of(trained(Unrolled())))
    hyper = trained(Unrolled(truncation=4, memory=2 * weight))
    assert len(graphs_of(hyper)) == 2
    assert min(graphs_of(hyper)) >= NUM_STEPS - 4
    assert_all_close(hyper.hypergradient(VAL), trained(Unrolled(truncation=4, memory=0)).hypergradient(VAL))


def test_none_are_made_where_most_would_be_for_nothing() -> None:
    """In windows of more than twice the truncation, once one of them was seen."""
    hyper, counts = trained(Unrolled(truncation=3), batches=[]), []
    for number in (8, 8, 6, 6):
        for batch in batches(100, number):
            hyper.step(batch)
        counts.append(sorted(graphs_of(hyper)))
        hyper.hyper_step(VAL)
    assert counts == [[5], [], [], [25, 26, 27]]


def test_a_window_that_has_ended_gives_room() -> None:
    hyper = trained(HALF)
    kept = len(graphs_of(hyper))
    assert 0 < kept < NUM_STEPS
    hyper.hyper_step(VAL)
    assert not graphs_of(hyper)
    for batch in batches(100):
        hyper.step(batch)
    assert len(graphs_of(hyper)) == kept


@pytest.mark.parametrize(
    "method",
    [
        Unrolled(max_snapshots=3),
        Unrolled(offload="cpu"),
        Unrolled(second_order="forward"),
        Unrolled(second_order="finite_difference"),
    ],
    ids=str,
)
def test_none_are_kept_where_memory_is_to_be_saved(method: Unrolled) -> None:
    assert not hasattr(trained(method)._window._history, "_shelf")  # type: ignore[attr-defined]


def test_snapshots_and_a_budget() -> None:
    hyper = trained(Unrolled(max_snapshots=3, memory=20_000))
    assert 0 < len(graphs_of(hyper)) < NUM_STEPS
    assert_all_close(hyper.hypergradient(VAL), trained(REPLAY).hypergradient(VAL))


@pytest.mark.parametrize("method", [Unrolled(), REPLAY], ids=["graphs", "replay"])
@pytest.mark.parametrize("setting", ["weight_decay", "momentum", "lr"])
def test_a_checkpoint_in_the_middle_of_a_window(method: Unrolled, setting: str, tmp_path: Path) -> None:
    """It holds what the derivatives read, and nothing in the place of what they do not."""
    tune = Hyperparameter(setting)
    hyper, other = (
        trained(method, light, batches(8), tune=tune),
        trained(method, light, batches(8, 1), tune=tune),
    )
    torch.save(hyper.state_dict(), tmp_path / "saved.pt")
    other.load_state_dict(torch.load(tmp_path / "saved.pt", weights_only=True))
    for each in (hyper, other):
        each.step(random_batch(8, 4, 50))
    assert_all_close(other.hypergradient(VAL), hyper.hypergradient(VAL))
    assert_all_close(other.model.state_dict(), hyper.model.state_dict(), rtol=0)


# ---- how they are weighed ----------------------------------------------------------------------------------


def test_what_a_graph_weighs() -> None:
    x, other = torch.randn(1000, requires_grad=True), torch.randn(500)
    with weighing([x, other]) as weigh:
        y = x.exp()  # which keeps its output
        z = (x[:500] * other).sin()  # which keeps its input; others are known
        assert weigh() == 4000 + 2000
        del z
    assert weigh() == 4000
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], x.exp())


def test_batches_of_many_shapes_and_losses_of_many_kinds() -> None:
    """Each weighs something else, and none is kept that was not weighed."""

    def penalized(model: nn.Module, batch: Any) -> Tensor:
        loss = mse(model, batch)
        return loss + sum(p.square().sum() for p in model.parameters()) if len(batch[0]) % 2 else loss

    several = [random_batch(20 + seed, 4, seed) for seed in range(NUM_STEPS)]
    hyper = trained(Unrolled(), batches=several, loss=penalized)
    assert len(set(weights_of(hyper))) == len(graphs_of(hyper)) == NUM_STEPS
    expected = trained(REPLAY, batches=several, loss=penalized).hypergradient(VAL)
    assert_all_close(hyper.hypergradient(VAL), expected)


def test_a_new_kind_of_step_after_many_of_one() -> None:
    """It cannot be weighed any more, and is replayed; the next one of its kind is weighed."""
    several = [*batches(20, 4), random_batch(50, 4, 7), random_batch(50, 4, 8), random_batch(50, 4, 9)]
    hyper = trained(Unrolled(), batches=several)
    assert sorted(graphs_of(hyper)) == [0, 1, 2, 3, 5, 6]
    assert_all_close(hyper.hypergradient(VAL), trained(REPLAY, batches=several).hypergradient(VAL))


def test_a_loss_that_goes_with_no_hooks_is_replayed() -> None:
    calls = 0

    def with_functional_gradient(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        noise = 0.1 * torch.randn((), dtype=torch.float64)  # the same if the step has to be taken again
        output = model(batch[0])
        curved = torch.func.grad(lambda scale: torch.tanh(scale * output).sum())(noise)
        return (output - batch[1]).square().mean() + curved.square()

    make = partial(build, "batch_norm")
    hyper = trained(Unrolled(), make, batches(8), loss=with_functional_gradient)
    assert calls == NUM_STEPS + 1
    replayed = trained(REPLAY, make, batches(8), loss=with_functional_gradient)
    for ours, theirs in zip(hyper.model.state_dict().values(), replayed.model.state_dict().values()):
        assert torch.equal(ours, theirs)
    assert_all_close(hyper.hypergradient(VAL), replayed.hypergradient(VAL))


@pytest.mark.parametrize("in_place", [lambda h: h.exp().mul_(2), lambda h: (h * h, h.add_(1))[0]])
def test_writing_to_what_the_graph_needs_is_refused_at_once(in_place: Any) -> None:
    """Of tensors that are saved through hooks torch does not look at the versions."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return in_place(model(batch[0]) * 1.0).square().mean()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        trained(Unrolled(), loss=loss)


def test_a_graph_of_ones_own_does_not_outlive_a_step() -> None:
    """As with plain torch: the weights that it was made with are gone."""
    hyper = trained(Unrolled())
    mine = mse(hyper.model, VAL)
    hyper.step(batches(100)[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        mine.backward()


# ---- what a step leaves ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # gc finds objects whose mere inspection warns
@pytest.mark.parametrize(
    ("optimizer", "setting", "num_vectors"),
    [
        (SGD, "weight_decay", 1),  # the parameters alone
        (SGD, "lr", 3),  # gradient and momentum besides
        (ADAM, "weight_decay", 4),  # gradient and both moments
    ],
)
def test_vectors_that_are_held_with_a_graph(optimizer: Any, setting: str, num_vectors: int) -> None:
    grown = []
    for number in (5, 25):
        given = batches(1, number)
        before = live_bytes()
        hyper = trained(Unrolled(), light, given, optimizer=optimizer, tune=Hyperparameter(setting))
        grown.append(live_bytes() - before)
        assert len(graphs_of(hyper)) == number
        del hyper
    vector = sum(p.numel() for p in light().parameters()) * 8
    assert (grown[1] - grown[0]) / 20 == pytest.approx(num_vectors * vector, rel=0.2)


class OwnSGD(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 0.05, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})


def register(pull: Any, pull_reads: Any) -> None:
    @register_update(OwnSGD, {"lr": (0, 1), "weight_decay": (0, 1)}, pull=pull, pull_reads=pull_reads)
    def own_sgd(param: Tensor, grad: Tensor, state: Any, settings: Any) -> tuple[Tensor, Any]:
        return param - settings["lr"] * (grad + settings["weight_decay"] * param), state


def pull_own(
    param: Tensor, grad: Tensor, state: Any, settings: Any, adj_param: Tensor, adj_state: Any
) -> Pulled:
    adj_grad = -settings["lr"] * adj_param
    direction = grad + settings["weight_decay"] * param
    adjoints = {"lr": -(adj_param * direction).sum(), "weight_decay": (adj_grad * param).sum()}
    return Pulled(adj_param + settings["weight_decay"] * adj_grad, adj_grad, {}, adjoints)


@pytest.mark.parametrize("method", [Unrolled(), REPLAY], ids=["graphs", "replay"])
def test_a_rule_of_ones_own_that_says_what_its_pull_reads(method: Unrolled) -> None:
    answers = {}
    for setting in ("lr", "weight_decay"):
        for reads in (None, lambda settings: ("grad",) if isinstance(settings["lr"], Tensor) else ()):
            register(pull_own, reads)
            hyper = trained(method, optimizer=OwnSGD, tune=Hyperparameter(setting))
            answers[setting, reads is None] = hyper.hypergradient(VAL)
        assert_all_close(answers[setting, False], answers[setting, True])


@pytest.mark.parametrize("method", [Unrolled(), REPLAY], ids=["graphs", "replay"])
def test_a_rule_that_leaves_out_what_its_pull_reads_is_refused(method: Unrolled) -> None:
    register(pull_own, lambda settings: ())
    with pytest.raises(NonFiniteError):
        trained(method, optimizer=OwnSGD, tune=Hyperparameter("lr")).hypergradient(VAL)
    register(lambda *args: None, lambda settings: ())
    with pytest.raises(ValueError, match=r"pull_reads.*training step 8.*pull gave None.*for settings that"):
        trained(method, optimizer=OwnSGD, tune=Hyperparameter("lr")).hypergradient(VAL)
