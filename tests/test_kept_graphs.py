"""``Unrolled(max_graphs=N)`` never changes the answer, keeps at most N graphs, and leaves parameters where
they are. Here too are counts that guard what a step costs."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from problems import FROZEN, REPLAY, GradientDescent, mse, random_batch, tanh_mlp
from test_modules import ADAM, SGD, build
from torch_hypergrad import HyperOptimizer, Hyperparameter, TrajectoryError, Unrolled
from torch_hypergrad.ground.buckets import Bucket
from torch_hypergrad.step import live_model
from torch_hypergrad.step.reverse import Reverse
from torch_hypergrad.testing import check_hypergradient

NUM_STEPS = 6
BATCHES = [random_batch(8, 4, seed) for seed in range(NUM_STEPS)]
VAL = random_batch(8, 4, seed=100)
COUNTS = [1, 3, NUM_STEPS, 50]
DECAY = Hyperparameter("weight_decay", per="tensor", init=0.01)
every_count = pytest.mark.parametrize("max_graphs", COUNTS)


def made(
    max_graphs: int | None,
    make: Callable[[], nn.Module] = tanh_mlp,
    tune: Any = None,
    optimizer: Any = SGD,
    **options: Any,
) -> HyperOptimizer:
    torch.manual_seed(0)
    model = make()
    replays = {"memory": 0} if max_graphs is None else {}
    method = Unrolled(max_graphs=max_graphs, **replays, **options.pop("method", {}))
    loss, hyper = options.pop("train_loss", mse), options.pop("hyper_optimizer", FROZEN)
    return HyperOptimizer(
        model, optimizer(model.parameters()), loss, tune or [DECAY], method, hyper, val_loss=mse, **options
    )


def train(hyper: HyperOptimizer, batches: Any = BATCHES) -> HyperOptimizer:
    torch.manual_seed(1)
    for batch in batches:
        hyper.step(batch)
    return hyper


def assert_all_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=1e-14)


def graphs_of(hyper: HyperOptimizer) -> dict[int, Any]:
    """Those that are kept now, by the numbers of their steps."""
    return hyper._window._history._shelf.graphs  # type: ignore[attr-defined]


# ---- the answer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truncation", [None, 4])
@every_count
def test_gradient_descent_on_a_quadratic(max_graphs: int, truncation: int | None) -> None:
    problem = GradientDescent.make()
    tune = [Hyperparameter("lr", init=0.05), Hyperparameter("weight_decay", init=0.2)]
    hyper = made(
        max_graphs, problem.model, tune, partial(torch.optim.SGD, lr=0.05), train_loss=problem.train_loss,
        method={"truncation": truncation},
    )  # fmt: skip
    hyper._problem.objective.loss = problem.val_loss
    start = problem.start
    for t in range(NUM_STEPS):
        if truncation is not None and t == NUM_STEPS - truncation:
            start = hyper.model.w.detach().clone()
        hyper.step(None)
    from_there = GradientDescent(problem.hessian, problem.c, start, problem.target)
    expected = from_there.hypergradient(0.05, 0.2, truncation or NUM_STEPS)
    for _ in range(2):  # the second time the steps are replayed
        assert [g.item() for g in hyper.hypergradient(None).values()] == pytest.approx(
            list(expected), rel=1e-12
        )


KINDS = ["batch_norm", "dropout", "lstm", "tied", "frozen", "sometimes", "convolution", "rebinding"]


@pytest.mark.parametrize("kind", KINDS)
def test_modules_against_finite_differences(kind: str) -> None:
    optimizer = ADAM if kind in ("dropout", "sometimes") else SGD
    tune = [Hyperparameter("lr"), Hyperparameter("weight_decay", init=0.01)]
    entries = check_hypergradient(lambda: made(3, lambda: build(kind), tune, optimizer), BATCHES, VAL)
    assert any(abs(entry.computed) > 1e-6 for entry in entries)


class Counting(nn.Module):
    """A buffer that is written to in place and is part of the graph: autograd saves it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.register_buffer("count", torch.ones(()))
        self.count_too: Any
        self.register_buffer("count_too", self.count)  # the same tensor under two names

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(0.1)
        return torch.tanh(self.linear(x)) * self.count_too


def normalized() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)).double()


def twin() -> nn.Module:
    model = Counting()
    model.linear.double()
    with torch.no_grad():
        model.count = model.count_too = torch.ones((), dtype=torch.float64)
    return model


def switching(hyper: HyperOptimizer, t: int) -> None:
    """BatchNorm in eval mode, whose graph holds its statistics, then in train mode,
    which writes them, and back."""
    hyper.model.train(t in (2, 3))


def validating(hyper: HyperOptimizer, t: int) -> None:
    hyper.model.eval()
    hyper.validation_loss(VAL)
    if t % 2:
        hyper.hypergradient(VAL)


def with_graphs_of_its_own(hyper: HyperOptimizer, t: int) -> None:
    """A loss that the user keeps and goes back through later, as they may with plain torch before a step."""
    mse(hyper.model, VAL).backward()
    hyper.optimizer.zero_grad()


@pytest.mark.parametrize("between", [switching, validating, with_graphs_of_its_own], ids=lambda f: f.__name__)
@pytest.mark.parametrize("make", [normalized, twin], ids=lambda f: f.__name__)
@every_count
def test_what_happens_between_steps(max_graphs: int, make: Any, between: Any) -> None:
    """Without graphs every step is replayed with the buffers restored, which ``test_modules.py`` holds
    to finite differences."""
    kept, replayed = made(max_graphs, make), made(None, make)
    for hyper in (kept, replayed):
        buffers = list(hyper.model.buffers())
        for t, batch in enumerate(BATCHES):
            between(hyper, t)
            hyper.step(batch)
        assert all(a is b for a, b in zip(hyper.model.buffers(), buffers))
    for ours, theirs in zip(kept.model.state_dict().values(), replayed.model.state_dict().values()):
        assert torch.equal(ours, theirs)
    assert_all_close(kept.hypergradient(VAL), replayed.hypergradient(VAL))


@pytest.mark.parametrize(
    "method",
    [{"truncation": 2}, {"truncation": 4}, {"max_snapshots": 2}, {"truncation": 3, "max_snapshots": 2}],
)
@every_count
def test_with_truncation_and_snapshots(max_graphs: int, method: Any) -> None:
    make = partial(build, "sometimes")
    kept, replayed = (train(made(n, make, optimizer=ADAM, method=method)) for n in (max_graphs, None))
    assert_all_close(kept.hypergradient(VAL), replayed.hypergradient(VAL))


def test_graphs_that_do_not_count_are_not_kept() -> None:
    hyper = train(made(50, method={"truncation": 2}))
    assert len(graphs_of(hyper)) == 2


# ---- training ----------------------------------------------------------------------------------------------


def plain(make: Callable[[], nn.Module], optimizer: Any) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    made_optimizer = optimizer(model.parameters())
    torch.manual_seed(1)
    for batch in BATCHES:
        made_optimizer.zero_grad()
        mse(model, batch).backward()
        made_optimizer.step()
    return model


OPTIMIZERS = {
    "SGD": SGD,
    "Adam": ADAM,
    "AdamW": partial(torch.optim.AdamW, lr=0.02, eps=1e-3),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.02, momentum=0.5, centered=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["dropout", "batch_norm", "sometimes"])
def test_trajectory_is_that_of_the_plain_loop(kind: str, name: str) -> None:
    """Bitwise with settings that are not tuned, to 1e-12 with those that are."""
    make, optimizer = partial(build, kind), OPTIMIZERS[name]
    theirs = plain(make, optimizer).state_dict()
    unread = torch.zeros((), dtype=torch.float64, requires_grad=True)
    ours = train(made(3, make, [unread], optimizer)).model.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    tuned = train(
        made(3, make, [Hyperparameter("lr"), Hyperparameter("weight_decay", per="element")], optimizer)
    )
    assert_all_close(tuned.model.state_dict(), theirs)


def test_parameters_stay_the_same_objects_in_the_same_memory() -> None:
    hyper = made(3, normalized, hyper_optimizer=partial(torch.optim.SGD, lr=1e-3))
    held = [*hyper.model.parameters(), *hyper.model.buffers()]
    places = [t.data_ptr() for t in held]

    def check() -> None:
        now = [*hyper.model.parameters(), *hyper.model.buffers()]
        assert all(a is b for a, b in zip(now, held))
        assert [t.data_ptr() for t in now] == places

    for t in range(2 * NUM_STEPS):
        hyper.step(BATCHES[t % NUM_STEPS])
        check()
        if t % 3 == 0:
            hyper.validation_loss(VAL)
            hyper.hypergradient(VAL)
            check()
        if t == NUM_STEPS:
            hyper.hyper_step(VAL)
            check()


def test_windows_saving_and_restart() -> None:
    """Hypergradients in the middle, a checkpoint in the middle,
    hyper steps and a restart: as without graphs."""
    stories = []
    for max_graphs in (4, None):
        hyper = made(
            max_graphs, normalized, optimizer=ADAM, hyper_optimizer=partial(torch.optim.SGD, lr=1e-2)
        )
        story = []
        train(hyper, BATCHES[:3])
        story += [hyper.hypergradient(VAL), hyper.hypergradient(VAL)]
        train(hyper, BATCHES[3:])
        saved = copy.deepcopy(hyper.state_dict())
        story.append(hyper.hypergradient(VAL))
        train(hyper, BATCHES[:2])
        hyper.load_state_dict(saved)
        train(hyper, BATCHES[:1])
        story.append(hyper.hypergradient(VAL))
        hyper.hyper_step(VAL)
        train(hyper, BATCHES[:2])
        story.append(hyper.hypergradient(VAL))
        hyper.restart()
        train(hyper)
        story += [hyper.hypergradient(VAL), {k: v.double() for k, v in hyper.model.state_dict().items()}]
        stories.append(story)
    for ours, theirs in zip(*stories):
        assert_all_close(ours, theirs, rtol=1e-11)


# ---- what is refused, and what an error leaves behind ------------------------------------------------------


def write_in_place(hyper: HyperOptimizer) -> None:
    with torch.no_grad():
        hyper.model[0].weight.mul_(1.01)


def write_through_data(hyper: HyperOptimizer) -> None:
    hyper.model[0].weight.data.mul_(1.01)


def replace_memory(hyper: HyperOptimizer) -> None:
    hyper.model[0].weight.data = hyper.model[0].weight.data * 1.01


@pytest.mark.parametrize(
    "write", [write_in_place, write_through_data, replace_memory], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("at_the_end", [False, True])
def test_writing_in_the_middle_is_refused(write: Any, at_the_end: bool) -> None:
    hyper = train(made(2), BATCHES[:3])
    write(hyper)
    with pytest.raises(TrajectoryError, match="wrote to"):
        hyper.hypergradient(VAL) if at_the_end else hyper.step(BATCHES[3])
    hyper.restart()
    train(hyper)
    assert_all_close(hyper.hypergradient(VAL), train(made(2)).hypergradient(VAL))


def test_a_batch_that_was_changed_is_refused() -> None:
    hyper, (x, y) = made(3), (BATCHES[0][0].clone(), BATCHES[0][1])
    hyper.step((x, y))
    x.mul_(2)
    hyper.step((x.clone(), y))
    with pytest.raises(TrajectoryError, match="training step 1 was changed in place"):
        hyper.hypergradient(VAL)


@pytest.mark.parametrize("max_graphs", [2, None])
def test_an_error_in_the_loss_leaves_everything_in_place(max_graphs: int | None) -> None:
    fails = False

    def train_loss(model: nn.Module, batch: Any) -> Tensor:
        loss = mse(model, batch)
        if fails:
            raise KeyError("from the loss")
        return loss

    hyper = train(made(max_graphs, normalized, train_loss=train_loss), BATCHES[:3])
    state = copy.deepcopy(hyper.model.state_dict())
    held = [(t, t.data_ptr()) for t in (*hyper.model.parameters(), *hyper.model.buffers())]
    fails = True
    with pytest.raises(KeyError, match="from the loss"):
        hyper.step(BATCHES[3])
    if max_graphs is None:
        with pytest.raises(KeyError, match="from the loss"):
            hyper.hypergradient(VAL)
    now = [*hyper.model.parameters(), *hyper.model.buffers()]
    assert all(t is old and t.data_ptr() == place for t, (old, place) in zip(now, held))
    assert all(torch.equal(value, state[name]) for name, value in hyper.model.state_dict().items())
    fails = False
    for batch in BATCHES[3:]:
        hyper.step(batch)
    assert_all_close(hyper.hypergradient(VAL), train(made(None, normalized)).hypergradient(VAL))


@pytest.mark.parametrize("max_graphs", [2, None])
def test_an_error_while_parameters_are_pointed_elsewhere(
    max_graphs: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when memory runs out after the first parameter."""
    hyper = train(made(max_graphs), BATCHES[:3])
    places = [p.data_ptr() for p in hyper.model.parameters()]
    calls = 0

    def failing(piece: Tensor, param: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError("from the test")
        return piece

    with monkeypatch.context() as patch:
        patch.setattr(live_model, "laid_out_as", failing)
        with pytest.raises(MemoryError, match="from the test"):
            hyper.hypergradient(VAL)
    assert [p.data_ptr() for p in hyper.model.parameters()] == places
    for batch in BATCHES[3:]:
        hyper.step(batch)
    assert_all_close(hyper.hypergradient(VAL), train(made(None)).hypergradient(VAL))


def clamped(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        model[0].weight.clamp_(-0.3, 0.3)
    return mse(model, batch)


def renormalized(model: nn.Module, batch: Any) -> Tensor:
    model[0].weight.data = torch.renorm(model[0].weight.data, 2, 0, 0.3)
    return mse(model, batch)


def bounded_embedding() -> nn.Module:
    embedding = nn.Embedding(3, 4, max_norm=0.5).double()
    return nn.Sequential(embedding, nn.Tanh(), nn.Linear(4, 1).double())


@pytest.mark.parametrize("max_graphs", [2, None])
def test_a_loss_that_writes_to_parameters_is_refused(max_graphs: int | None) -> None:
    """The update rule starts from the weights before the loss, so that training would not be torch's."""
    for loss in (clamped, renormalized):
        with pytest.raises(ValueError, match=r"train_loss wrote to the parameter '0\.weight'"):
            train(made(max_graphs, train_loss=loss))
    with pytest.raises(ValueError, match=r"train_loss wrote to the parameter '0.weight'.*max_norm"):
        made(max_graphs, bounded_embedding).step(
            (torch.tensor([0, 1, 2]), torch.zeros(3, 1, dtype=torch.float64))
        )


@pytest.mark.parametrize("max_graphs", [2, None])
def test_checkpoints_that_hide_parameters_are_refused(max_graphs: int | None) -> None:
    """And those that do not work."""

    def train_loss(model: nn.Module, batch: Any, reentrant: bool) -> Tensor:
        x = batch[0].clone().requires_grad_()
        hidden = checkpoint(model[0], x, use_reentrant=reentrant)
        return (model[2](model[1](hidden)) - batch[1]).square().mean()

    with pytest.raises(ValueError, match="use_reentrant=False"):
        train(made(max_graphs, train_loss=partial(train_loss, reentrant=True)))
    hyper = train(made(max_graphs, train_loss=partial(train_loss, reentrant=False)))
    assert_all_close(hyper.hypergradient(VAL), train(made(None)).hypergradient(VAL))


def test_moving_a_parameter_without_changing_it_is_allowed() -> None:
    """As recurrent layers do with cuDNN when they put their weights into one piece of memory."""

    def train_loss(model: nn.Module, batch: Any) -> Tensor:
        model[0].weight.data = model[0].weight.data.clone()
        return mse(model, batch)

    expected = train(made(None)).hypergradient(VAL)
    for max_graphs in (None, 3):
        assert_all_close(train(made(max_graphs, train_loss=train_loss)).hypergradient(VAL), expected)


# ---- memory ------------------------------------------------------------------------------------------------


@contextmanager
def live_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Counts the gradients whose graphs somebody still holds."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    original = Reverse.__init__

    def counted(traced: Reverse, *args: Any, **kwargs: Any) -> None:
        original(traced, *args, **kwargs)
        alive.add(traced)

    monkeypatch.setattr(Reverse, "__init__", counted)

    yield lambda: len(alive)


@pytest.mark.parametrize(("max_graphs", "most"), [(1, 1), (3, 3), (50, NUM_STEPS), (None, 0)])
def test_the_number_of_live_graphs_is_bounded(
    max_graphs: int | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with live_graphs(monkeypatch) as count:
        hyper = made(max_graphs)
        for t, batch in enumerate(BATCHES):
            hyper.step(batch)
            assert count() == min(t + 1, most)
        hyper.hypergradient(VAL)
        assert count() == 0
        train(hyper, BATCHES[:2])
        hyper.restart()
        assert count() == 0


def test_graphs_of_old_steps_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd saves is freed with the step, also what it saved
    of buffers and of views of parameters."""
    saved: list[weakref.ref[Any]] = []

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def pack(tensor: Tensor) -> Held:
        held = Held(tensor.detach())  # a tensor with its graph would hold itself
        saved.append(weakref.ref(held))
        return held

    hyper = made(2, normalized)
    counts = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        for t in range(8):
            hyper.step(BATCHES[t % NUM_STEPS])
            counts.append(sum(ref() is not None for ref in saved))
    assert counts[0] > 0
    assert len(set(counts[2:])) == 1


# ---- how much is done --------------------------------------------------------------------------------------

WIDTH = 1009  # a prime, so that nothing else has the length of the vector of all weights


class LongOperations(TorchDispatchMode):
    """Counts operations that compute or copy a tensor as long as all parameters together; views are free."""

    FREE = (
        "view",
        "split",
        "detach",
        "empty",
        "alias",
        "slice",
        "expand",
        "as_strided",
        "unsqueeze",
        "narrow",
        "select",
    )

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.names = length, []  # type: ignore[var-annotated]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        tensors = [t for t in (*tree_leaves(out), *tree_leaves(args)) if isinstance(t, Tensor)]
        if not name.startswith(self.FREE) and any(t.numel() == self.length for t in tensors):
            self.names.append(name)
        return out


def long_model() -> nn.Module:
    """Two parameters, neither of which is as long as both."""
    return nn.Sequential(nn.Linear(WIDTH, 1)).double()


def long_hyper(method: Unrolled) -> HyperOptimizer:
    torch.manual_seed(0)
    model = long_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return HyperOptimizer(model, optimizer, mse, [Hyperparameter("weight_decay", init=0.01)], method, FROZEN)


LONG = [random_batch(2, WIDTH, seed) for seed in range(8)]
every_method = pytest.mark.parametrize("method", [REPLAY, Unrolled()], ids=["replay", "graphs"])


@every_method
def test_passes_over_memory_of_a_recorded_step(method: Unrolled) -> None:
    """The gradient put together; decay, momentum, the step itself."""
    hyper = long_hyper(method)
    train(hyper, LONG[:2])
    with LongOperations(WIDTH + 1) as counted:
        hyper.step(LONG[2])
    assert len(counted.names) <= 4, counted.names
    assert "clone" not in counted.names


@every_method
def test_passes_over_memory_of_a_step_of_the_sweep(method: Unrolled) -> None:
    """One step more in the window is one more in the sweep: four operations back through the rule, which
    reads no gradient, and the adjoint's norm; what is added to the adjoint parameter by parameter does not
    show here."""
    counts = []
    for num_steps in (4, 5):
        hyper = long_hyper(method)
        train(hyper, LONG[:num_steps])
        with LongOperations(WIDTH + 1) as counted:
            hyper.hypergradient(LONG[7])
        counts.append(counted.names)
    assert len(counts[1]) - len(counts[0]) <= 5, counts[1]


@every_method
def test_a_recorded_step_copies_no_parameters_that_nobody_has_touched(
    method: Unrolled, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[Bucket] = []
    original = Bucket.gather

    def gather(bucket: Bucket, tensors: Any) -> Tensor:
        gathered.append(bucket)
        return original(bucket, tensors)

    hyper = long_hyper(method)
    params = list(hyper.model.parameters())
    hyper.step(LONG[0])
    state = hyper._problem.live.state()
    again = hyper._problem.live.state()
    assert all(a is b for a, b in zip(state.params, again.params))
    monkeypatch.setattr(Bucket, "gather", gather)
    hyper.step(LONG[1])
    assert len(gathered) == 1  # the gradients
    hyper.begin_window()
    with torch.no_grad():
        params[0].mul_(1.5)
    written = params[0].detach().clone()
    hyper.step(LONG[2])
    assert len(gathered) == 3  # parameters and gradients
    history = hyper._window._history  # type: ignore[attr-defined]
    ((_, state, _),) = (history if method == REPLAY else history._snapshots).visits()
    assert torch.equal(state.params[0][:WIDTH], written[0])
