"""Vectors, values laid out for the update rules and the transpose of that, and the plan by which a sweep goes
back with few snapshots, for any shapes and numbers: hypothesis chooses them."""

import math
import weakref
from functools import cache, partial
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_hypergrad.ground.buckets import Bucket
from torch_hypergrad.ground.vectors import Layout
from torch_hypergrad.history.snapshots import Snapshots, next_snapshot
from torch_hypergrad.tune.granularity import PerElement, PerGroup, PerStep, PerTensor

DOUBLE = partial(torch.tensor, dtype=torch.float64)
FROZEN = partial(torch.optim.SGD, lr=0.0)
quickly = settings(max_examples=60, deadline=None)


def close(found, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def filled(shape, value):
    return torch.full(shape, value, dtype=torch.float64)


# ---- vectors -----------------------------------------------------------------------------------------------

SHAPES = st.lists(st.lists(st.integers(0, 3), max_size=3).map(torch.Size), min_size=1, max_size=5)


def normal(generator, *shape):
    return torch.randn(shape, dtype=torch.float64, generator=generator)


@st.composite
def layouts(draw):
    """A layout, some of its positions in order, and a source of numbers."""
    layout = Layout(draw(SHAPES))
    some = draw(st.lists(st.integers(0, len(layout.sizes) - 1), min_size=1, unique=True).map(sorted))
    return layout, tuple(some), torch.Generator().manual_seed(draw(st.integers(0, 2**32)))


@quickly
@given(layouts())
def test_split_is_the_inverse_of_flatten(drawn):
    layout, _, generator = drawn
    tensors = [normal(generator, *shape) for shape in layout.shapes]
    vector = layout.flatten(tensors)
    assert vector.shape == (layout.numel,) == (sum(t.numel() for t in tensors),)
    split = layout.split(vector)
    assert [piece.shape for piece in split] == list(layout.shapes)
    assert all(torch.equal(piece, tensor) for piece, tensor in zip(split, tensors))
    assert torch.equal(layout.flatten(split), vector)


@quickly
@given(layouts())
def test_split_gives_views(drawn):
    layout, _, generator = drawn
    vector = normal(generator, layout.numel)
    for piece in layout.split(vector):
        piece.zero_()
    assert not vector.any()


@quickly
@given(layouts())
def test_take_gives_the_parts(drawn):
    layout, some, generator = drawn
    tensors = [normal(generator, *shape) for shape in layout.shapes]
    expected = torch.cat([tensors[i].reshape(-1) for i in some])
    assert torch.equal(layout.take(layout.flatten(tensors), some), expected)


@quickly
@given(layouts())
def test_add_at_is_the_transpose_of_take(drawn):
    layout, some, generator = drawn
    vector, total = normal(generator, layout.numel), normal(generator, layout.numel)
    part = normal(generator, layout.take(vector, some).numel())
    after = total.clone()
    layout.add_at(after, some, part)
    close(vector @ (after - total), layout.take(vector, some) @ part)


# ---- values laid out for the rules -------------------------------------------------------------------------

GRANULARITIES = {"group": PerGroup(), "tensor": PerTensor(), "element": PerElement(), "step": PerStep()}
NUM_STEPS = 4


@st.composite
def buckets_of_a_group(draw):
    """A group's layout and buckets, each some of its parameters (flat) or one of them in its own shape."""
    layout, some, generator = draw(layouts())
    flat = draw(st.booleans())
    chosen = [some] if flat else [(i,) for i in some]
    double, cpu = torch.float64, torch.device("cpu")
    buckets = [
        Bucket(0, part, part, Layout([layout.shapes[i] for i in part]), flat, double, cpu) for part in chosen
    ]
    return layout, buckets, generator


@pytest.mark.parametrize("per", GRANULARITIES)
@quickly
@given(drawn=buckets_of_a_group(), step=st.integers(0, NUM_STEPS - 1), scale=st.floats(-3, 3))
def test_laying_out_is_linear(per, drawn, step, scale):
    layout, buckets, generator = drawn
    granularity = GRANULARITIES[per]
    u, v = (normal(generator, *granularity.count(layout, NUM_STEPS)) for _ in range(2))
    for bucket in buckets:

        def lay_out(values, bucket=bucket):
            return granularity.lay_out(values, layout, bucket, step)

        assert lay_out(u).shape in ((), bucket.shape)
        close(lay_out(u + scale * v), lay_out(u) + scale * lay_out(v))
        assert not lay_out(torch.zeros_like(u)).any()


@pytest.mark.parametrize("per", GRANULARITIES)
@quickly
@given(drawn=buckets_of_a_group(), step=st.integers(0, NUM_STEPS - 1))
def test_adding_adjoints_is_the_transpose_of_laying_out(per, drawn, step):
    """<lay_out(v), w> = <v, reduce(add_adjoint(w))>, summed over the buckets of a step."""
    layout, buckets, generator = drawn
    granularity = GRANULARITIES[per]
    v = normal(generator, *granularity.count(layout, NUM_STEPS))
    total = granularity.zero_adjoint(v, layout)
    expected = DOUBLE(0.0)
    for bucket in buckets:
        laid_out = granularity.lay_out(v, layout, bucket, step)
        w = normal(generator, *laid_out.shape)
        granularity.add_adjoint(total, w, layout, bucket, step)
        expected = expected + (laid_out * w).sum()
    reduced = granularity.reduce(total, layout)
    assert reduced.shape == v.shape
    close((v * reduced).sum(), expected)


@pytest.mark.parametrize("per", GRANULARITIES)
def test_a_bucket_gets_the_values_of_its_own_parameters(per):
    """Parameters 0 and 2 of a group of three, of 2, 3 and 1 entries, at step 1."""
    layout = Layout([torch.Size([2]), torch.Size([3]), torch.Size([1])])
    own = Layout([torch.Size([2]), torch.Size([1])])
    bucket = Bucket(0, (4, 6), (0, 2), own, True, torch.float64, torch.device("cpu"))
    expected = {"group": 7.0, "tensor": [1.0, 1.0, 3.0], "element": [1.0, 2.0, 6.0], "step": 2.0}
    values = {
        "group": DOUBLE(7.0),
        "tensor": DOUBLE([1, 2, 3]),
        "element": DOUBLE(range(1, 7)),
        "step": DOUBLE([1, 2]),
    }
    assert GRANULARITIES[per].lay_out(values[per], layout, bucket, 1).tolist() == expected[per]


# ---- going back with few snapshots -------------------------------------------------------------------------


@cache
def fewest_replays(num_states, num_free):
    """By dynamic programming: the fewest steps taken again to visit ``num_states`` states, last first,
    from the first one and with room for ``num_free`` more. The next one to set aside is tried
    at every distance."""
    if num_states == 1:
        return 0
    if num_free == 0:
        return num_states * (num_states - 1) // 2
    return min(
        ahead + fewest_replays(num_states - ahead, num_free - 1) + fewest_replays(ahead, num_free)
        for ahead in range(1, num_states)
    )


def go_back(num_states, num_free):
    """The replays and the most places used on the way back through ``num_states`` states
    by ``next_snapshot``."""
    replays, most = 0, 0
    aside = [0]  # the known state takes no place
    for t in reversed(range(num_states)):
        aside = [at for at in aside if at <= t]
        at = aside[-1]
        while at < t:
            ahead = next_snapshot(t - at + 1, num_free - (len(aside) - 1))
            assert 1 <= ahead <= t - at
            replays += ahead
            at += ahead
            if at < t:
                aside.append(at)
            most = max(most, len(aside) - 1)
    return replays, most


@quickly
@given(st.integers(1, 40), st.integers(0, 7))
def test_no_plan_needs_fewer_replays(num_states, num_free):
    replays, most = go_back(num_states, num_free)
    assert replays == fewest_replays(num_states, num_free)
    assert most <= num_free


@quickly
@given(st.integers(2, 3000), st.integers(1, 30))
def test_replays_are_binomial(num_states, num_free):
    """Griewank and Walther 2000: with s = c + 1 snapshots, and r so that
    C(s + r - 1, r - 1) < n <= C(s + r, r), it takes r n - C(s + r, r - 1) steps."""
    s = num_free + 1
    r = next(r for r in range(num_states) if math.comb(s + r, r) >= num_states)
    replays, most = go_back(num_states, num_free)
    assert replays == r * num_states - math.comb(s + r, r - 1)
    assert most <= num_free


class Counted:
    """A state that knows how many of its kind are alive."""

    alive: ClassVar = weakref.WeakSet()

    def __init__(self, t):
        self.t = t
        Counted.alive.add(self)


class FakeTraining:
    """Takes steps on counted states, and counts them."""

    num_replays = 0

    @property
    def update(self):
        return self

    def to_pull(self, state, step):
        return state

    def apply(self, step, state):
        assert step == state.t, "a step is taken again from the state before it"
        self.num_replays += 1
        return Counted(state.t + 1)


@quickly
@given(
    num_steps=st.integers(1, 120),
    max_snapshots=st.one_of(st.none(), st.integers(1, 9)),
    truncation=st.one_of(st.none(), st.integers(1, 40)),
)
def test_a_trajectory_goes_back_within_its_budget(num_steps, max_snapshots, truncation):
    if truncation is not None and max_snapshots == 1:
        max_snapshots = 2
    training = FakeTraining()
    trajectory = Snapshots(training, truncation, max_snapshots)
    budget = num_steps if max_snapshots is None else max_snapshots
    for t in range(num_steps):
        trajectory.record(t, Counted(t))
        assert len(Counted.alive) <= budget
    first = 0 if truncation is None else max(0, num_steps - truncation)
    assert list(trajectory.steps()) == list(range(first, num_steps))
    visited = []
    for step, state, _ in trajectory.visits():
        assert step == state.t
        visited.append(step)
        assert len(Counted.alive) <= (budget if max_snapshots is None else 2 * max_snapshots + 3)
    assert visited == list(reversed(range(first, num_steps)))
    if max_snapshots is None:
        assert training.num_replays == 0
    trajectory.clear()
    del state
    assert not Counted.alive
