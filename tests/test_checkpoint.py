"""A run that is saved and loaded goes on bitwise as if it had never stopped, restart() goes back bitwise
to where the HyperOptimizer began, hypergradient() changes nothing, and hyper_step() ends the trajectory."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from torch_hypergrad import (
    ForwardMode,
    HyperOptimizer,
    Hyperparameter,
    Identity,
    Implicit,
    Neumann,
    Solver,
    TrajectoryError,
    Unrolled,
)

METHODS = [
    Unrolled(),
    Unrolled(max_snapshots=2),
    Unrolled(truncation=2),
    Unrolled(truncation=3, max_snapshots=2),
    Unrolled(offload="cpu"),
    Unrolled(truncation=4, max_snapshots=3, offload="cpu"),
    ForwardMode(),
    Implicit(Identity(0.1)),
    Implicit(Neumann(3, scale=0.01, damping=5.0), num_batches=2),
]
OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, lr=1e-2, weight_decay=1e-2),
    "momentum": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, weight_decay=1e-2),
    "nadam": partial(torch.optim.NAdam, lr=1e-2, weight_decay=1e-2),
}
every_method = pytest.mark.parametrize("method", METHODS, ids=str)
some_methods = pytest.mark.parametrize(
    "method", [Unrolled(max_snapshots=2), ForwardMode(), Implicit(Identity(0.1))], ids=str
)
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 3, dtype=torch.float64, generator=generator)
    return {"x": x, "y": torch.randn(6, 1, dtype=torch.float64, generator=generator)}


def network():
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1)
    return nn.Sequential(*layers).double()


class Weighting(nn.Module):
    """Example weights: a tuned module with a running mean, and a count that is not persistent."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1, dtype=torch.float64))
        self.register_buffer("mean", torch.ones((), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64), persistent=False)

    def forward(self, losses):
        self.mean.lerp_(losses.detach().mean(), 0.1)
        self.count.add_(1.0)
        return (self.scale * losses / (self.mean + self.count)).sigmoid()


def val_loss(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean()


def make(method, optimizer="adam", seed=0, model=None, made=None):
    """A HyperOptimizer with a setting, a module and a tensor tuned, all of which begin at random."""
    torch.manual_seed(seed)
    model = network() if model is None else model
    weighting, temperature = Weighting(), torch.randn((), dtype=torch.float64, requires_grad=True)

    def train_loss(model, batch):
        losses = (model(batch["x"]) - batch["y"]).square()
        return (weighting(losses) * losses).mean() * temperature.exp()

    settings = [Hyperparameter("weight_decay", per="group" if isinstance(method, ForwardMode) else "element")]
    if not isinstance(method, Implicit):
        settings.append(Hyperparameter("lr", log=True))
    tune = [*settings, ("weighting", weighting), ("temperature", temperature)]
    made = OPTIMIZERS[optimizer](model.parameters()) if made is None else made
    hyper_optimizer = partial(torch.optim.Adam, lr=1e-2)
    return HyperOptimizer(
        model, made, train_loss, tune, method, hyper_optimizer, val_loss=val_loss
    ), weighting


def frozen_bytes(thing):
    """``thing``, a tree of containers, with every tensor as its bytes."""
    if isinstance(thing, torch.Tensor):
        return str(thing.dtype), tuple(thing.shape), thing.detach().contiguous().numpy().tobytes()
    if isinstance(thing, dict):
        return {key: frozen_bytes(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [frozen_bytes(value) for value in thing]
    return thing


def standing(hyper, weighting):
    """All that a run has come to."""
    return frozen_bytes(
        {
            "weights": dict(hyper.model.named_parameters()),
            "buffers": dict(hyper.model.named_buffers()),
            "tuned module": [*weighting.parameters(), *weighting.buffers()],
            "optimizer": hyper.optimizer.state_dict(),
            "values": hyper.values(),
            "hyper optimizer": hyper.hyper_optimizer.state_dict(),
            "random numbers": torch.get_rng_state(),
        }
    )


def train(hyper, seeds):
    return [hyper.step(batch(seed)) for seed in seeds]


def go_on(hyper, weighting):
    """The rest of a run: the window ends, and another one follows. Dropout masks show in the losses."""
    story = [train(hyper, range(5, 7)), hyper.hypergradient(batch(90)), vars(hyper.hyper_step(batch(90)))]
    story += [standing(hyper, weighting), train(hyper, range(7, 9))]
    story += [vars(hyper.hyper_step(batch(91))), standing(hyper, weighting)]
    return frozen_bytes(story)


def differences(story, other):
    """Where two stories part, for messages that can be read."""
    return [i for i, (a, b) in enumerate(zip(story, other)) if a != b]


def saved_and_loaded(checkpoint, path):
    torch.save(checkpoint, path)
    return torch.load(path, weights_only=True)


# ---- save and load -----------------------------------------------------------------------------------------


@every_optimizer
@every_method
def test_a_loaded_run_goes_on_bitwise(method, optimizer, tmp_path):
    """Saved in the middle of the second window, loaded where everything began from other random numbers."""
    hyper, weighting = make(method, optimizer)
    train(hyper, range(2))
    hyper.hyper_step(batch(90))
    train(hyper, range(2, 5))
    checkpoint = saved_and_loaded(hyper.state_dict(), tmp_path / "run.pt")
    at_the_save = standing(hyper, weighting)
    expected = go_on(hyper, weighting)

    other, other_weighting = make(method, optimizer, seed=7)
    assert standing(other, other_weighting)["weights"] != at_the_save["weights"]
    other.load_state_dict(checkpoint)
    assert [key for key, value in standing(other, other_weighting).items() if value != at_the_save[key]] == []
    assert differences(go_on(other, other_weighting), expected) == []


@some_methods
@pytest.mark.parametrize("num_own_steps", [1, 4])
def test_a_run_is_loaded_over_another_one_that_was_under_way(method, num_own_steps, tmp_path):
    hyper, weighting = make(method)
    train(hyper, range(5))
    checkpoint = saved_and_loaded(hyper.state_dict(), tmp_path / "run.pt")
    expected = go_on(hyper, weighting)

    other, other_weighting = make(method, seed=7)
    train(other, range(20, 20 + num_own_steps))
    if num_own_steps > 1:
        other.hyper_step(batch(99))
        train(other, range(30, 33))
    other.load_state_dict(checkpoint)
    assert differences(go_on(other, other_weighting), expected) == []


@some_methods
@pytest.mark.parametrize("when", ["before the first step", "after a hyper step"])
def test_a_run_is_saved_between_windows(method, when, tmp_path):
    hyper, weighting = make(method)
    if when == "after a hyper step":
        train(hyper, range(5))
        hyper.hyper_step(batch(90))
    checkpoint = saved_and_loaded(hyper.state_dict(), tmp_path / "run.pt")
    expected = go_on(hyper, weighting)
    other, other_weighting = make(method, seed=7)
    train(other, range(2))
    other.load_state_dict(checkpoint)
    assert differences(go_on(other, other_weighting), expected) == []


@pytest.mark.parametrize("method", [Unrolled(truncation=3, max_snapshots=2), ForwardMode()], ids=str)
def test_a_schedule_and_a_scheduler_go_on(method, tmp_path):
    def made(seed):
        torch.manual_seed(seed)
        model = network()
        optimizer = torch.optim.NAdam(model.parameters(), lr=1e-2)
        tune = [
            Hyperparameter("lr", per="step", num_steps=6, init=torch.rand(6)),
            Hyperparameter("betas.0", log=True),
        ]
        hyper = HyperOptimizer(model, optimizer, val_loss, tune, method, partial(torch.optim.SGD, lr=1e-5))
        return hyper, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def rest(hyper, scheduler):
        losses = []
        for seed in range(3, 6):
            losses.append(hyper.step(batch(seed)))
            scheduler.step()
        return frozen_bytes(
            [losses, hyper.hypergradient(batch(90)), list(hyper.model.parameters()), hyper.values()]
        )

    hyper, scheduler = made(0)
    for seed in range(3):
        hyper.step(batch(seed))
        scheduler.step()
    saved = {"hyper": hyper.state_dict(), "scheduler": scheduler.state_dict()}
    checkpoint = saved_and_loaded(saved, tmp_path / "run.pt")
    expected = rest(hyper, scheduler)
    other, other_scheduler = made(7)
    other.load_state_dict(checkpoint["hyper"])
    other_scheduler.load_state_dict(checkpoint["scheduler"])
    assert rest(other, other_scheduler) == expected


@some_methods
def test_saving_changes_nothing(method, tmp_path):
    stories = []
    for save in (False, True):
        hyper, weighting = make(method)
        train(hyper, range(5))
        if save:
            torch.save(hyper.state_dict(), tmp_path / "run.pt")
        stories.append(go_on(hyper, weighting))
    assert differences(*stories) == []


def test_a_copy_of_a_checkpoint_can_be_loaded_twice():
    """What is loaded is not shared with the run: a second run from the same checkpoint is the same."""
    hyper, _ = make(Unrolled())
    train(hyper, range(5))
    checkpoint = copy.deepcopy(hyper.state_dict())
    before = frozen_bytes(checkpoint)
    stories = []
    for seed in (7, 8):
        other, other_weighting = make(Unrolled(), seed=seed)
        other.load_state_dict(checkpoint)
        stories.append(go_on(other, other_weighting))
        assert frozen_bytes(checkpoint) == before
    assert differences(*stories) == []


@pytest.mark.parametrize("method", [Unrolled(), Implicit(Identity(0.1))], ids=str)
def test_the_frozen_part_of_a_tuned_module_is_saved(method):
    def made(seed):
        torch.manual_seed(seed)
        model, weighting = network(), nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1)).double()
        weighting[0].requires_grad_(False)

        def train_loss(model, batch):
            losses = (model(batch["x"]) - batch["y"]).square()
            return (weighting(losses) * losses).mean()

        optimizer = OPTIMIZERS["adam"](model.parameters())
        return HyperOptimizer(
            model, optimizer, train_loss, [weighting], method, torch.optim.Adam, val_loss=val_loss
        )

    hyper, other = made(0), made(7)
    train(hyper, range(2))
    other.load_state_dict(copy.deepcopy(hyper.state_dict()))
    assert frozen_bytes(other.hypergradient(batch(90))) == frozen_bytes(hyper.hypergradient(batch(90)))


class OwnSolver(Solver):
    """A user's solver with nothing but what the base class asks for."""

    def solve(self, matvec, b):
        return Identity(0.1).solve(matvec, b)


def test_a_run_with_a_solver_of_ones_own_can_be_loaded(tmp_path):
    hyper, weighting = make(Implicit(OwnSolver()))
    train(hyper, range(5))
    checkpoint = saved_and_loaded(hyper.state_dict(), tmp_path / "run.pt")
    expected = go_on(hyper, weighting)
    other, other_weighting = make(Implicit(OwnSolver()), seed=7)
    other.load_state_dict(checkpoint)
    assert differences(go_on(other, other_weighting), expected) == []


@every_optimizer
def test_the_wrapped_optimizers_own_checkpoint_may_be_loaded_before_the_first_step(optimizer):
    """torch's way to resume, after the HyperOptimizer was made: the moments count."""
    torch.manual_seed(0)
    model = network()
    plain = OPTIMIZERS[optimizer](model.parameters())
    for seed in range(3):
        plain.zero_grad()
        val_loss(model, batch(seed)).backward()
        plain.step()
    saved_model, saved_plain = copy.deepcopy(model.state_dict()), copy.deepcopy(plain.state_dict())

    before, weighting = make(Unrolled(), optimizer, model=model, made=plain)
    after, other_weighting = make(Unrolled(), optimizer)
    other_weighting.load_state_dict(weighting.state_dict())
    after.model.load_state_dict(saved_model)
    after.optimizer.load_state_dict(saved_plain)
    after.set_values(before.values())
    stories = []
    for hyper in (before, after):
        torch.manual_seed(3)
        stories.append(
            frozen_bytes(
                [train(hyper, range(3)), hyper.hypergradient(batch(90)), hyper.optimizer.state_dict()]
            )
        )
    assert differences(*stories) == []


# ---- restart -----------------------------------------------------------------------------------------------


def plainly_trained(optimizer, seed=0):
    """A model and an optimizer in the middle of plain training. The first layer was frozen for a step,
    so that its step count is another one."""
    torch.manual_seed(seed)
    model = network()
    made = OPTIMIZERS[optimizer](model.parameters())
    for t in range(3):
        model[0].requires_grad_(t > 0)
        made.zero_grad()
        val_loss(model, batch(40 + t)).backward()
        made.step()
    made.zero_grad()
    return model, made


def beginning(hyper):
    """What restart() brings back."""
    model = hyper.model
    named = [dict(model.named_parameters()), dict(model.named_buffers()), hyper.optimizer.state_dict()]
    return frozen_bytes(named)


@every_optimizer
@some_methods
@pytest.mark.parametrize("begin", ["new", "in the middle of training"])
@pytest.mark.parametrize("end", ["in a window", "after a hyper step"])
def test_restart_goes_back_bitwise(method, optimizer, begin, end):
    model, made = (None, None) if begin == "new" else plainly_trained(optimizer)
    hyper, _ = make(method, optimizer, model=model, made=made)
    start = beginning(hyper)
    stories = []
    for _ in range(2):
        torch.manual_seed(5)
        stories.append(frozen_bytes([train(hyper, range(4)), hyper.hypergradient(batch(90))]))
        if end == "after a hyper step":
            hyper.hyper_step(batch(90))
        values = frozen_bytes(hyper.values())
        assert beginning(hyper) != start
        hyper.restart()
        assert beginning(hyper) == start
        assert frozen_bytes(hyper.values()) == values
    if end == "in a window":
        # The tuned module's buffers go back too, so with the same values the episodes are the same.
        assert stories[1] == stories[0]
    else:
        assert stories[1] != stories[0]


@pytest.mark.parametrize("method", [Unrolled(), Implicit(Identity(0.1))], ids=str)
def test_restart_drops_the_window(method):
    hyper, _ = make(method)
    train(hyper, range(2))
    hyper.restart()
    with pytest.raises(TrajectoryError, match="no training steps"):
        hyper.hypergradient(batch(90))


@every_optimizer
@pytest.mark.parametrize("method", [Unrolled(), Implicit(Identity(0.1))], ids=str)
def test_plain_steps_after_a_restart_do_not_move_the_beginning(method, optimizer):
    """torch's step works in place on what restart() has put there."""
    model, made = plainly_trained(optimizer)
    hyper, _ = make(method, optimizer, model=model, made=made)
    start = beginning(hyper)
    train(hyper, range(2))
    hyper.restart()
    for _ in range(2):
        made.zero_grad()
        val_loss(model, batch(50)).backward()
        made.step()
    made.zero_grad()
    assert beginning(hyper) != start
    hyper.restart()
    assert beginning(hyper) == start


@every_optimizer
@some_methods
def test_restart_after_a_load(method, optimizer, tmp_path):
    """It goes back to where the saved run began, not to where the loading one did."""
    model, made = plainly_trained(optimizer)
    hyper, _ = make(method, optimizer, model=model, made=made)
    start = beginning(hyper)
    train(hyper, range(5))
    checkpoint = saved_and_loaded(hyper.state_dict(), tmp_path / "run.pt")
    hyper.restart()
    torch.manual_seed(5)
    expected = frozen_bytes([train(hyper, range(4)), hyper.hypergradient(batch(90)), beginning(hyper)])

    other, _ = make(method, optimizer, seed=7)
    other.load_state_dict(checkpoint)
    assert beginning(other) != start
    other.restart()
    assert beginning(other) == start
    torch.manual_seed(5)
    assert (
        frozen_bytes([train(other, range(4)), other.hypergradient(batch(90)), beginning(other)]) == expected
    )


# ---- hypergradients and windows ----------------------------------------------------------------------------


@every_method
def test_hypergradient_twice_is_the_same_and_changes_nothing(method):
    hyper, weighting = make(method)
    train(hyper, range(5))
    before = standing(hyper, weighting)
    first = frozen_bytes(hyper.hypergradient(batch(90)))
    assert [key for key, value in standing(hyper, weighting).items() if value != before[key]] == []
    assert frozen_bytes(hyper.hypergradient(batch(90))) == first
    assert frozen_bytes(hyper.hypergradient(batch(91))) != first
    assert frozen_bytes(hyper.hypergradient(batch(90))) == first
    assert [key for key, value in standing(hyper, weighting).items() if value != before[key]] == []
    assert all(p.grad is None for p in [*hyper.model.parameters(), *weighting.parameters()])


def test_the_window_is_differentiated_in_the_mode_it_was_trained_in():
    """Validation sees the model in eval mode, replayed steps in the mode they were taken in;
    forward mode replays none."""
    found = []
    for method in (ForwardMode(), Unrolled(), Unrolled(max_snapshots=2)):
        hyper, _ = make(method)
        train(hyper, range(4))
        hyper.model.eval()
        hypergradient = hyper.hypergradient(batch(90))
        assert not any(module.training for module in hyper.model.modules())
        found.append(
            torch.stack([h.sum() for name, h in hypergradient.items() if not name.startswith("weight_decay")])
        )
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-12)


@some_methods
def test_a_hypergradient_on_the_way_does_not_matter(method):
    stories = []
    for look in (False, True):
        hyper, weighting = make(method)
        for seed in range(5):
            hyper.step(batch(seed))
            if look:
                hyper.hypergradient(batch(92))
                hyper.validation_loss(batch(92))
        stories.append(go_on(hyper, weighting))
    assert differences(*stories) == []


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [*((method, "adam") for method in METHODS), (Unrolled(), "momentum"), (ForwardMode(), "nadam")],
)
def test_a_hyper_step_ends_the_trajectory(method, optimizer):
    """The next window's hypergradient is that of a HyperOptimizer which begins there."""
    hyper, weighting = make(method, optimizer)
    train(hyper, range(3))
    hyper.hyper_step(batch(90))
    with pytest.raises(TrajectoryError, match="no training steps"):
        hyper.hypergradient(batch(90))

    model = copy.deepcopy(hyper.model)
    made = OPTIMIZERS[optimizer](model.parameters())
    made.load_state_dict(copy.deepcopy(hyper.optimizer.state_dict()))
    fresh, fresh_weighting = make(method, optimizer, model=model, made=made)
    fresh.set_values(hyper.values())
    for own, given in zip(fresh_weighting.buffers(), weighting.buffers()):
        own.copy_(given)
    found = []
    for h in (hyper, fresh):
        torch.manual_seed(5)
        found.append([*train(h, range(3, 6)), *h.hypergradient(batch(91)).values()])
    for a, b in zip(*found):
        # Values on a log scale go through exp and log once more, so the last digit may differ.
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
