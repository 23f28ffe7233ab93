"""Recorded training gradients. On a CPU a stand-in records: it does the work again into the same memory,
as a CUDA graph does, spoils that memory in between, and is blind to whatever Python has changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import torch_hypergrad.hyper_optimizer
from problems import FROZEN, mse, random_batch
from torch_hypergrad import ForwardMode, HyperOptimizer, Hyperparameter, Implicit, Neumann, Unrolled
from torch_hypergrad.device.capture import MAX_RECORDINGS, NUM_WARM_UPS, Captured

BATCHES = [random_batch(8, 4, seed) for seed in range(9)]
VAL = random_batch(8, 4, seed=100)
CPU = torch.device("cpu")


class StandIn:
    """Records by remembering the function. The recording itself leaves all memory
    and random numbers as they were."""

    device = CPU

    def __init__(self, memory: Callable[[], Any] = lambda: ()) -> None:
        self.memory, self.recordings, self.replays, self.warm_ups = memory, 0, 0, 0
        self.broken: str | None = None
        self.objection: str | None = None

    def warm_up(self, function: Callable[[], Any]) -> tuple[Any, str | None]:
        self.warm_ups += 1
        return function(), self.objection

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        if self.broken:
            raise RuntimeError(self.broken)
        self.recordings += 1
        before, rng = [t.detach().clone() for t in self.memory()], torch.get_rng_state()
        found = function()
        outputs = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        with torch.no_grad():
            for tensor, value in zip(self.memory(), before):
                tensor.data.copy_(value)
        torch.set_rng_state(rng)
        spoil(outputs)

        def replay() -> None:
            self.replays += 1
            again = [leaf for leaf in tree_leaves(function()) if isinstance(leaf, Tensor)]
            for output, value in zip(outputs, again):
                output.data.copy_(value)

        return found, replay


def spoil(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.data.fill_(float("nan"))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(torch_hypergrad.hyper_optimizer, "recorder_for", lambda tensors: stand_in)
    return stand_in


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 1)
    ).double()


ADAM = partial(torch.optim.AdamW, lr=0.01, eps=1e-3)
WEIGHT_DECAY = Hyperparameter("weight_decay", per="element", init=0.1)


def made(
    method: Any, recorder: StandIn | None, loss: Any = mse, model: Any = None, **options: Any
) -> HyperOptimizer:
    """With a recorder: captured."""
    model = network() if model is None else model
    tune = options.pop("tune", [WEIGHT_DECAY])
    hyper_optimizer = partial(torch.optim.SGD, lr=1e-2)
    hyper = HyperOptimizer(
        model,
        ADAM(model.parameters()),
        loss,
        tune,
        method,
        hyper_optimizer,
        capture=recorder is not None,
        **options,
    )
    if recorder is not None:
        recorder.memory = lambda: list(hyper._problem.live.model.memory())
    return hyper


def run(hyper: HyperOptimizer, batches: Any, between: Callable[[int], None] = lambda t: None) -> list[float]:
    """Losses of two windows, with a hyper step after each."""
    torch.manual_seed(1)
    found = []
    for _ in range(2):
        for t, batch in enumerate(batches):
            between(t)
            found.append(hyper.step(batch).item())
        found.append(hyper.hyper_step(VAL).hypergradient_norm)
    return found


def check_equal(hyper: HyperOptimizer, eager: HyperOptimizer) -> None:
    for ours, theirs in zip(hyper.model.state_dict().values(), eager.model.state_dict().values()):
        assert torch.equal(ours, theirs)
    for name, value in eager.values().items():
        assert torch.equal(hyper.values()[name], value)


METHODS = [
    Unrolled(),
    Unrolled(max_snapshots=2),
    Unrolled(second_order="finite_difference"),
    Implicit(Neumann(3, scale=0.01, damping=50.0)),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_captured_training_is_eager_training(method: Any, recorder: StandIn) -> None:
    """Buffers, dropout, and tuned values that move between the windows."""
    hyper, eager = made(method, recorder), made(method, None)
    assert run(hyper, BATCHES) == run(eager, BATCHES)
    check_equal(hyper, eager)
    functions = 2 if method in METHODS[:2] else 1  # with products of second derivatives
    without_product = 2 if method in METHODS[:2] else 0  # the first step of each window
    # Each takes the gradient once more, and solves for the first time.
    hyper_steps = 2 if isinstance(method, Implicit) else 0
    assert (recorder.warm_ups, recorder.recordings) == (functions * NUM_WARM_UPS + hyper_steps, functions)
    steps = functions * (2 * len(BATCHES) - NUM_WARM_UPS) - without_product
    assert recorder.replays == steps + hyper_steps


def test_the_last_batch_may_be_smaller(recorder: StandIn) -> None:
    batches = [*BATCHES[:5], tuple(part[:3] for part in BATCHES[5])] * 2
    hyper, eager = made(Unrolled(), recorder), made(Unrolled(), None)
    assert run(hyper, batches) == run(eager, batches)
    check_equal(hyper, eager)
    assert recorder.recordings == 2 * 2  # gradient and product, two shapes


def test_modes_and_frozen_parameters_may_change(recorder: StandIn) -> None:
    def change(hyper: HyperOptimizer, t: int) -> None:
        hyper.model.train(t < 5)
        hyper.model[0].weight.requires_grad_(t != 7)  # type: ignore[operator, union-attr]

    hyper, eager = made(Unrolled(), recorder), made(Unrolled(), None)
    batches = BATCHES * 3
    assert run(hyper, batches, partial(change, hyper)) == run(eager, batches, partial(change, eager))
    check_equal(hyper, eager)
    assert recorder.recordings >= 2


def test_batches_are_any_tree_and_numbers_in_them_count(recorder: StandIn) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return batch["scale"] * mse(model, batch["pair"])

    batches = [{"pair": list(BATCHES[t % 9]), "scale": 1.0 + t % 2} for t in range(14)]
    hyper, eager = made(Unrolled(), recorder, loss, val_loss=mse), made(Unrolled(), None, loss, val_loss=mse)
    assert run(hyper, batches) == run(eager, batches)
    assert recorder.recordings == 2 * 2


def test_tuned_tensors_in_the_loss_are_read_at_each_replay(recorder: StandIn) -> None:
    def tuned(recorder: StandIn | None) -> HyperOptimizer:
        scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        loss = lambda model, batch: scale.exp() * mse(model, batch)  # noqa: E731
        return made(Unrolled(), recorder, loss, tune=[("scale", scale)], val_loss=mse)

    hyper, eager = tuned(recorder), tuned(None)
    assert run(hyper, BATCHES) == run(eager, BATCHES)
    check_equal(hyper, eager)
    assert recorder.recordings == 2


def test_losses_that_were_returned_stay_as_they_are(recorder: StandIn) -> None:
    hyper = made(Unrolled(), recorder)
    losses = [hyper.step(batch) for batch in BATCHES]
    before = [loss.item() for loss in losses]
    hyper.step(BATCHES[0])
    assert [loss.item() for loss in losses] == before


def test_parameters_with_other_memory_are_recorded_anew(recorder: StandIn) -> None:
    def move(hyper: HyperOptimizer, t: int) -> None:
        if t == 0:
            weight = hyper.model[0].weight  # type: ignore[union-attr]
            weight.data = weight.data.clone()

    hyper, eager = (
        made(Implicit(Neumann(3, scale=0.01, damping=50.0)), recorder),
        made(Implicit(Neumann(3, scale=0.01, damping=50.0)), None),
    )
    assert run(hyper, BATCHES, partial(move, hyper)) == run(eager, BATCHES, partial(move, eager))
    assert recorder.recordings == 2


# ---- what cannot be recorded -------------------------------------------------------------------------------


def test_a_recording_that_fails_is_reported_once_and_training_goes_on(recorder: StandIn) -> None:
    hyper, eager = made(Unrolled(), recorder), made(Unrolled(), None)
    recorder.broken = "operation not permitted when stream is capturing"
    with pytest.warns(UserWarning, match="not permitted when stream is capturing") as caught:
        found = run(hyper, BATCHES)
    assert ["product" in str(warning.message) for warning in caught] == [False, True]
    assert found == run(eager, BATCHES)
    check_equal(hyper, eager)


def test_what_waits_is_never_recorded(recorder: StandIn) -> None:
    hyper, eager = made(Unrolled(), recorder), made(Unrolled(), None)
    recorder.objection = "it waits for the device, in loss.py, line 3"
    with pytest.warns(UserWarning, match="in loss.py, line 3"):
        found = run(hyper, BATCHES)
    assert found == run(eager, BATCHES)
    assert (recorder.warm_ups, recorder.recordings) == (2, 0)


def test_without_a_cuda_device_everything_is_eager() -> None:
    model = network()
    with pytest.warns(UserWarning, match="parameters are on cpu"):
        hyper = HyperOptimizer(
            model, ADAM(model.parameters()), mse, [WEIGHT_DECAY], Unrolled(), FROZEN, capture=True
        )
    hyper.step(BATCHES[0])
    assert hyper.hyper_step(VAL).hypergradient_norm > 0


def test_a_tensor_elsewhere_is_not_recorded(recorder: StandIn) -> None:
    """Its value would become a number of the recording."""
    loss = lambda model, batch: mse(model, batch[:2])  # noqa: E731
    hyper = made(Unrolled(), recorder, loss)
    with pytest.warns(UserWarning, match="on meta, not cpu"):
        hyper.step((*BATCHES[0], torch.zeros(2, device="meta")))
    assert recorder.recordings == 0


def test_too_many_kinds_of_batches(recorder: StandIn) -> None:
    loss = lambda model, batch: batch[2] * mse(model, batch[:2])  # noqa: E731
    hyper, eager = made(Unrolled(), recorder, loss, val_loss=mse), made(Unrolled(), None, loss, val_loss=mse)
    batches = [(*BATCHES[t % 9], 1.0 + t / 10) for t in range(MAX_RECORDINGS + 3)]
    with pytest.warns(UserWarning, match=f"more than {MAX_RECORDINGS} kinds"):
        found = run(hyper, batches)
    assert found == run(eager, batches)


def test_a_batch_of_unknown_things(recorder: StandIn) -> None:
    loss = lambda model, batch: mse(model, batch[:2])  # noqa: E731
    with pytest.warns(UserWarning, match="something else than tensors"):
        made(Unrolled(), recorder, loss).step((*BATCHES[0], {1, 2}))


def test_errors_of_the_training_loss_are_errors(recorder: StandIn) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        made(Unrolled(), recorder, loss, val_loss=mse).step(BATCHES[0])


def test_methods_that_keep_graphs_are_not_recorded(recorder: StandIn) -> None:
    for method in (Unrolled(max_graphs=5), ForwardMode()):
        hyper = made(method, recorder, tune=[Hyperparameter("lr")])
        run(hyper, BATCHES[:5])
    assert recorder.recordings == 0


# ---- the function alone ------------------------------------------------------------------------------------


def test_outputs_are_copies_and_inputs_are_copied() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        doubled = Captured(
            lambda tree: {"twice": 2 * tree["x"], "none": None}, lambda: (), lambda: None, StandIn(), "it"
        )
        kept = [doubled({"x": torch.full((3,), float(t))}) for t in range(8)]
    assert [found["twice"].tolist() for found in kept] == [[2.0 * t] * 3 for t in range(8)]
    assert all(found["none"] is None for found in kept)


def test_inputs_that_require_a_gradient_are_another_kind() -> None:
    stand_in = StandIn()
    captured = Captured(
        lambda x: torch.full((), float(x.requires_grad)), lambda: (), lambda: None, stand_in, "it"
    )
    for t in range(12):
        assert captured(torch.zeros(2, requires_grad=t % 2 == 0)).item() == (t % 2 == 0)
    assert stand_in.recordings == 2
