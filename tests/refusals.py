"""What the tests of bad input share: runs to spoil, and what must not be lost by it."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn

from problems import REPLAY
from torch_hypergrad import ForwardMode, HyperOptimizer, Hyperparameter, Identity, Implicit, Unrolled

HYPER_SGD = partial(torch.optim.SGD, lr=1e-3)
ADAM = partial(torch.optim.Adam, lr=1e-2, weight_decay=1e-3)
LR = (Hyperparameter("lr"),)
DECAY = (Hyperparameter("weight_decay"),)
EVERY_METHOD = [REPLAY, Unrolled(max_snapshots=2), ForwardMode(), Implicit(Identity(0.1))]
REPLAYING = [REPLAY, Unrolled(max_snapshots=2), ForwardMode()]


def network(seed=0, width=4):
    """With buffers and random numbers, so that a failed call has something to lose."""
    torch.manual_seed(seed)
    layers = nn.Linear(3, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.3), nn.Linear(width, 1)
    return nn.Sequential(*layers).double()


def batch(seed, num=6):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 3, dtype=torch.float64, generator=generator)
    return x, torch.randn(num, 1, dtype=torch.float64, generator=generator)


def mse(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def make(
    model=None, optimizer=ADAM, train_loss=mse, tune=LR, method=None, hyper_optimizer=HYPER_SGD, **options
):
    model = network() if model is None else model
    method = REPLAY if method is None else method
    return HyperOptimizer(
        model, optimizer(model.parameters()), train_loss, tune, method, hyper_optimizer, **options
    )


def trained(num_steps=3, **options):
    """After a hyper step, which gives the hyper optimizer a state to lose, and a window of a few steps."""
    options.setdefault("tune", DECAY)
    hyper = make(hyper_optimizer=partial(torch.optim.Adam, lr=1e-3), **options)
    hyper.step(batch(90))
    hyper.hyper_step(batch(91))
    for seed in range(num_steps):
        hyper.step(batch(seed))
    return hyper


class Point(nn.Module):
    """Nothing but a parameter vector ``w``."""

    def __init__(self, *w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))


def frozen_bytes(thing):
    """``thing``, a tree of containers, with every tensor as its bytes,
    so that NaN equals NaN and -0 differs from 0."""
    if isinstance(thing, torch.Tensor):
        return str(thing.dtype), tuple(thing.shape), thing.detach().cpu().contiguous().numpy().tobytes()
    if isinstance(thing, dict):
        return {key: frozen_bytes(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [frozen_bytes(value) for value in thing]
    return thing


def everything(hyper):
    """All that a failed call could lose."""
    modules = list(hyper.model.modules())
    return frozen_bytes(
        {
            "values": hyper.values(),
            "hyper optimizer": hyper.hyper_optimizer.state_dict(),
            "weights": dict(hyper.model.named_parameters()),
            "buffers": dict(hyper.model.named_buffers()),
            "optimizer": hyper.optimizer.state_dict(),
            "random numbers": torch.get_rng_state(),
            "modes": [module.training for module in modules],
            "frozen": [p.requires_grad for p in hyper.model.parameters()],
            "gradients": [p.grad for p in hyper.model.parameters()],
        }
    )


@contextmanager
def unchanged(hyper):
    """Holds that the block leaves everything bitwise as it was."""
    before = everything(hyper)
    yield
    after = everything(hyper)
    lost = [key for key in before if before[key] != after[key]]
    assert not lost, f"changed by a call that failed: {', '.join(lost)}"


@contextmanager
def refused(kind, *words):
    """Holds that the block raises an error of ``kind`` whose message has all of ``words``."""
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is kind, f"raised {type(caught.value).__name__}: {message}"
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"


def short(value):
    """Ids of parametrized tests: the words of the message and the name of the error."""
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return " ".join(value)
    return getattr(value, "__name__", None)


NAN, INFINITY = float("nan"), float("inf")
