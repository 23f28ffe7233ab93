"""Bad input gives an error that says what came, what was expected and what to do, at the earliest moment, and nothing is
lost by it: values, hyper optimizer, weights, buffers, optimizer state, modes and random numbers are bitwise as before."""

import copy
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from torch_hypergrad import (
    CG,
    Cholesky,
    ForwardMode,
    HyperOptimizer,
    Hyperparameter,
    Identity,
    Implicit,
    Neumann,
    NonFiniteError,
    NotTwiceDifferentiableError,
    SolverError,
    TrajectoryError,
    Unrolled,
)

HYPER_SGD = partial(torch.optim.SGD, lr=1e-3)
ADAM = partial(torch.optim.Adam, lr=1e-2, weight_decay=1e-3)
LR = (Hyperparameter("lr"),)
DECAY = (Hyperparameter("weight_decay"),)
EVERY_METHOD = [Unrolled(), Unrolled(max_snapshots=2), ForwardMode(), Implicit(Identity(0.1))]
REPLAYING = [Unrolled(), Unrolled(max_snapshots=2), ForwardMode()]


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


def make(model=None, optimizer=ADAM, train_loss=mse, tune=LR, method=None, hyper_optimizer=HYPER_SGD, **options):
    model = network() if model is None else model
    method = Unrolled() if method is None else method
    return HyperOptimizer(model, optimizer(model.parameters()), train_loss, tune, method, hyper_optimizer, **options)


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
    """``thing``, a tree of containers, with every tensor as its bytes, so that NaN equals NaN and -0 differs from 0."""
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


# ---- options --------------------------------------------------------------------------------------------------------

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"name": 3}, TypeError, ["name", "string", "3"]),
        ({"name": None}, TypeError, ["name", "None"]),
        ({"per": "layer"}, ValueError, ["'layer'", "group, tensor, element, step"]),
        ({"per": None}, ValueError, ["None", "group, tensor, element, step"]),
        ({"init": "0.1"}, TypeError, ["init", "'0.1'", "number"]),
        ({"init": [0.1]}, TypeError, ["init", "tensor"]),
        ({"init": True}, TypeError, ["init", "True"]),
        ({"init": torch.tensor([True])}, TypeError, ["init", "real"]),
        ({"init": torch.tensor(1j)}, TypeError, ["init", "real"]),
        ({"per": ["group"]}, ValueError, ["['group']", "group, tensor, element, step"]),
        ({"init": NAN}, ValueError, ["finite", "nan"]),
        ({"init": INFINITY}, ValueError, ["finite", "inf"]),
        ({"init": torch.tensor([0.1, NAN])}, ValueError, ["finite", "nan"]),
        ({"low": "0"}, TypeError, ["low", "'0'"]),
        ({"high": [1.0]}, TypeError, ["high"]),
        ({"low": NAN}, ValueError, ["low", "nan"]),
        ({"high": NAN}, ValueError, ["high", "nan"]),
        ({"low": 1.0, "high": 0.5}, ValueError, ["low=1.0", "high=0.5", "below"]),
        ({"low": 1.0, "high": 1.0}, ValueError, ["low=1.0", "high=1.0", "below"]),
        ({"init": -0.5, "low": 0.0}, ValueError, ["-0.5", "low"]),
        ({"init": 2.0, "high": 1.0}, ValueError, ["2", "1.0", "high"]),
        ({"init": torch.tensor([0.5, 2.0]), "high": 1.0}, ValueError, ["0.5 to 2", "1.0"]),
        ({"log": "yes"}, TypeError, ["log", "'yes'"]),
        ({"init": 0.0, "log": True}, ValueError, ["log=True", "0", "positive", "init"]),
        ({"init": torch.tensor([1.0, 0.0]), "log": True}, ValueError, ["log=True", "positive"]),
        ({"per": "step"}, ValueError, ["step", "num_steps", "episode"]),
        ({"per": "step", "num_steps": 0}, ValueError, ["num_steps", "positive", "0"]),
        ({"per": "step", "num_steps": 2.5}, TypeError, ["num_steps", "int", "2.5"]),
        ({"per": "step", "num_steps": True}, TypeError, ["num_steps", "int", "True"]),
        ({"per": "group", "num_steps": 5}, ValueError, ["num_steps=5", "'group'"]),
    ],
    ids=short,
)
def test_hyperparameter_refuses(arguments, kind, words):
    with refused(kind, *words):
        Hyperparameter(**{"name": "lr", **arguments})


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        (lambda: Unrolled(truncation=0), ValueError, ["truncation", "0", "at least 1", "None"]),
        (lambda: Unrolled(truncation=-3), ValueError, ["truncation", "-3"]),
        (lambda: Unrolled(truncation=2.5), TypeError, ["truncation", "int", "2.5"]),
        (lambda: Unrolled(truncation=True), TypeError, ["truncation", "int", "True"]),
        (lambda: Unrolled(max_snapshots=0), ValueError, ["max_snapshots", "0", "at least 1"]),
        (lambda: Unrolled(max_snapshots="4"), TypeError, ["max_snapshots", "'4'"]),
        (lambda: Unrolled(truncation=5, max_snapshots=1), ValueError, ["max_snapshots=1", "truncation", "max_snapshots=2"]),
        (lambda: Unrolled(offload="disk"), ValueError, ["offload", "'disk'", "'cpu'"]),
        (lambda: Unrolled(offload=True), ValueError, ["offload", "True", "'cpu'"]),
        (lambda: Implicit(Neumann), TypeError, ["solver", "Neumann"]),
        (lambda: Implicit("cg"), TypeError, ["solver", "'cg'"]),
        (lambda: Implicit(None), TypeError, ["solver", "None"]),
        (lambda: Implicit(CG(), num_batches=0), ValueError, ["num_batches", "0", "at least 1"]),
        (lambda: Implicit(CG(), num_batches=1.5), TypeError, ["num_batches", "int", "1.5"]),
        (lambda: Implicit(CG(), num_batches=True), TypeError, ["num_batches", "int", "True"]),
        (lambda: Neumann(0), ValueError, ["num_terms", "0", "at least 1"]),
        (lambda: Neumann(2.0), TypeError, ["num_terms", "int", "2.0"]),
        (lambda: Neumann(True), TypeError, ["num_terms", "int", "True"]),
        (lambda: Neumann(5, scale=0.0), ValueError, ["scale", "above 0"]),
        (lambda: Neumann(5, scale=-1.0), ValueError, ["scale", "above 0", "-1"]),
        (lambda: Neumann(5, scale=NAN), ValueError, ["scale", "finite", "nan"]),
        (lambda: Neumann(5, scale="auto"), TypeError, ["scale", "'auto'"]),
        (lambda: Neumann(5, damping=-1.0), ValueError, ["damping", "at least 0", "-1"]),
        (lambda: CG(max_steps=0), ValueError, ["max_steps", "0", "at least 1"]),
        (lambda: CG(max_steps=3.5), TypeError, ["max_steps", "int", "3.5"]),
        (lambda: CG(rtol=-1e-3), ValueError, ["rtol", "at least 0", "-0.001"]),
        (lambda: CG(rtol="small"), TypeError, ["rtol", "'small'"]),
        (lambda: CG(damping=INFINITY), ValueError, ["damping", "finite", "inf"]),
        (lambda: Cholesky(damping=-1.0), ValueError, ["damping", "at least 0", "-1"]),
        (lambda: Cholesky(damping=None), TypeError, ["damping", "None"]),
        (lambda: Identity(0.0), ValueError, ["scale", "above 0"]),
        (lambda: Identity("1"), TypeError, ["scale", "'1'"]),
    ],
    ids=short,
)
def test_methods_and_solvers_refuse(options, kind, words):
    with refused(kind, *words):
        options()


# ---- construction ---------------------------------------------------------------------------------------------------


def not_an_optimizer_of_the_leaves(leaves):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"tune": [Hyperparameter("weight_deacy")]}, ValueError, ["'weight_deacy'", "Did you mean 'weight_decay'", "lr"]),
        ({"tune": [Hyperparameter("momentum")]}, ValueError, ["'momentum'", "lr", "betas.0", "weight_decay"]),
        ({"tune": [Hyperparameter("params")]}, ValueError, ["'params'", "lr"]),
        ({"tune": [Hyperparameter("amsgrad")]}, ValueError, ["'amsgrad'", "continuous", "lr"]),
        ({"tune": [Hyperparameter("foreach")]}, ValueError, ["'foreach'", "continuous", "lr"]),
        ({"tune": [Hyperparameter("betas")]}, ValueError, ["'betas'", "betas.0", "pair"]),
        ({"tune": [Hyperparameter("betas.2")]}, ValueError, ["'betas.2'", "betas.1"]),
        ({"tune": [Hyperparameter("lr"), Hyperparameter("lr", per="tensor")]}, ValueError, ["2 entries", "'lr'", "one"]),
        ({"tune": [Hyperparameter("lr", low=0.2)]}, ValueError, ["'lr'", "0.01", "0.2", "init"]),
        ({"tune": [Hyperparameter("lr", init=-0.1)]}, ValueError, ["'lr'", "-0.1", "low"]),
        ({"tune": [Hyperparameter("betas.1", init=1.0)]}, ValueError, ["'betas.1'", "1", "bounds"]),
        ({"tune": [Hyperparameter("eps", high=1e-9)]}, ValueError, ["'eps'", "1e-08", "1e-09"]),
        ({"tune": [Hyperparameter("lr", init=torch.ones(3))]}, ValueError, ["3 entries", "1 values", "order"]),
        ({"tune": [Hyperparameter("lr", per="tensor", init=torch.ones(4))]}, ValueError, ["4 entries", "6 values"]),
        (
            {"tune": [Hyperparameter("weight_decay", per="element", init=torch.ones(5))]},
            ValueError,
            ["5 entries", "29 values"],
        ),
        ({"tune": []}, ValueError, ["empty", "Hyperparameter"]),
        ({"tune": None}, TypeError, ["tune", "Hyperparameter", "None"]),
        ({"tune": ["lr"]}, TypeError, ["tune", "Hyperparameter", "'lr'"]),
        ({"tune": [Hyperparameter]}, TypeError, ["tune", "Hyperparameter"]),
        ({"tune": [nn.Linear], "val_loss": mse}, TypeError, ["tune", "Linear"]),
        ({"tune": [nn.ReLU()], "val_loss": mse}, ValueError, ["tune"]),
        ({"tune": [*LR, nn.ReLU()], "val_loss": mse}, ValueError, ["ReLU", "no parameter"]),
        ({"tune": [torch.zeros(2, requires_grad=True)]}, ValueError, ["tensor0", "val_loss=", "not given"]),
        ({"tune": [("noise", nn.Linear(1, 1))]}, ValueError, ["noise.weight", "val_loss=", "not given"]),
        (
            {"tune": [torch.zeros(2, requires_grad=True) * 2], "val_loss": mse},
            ValueError,
            ["tensor0", "is_leaf=False", "detach"],
        ),
        ({"tune": [("noise", torch.zeros(2))], "val_loss": mse}, ValueError, ["'noise'", "requires_grad=False"]),
        ({"tune": [("noise", torch.zeros(2, dtype=torch.int64))], "val_loss": mse}, ValueError, ["'noise'", "int64"]),
        (
            {"tune": [("a", torch.zeros(2, requires_grad=True)), ("a", torch.ones(2, requires_grad=True))], "val_loss": mse},
            ValueError,
            ["2 entries", "'a'"],
        ),
        ({"method": Unrolled}, TypeError, ["method", "Unrolled", "instance"]),
        ({"method": "unrolled"}, TypeError, ["method", "'unrolled'"]),
        ({"method": CG()}, TypeError, ["method", "CG"]),
        ({"train_loss": None}, TypeError, ["train_loss", "function", "None"]),
        ({"train_loss": 0.5}, TypeError, ["train_loss", "function", "0.5"]),
        ({"val_loss": 0.5}, TypeError, ["val_loss", "function", "0.5"]),
        ({"grad_transform": 1.0}, TypeError, ["grad_transform", "function", "1.0"]),
        ({"hyper_optimizer": None}, TypeError, ["hyper_optimizer", "function", "None"]),
        (
            {"hyper_optimizer": torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)},
            TypeError,
            ["hyper_optimizer", "partial"],
        ),
        ({"hyper_optimizer": lambda leaves: None}, TypeError, ["hyper_optimizer", "NoneType", "partial"]),
        ({"hyper_optimizer": lambda leaves: leaves}, TypeError, ["hyper_optimizer", "list", "partial"]),
        ({"hyper_optimizer": not_an_optimizer_of_the_leaves}, ValueError, ["hyper_optimizer", "tensors"]),
        ({"hyper_optimizer": partial(torch.optim.LBFGS, lr=0.1)}, ValueError, ["hyper_optimizer", "LBFGS", "closure"]),
        ({"optimizer": torch.optim.LBFGS}, ValueError, ["LBFGS", "line search", "Adam"]),
        ({"optimizer": torch.optim.SparseAdam}, ValueError, ["SparseAdam", "sparse", "Adam"]),
    ],
    ids=short,
)
def test_construction_refuses(options, kind, words):
    with refused(kind, *words):
        make(**options)


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, nn.Linear, ["model", "Linear", "instance"]),
        (0, None, ["model", "Module", "None"]),
        (0, mse, ["model", "Module"]),
        (1, torch.optim.SGD, ["optimizer", "SGD", "instance"]),
        (1, None, ["optimizer", "Optimizer", "None"]),
        (1, 0.1, ["optimizer", "Optimizer", "0.1"]),
    ],
)
def test_model_and_optimizer_of_the_wrong_type_are_refused(position, value, words):
    model = network()
    arguments = [model, ADAM(model.parameters()), mse, LR, Unrolled(), HYPER_SGD]
    arguments[position] = value
    with refused(TypeError, *words):
        HyperOptimizer(*arguments)


def test_an_optimizer_without_a_rule_is_refused():
    class Mine(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

    with refused(ValueError, "Mine", "register_update", "AdamW"):
        make(optimizer=Mine)


def test_a_log_scale_needs_a_positive_start_of_the_group():
    with refused(ValueError, "'weight_decay'", "log=True", "0", "positive", "init"):
        make(optimizer=partial(torch.optim.SGD, lr=0.1), tune=[Hyperparameter("weight_decay", log=True)])


def test_an_optimizer_of_another_model_is_refused():
    other = ADAM(network(1).parameters())
    with refused(ValueError, "group 0", "(4, 3)", "not one of the model's", "another model"):
        HyperOptimizer(network(), other, mse, LR, Unrolled(), HYPER_SGD)


@pytest.mark.parametrize("name", ["lr", "betas.0", "eps"])
def test_what_does_not_move_the_optimum_is_refused_by_implicit(name):
    with refused(ValueError, repr(name), "Implicit", "Unrolled()", "Adam", "weight_decay"):
        make(tune=[Hyperparameter(name)], method=Implicit(CG()))


def test_a_schedule_is_refused_by_implicit():
    with refused(ValueError, "per='step'", "Implicit", "no training steps", "Unrolled()"):
        make(tune=[Hyperparameter("weight_decay", per="step", num_steps=3)], method=Implicit(CG()))


def test_an_optimizer_without_stationarity_is_refused_by_implicit():
    model = nn.Linear(3, 2, bias=False).double()
    with refused(ValueError, "Muon", "stationarity", "Unrolled()"):
        make(model, optimizer=partial(torch.optim.Muon, lr=0.1), tune=DECAY, method=Implicit(CG()))


def test_the_same_tensor_tuned_and_trained_is_refused():
    model = network()
    with refused(ValueError, "'shared'", "tuned and trained", "Take it out"):
        make(model, tune=[("shared", model[0].weight)], val_loss=mse)


def test_the_same_tensor_tuned_twice_is_refused():
    noise = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    with refused(ValueError, "'a'", "'b'", "same tensor"):
        make(tune=[("a", noise), ("b", noise)], val_loss=mse)


def compiled(model, backend):
    return torch.compile(model, backend=backend)


def compiled_in_place(model, backend):
    model.compile(backend=backend)
    return model


def with_a_compiled_layer(model, backend):
    model[0] = torch.compile(model[0], backend=backend)
    return model


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("compile_it", [compiled, compiled_in_place, with_a_compiled_layer])
@pytest.mark.parametrize("method", [Unrolled(), Implicit(CG())])
def test_a_compiled_module_is_refused(compile_it, backend, method):
    with refused(ValueError, "compiled", "torch.compile", "second derivative", "before"):
        make(compile_it(network(), backend), tune=DECAY, method=method)


def test_a_compiled_tuned_module_is_refused():
    weighting = torch.compile(nn.Linear(1, 1).double(), backend="eager")
    with refused(ValueError, "compiled", "torch.compile", "second derivative", "before"):
        make(tune=[("weighting", weighting)], val_loss=mse)


# ---- training steps -------------------------------------------------------------------------------------------------


def returning(change):
    """A training loss that runs the model, random numbers and all, and then returns something else."""
    return lambda model, batch: change(mse(model, batch))


BAD_LOSSES = [
    (lambda loss: loss.item(), TypeError, ["train_loss", "float", "scalar tensor"]),
    (lambda loss: None, TypeError, ["train_loss", "NoneType", "scalar tensor"]),
    (lambda loss: (loss, loss), TypeError, ["train_loss", "tuple", "scalar tensor"]),
    (lambda loss: loss.expand(2, 3), ValueError, ["train_loss", "(2, 3)", ".mean()"]),
    (lambda loss: loss.detach(), ValueError, ["train_loss", "without a graph", ".detach()", "torch.no_grad()"]),
]


@pytest.mark.parametrize(("change", "kind", "words"), BAD_LOSSES, ids=short)
@pytest.mark.parametrize("method", EVERY_METHOD, ids=str)
def test_a_training_loss_that_is_none(change, kind, words, method):
    hyper = make(train_loss=returning(change), tune=DECAY, method=method)
    with unchanged(hyper), refused(kind, *words):
        hyper.step(batch(0))


@pytest.mark.parametrize(("change", "kind", "words"), BAD_LOSSES, ids=short)
def test_a_validation_loss_that_is_none(change, kind, words):
    hyper = make(val_loss=returning(change))
    hyper.step(batch(0))
    words = [word.replace("train_loss", "val_loss") for word in words]
    for call in (hyper.hyper_step, hyper.hypergradient, hyper.validation_loss):
        with unchanged(hyper), refused(kind, *words):
            call(batch(9))


@pytest.mark.parametrize("method", REPLAYING, ids=str)
def test_a_failed_step_loses_nothing_of_the_window(method):
    def one_in_three_fails(model, batch):
        x, y = batch
        return mse(model, (x, y)) if len(x) != 5 else mse(model, (x, y)).item()

    runs = []
    for fails in (False, True):
        hyper = make(train_loss=one_in_three_fails, tune=DECAY, method=method)
        torch.manual_seed(1)
        for seed in range(3):
            hyper.step(batch(seed))
            if fails:
                with unchanged(hyper), refused(TypeError, "train_loss"):
                    hyper.step(batch(seed, num=5))
        runs.append(frozen_bytes([hyper.hypergradient(batch(9)), everything(hyper)]))
    assert runs[0] == runs[1]


def test_past_the_end_of_a_schedule():
    hyper = make(tune=[Hyperparameter("lr", per="step", num_steps=2)])
    hyper.step(batch(0))
    hyper.hyper_step(batch(9))  # a hyper step does not end the episode
    hyper.step(batch(1))
    with unchanged(hyper), refused(ValueError, "step 3", "lr/group0", "num_steps=2", "restart()"):
        hyper.step(batch(2))
    hyper.restart()
    hyper.step(batch(0))


@pytest.mark.parametrize(
    ("transform", "kind", "words"),
    [
        (lambda grads: grads[1:], ValueError, ["grad_transform", "(4, 3)", "returned", "one gradient for each"]),
        (lambda grads: [g.flatten() for g in grads], ValueError, ["grad_transform", "(4, 3)", "(12,)", "same shapes"]),
        (lambda grads: [], ValueError, ["grad_transform", "(4, 3)", "one gradient for each"]),
        (lambda grads: None, TypeError, ["grad_transform", "None", "list"]),
        (lambda grads: [None for _ in grads], TypeError, ["grad_transform", "None", "tensor"]),
    ],
    ids=short,
)
@pytest.mark.parametrize("method", [Unrolled(), ForwardMode()], ids=str)
def test_a_grad_transform_that_returns_something_else(transform, kind, words, method):
    hyper = make(grad_transform=transform, method=method)
    with unchanged(hyper), refused(kind, *words):
        hyper.step(batch(0))


@pytest.mark.parametrize("method", [Unrolled(), ForwardMode()], ids=str)
def test_a_grad_transform_that_loses_the_graph(method):
    hyper = make(grad_transform=lambda grads: [grads[0].detach(), *grads[1:]], method=method)
    call = hyper.step
    if isinstance(method, Unrolled):  # which asks for the graph when it replays
        hyper.step(batch(0))
        call = hyper.hypergradient
    with unchanged(hyper), refused(ValueError, "grad_transform", "without a graph", "detach"):
        call(batch(9))


def test_a_hyper_step_to_infinity():
    leap = partial(torch.optim.SGD, lr=1e6, momentum=0.5, maximize=True)
    hyper = make(tune=[Hyperparameter("lr", log=True)], hyper_optimizer=leap)
    while True:
        hyper.step(batch(0))
        if hyper.hypergradient(batch(9))["lr/group0"] > 0:
            break
    with unchanged(hyper), refused(NonFiniteError, "'lr/group0'", "inf", "hyper_optimizer", "high="):
        hyper.hyper_step(batch(9))


def test_a_sparse_gradient():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Dropout(0.5), nn.Linear(3, 1)).double()
    hyper = make(model, optimizer=partial(torch.optim.SGD, lr=0.1))
    with unchanged(hyper), refused(ValueError, "'0.weight'", "sparse", "sparse=False"):
        hyper.step((torch.tensor([0, 3]), torch.zeros(2, 1, dtype=torch.float64)))


def test_a_param_group_that_came_later():
    model = network()
    optimizer = ADAM(model[0].parameters())
    hyper = HyperOptimizer(model, optimizer, mse, LR, Unrolled(), HYPER_SGD)
    hyper.step(batch(0))
    optimizer.add_param_group({"params": model[4].parameters()})
    with unchanged(hyper), refused(ValueError, "group", "after", "new HyperOptimizer"):
        hyper.step(batch(1))


def test_a_scheduler_factor_on_a_start_of_zero():
    hyper = make(optimizer=partial(torch.optim.SGD, lr=0.0), tune=[Hyperparameter("lr", init=0.1)])
    hyper.optimizer.param_groups[0]["lr"] = 0.5
    with unchanged(hyper), refused(ValueError, "lr", "0.5", "scheduler", "above 0"):
        hyper.step(batch(0))


# ---- what changes behind the wrapper's back -------------------------------------------------------------------------


def set_in_place(hyper, scale):
    with torch.no_grad():
        hyper.model[0].weight.add_(0.1)


def set_through_data(hyper, scale):
    hyper.model[0].weight.data.add_(0.1)


def set_data_anew(hyper, scale):
    hyper.model[0].weight.data = hyper.model[0].weight.data + 0.1


def load_model(hyper, scale):
    hyper.model.load_state_dict(network(5).state_dict())


def step_the_wrapped_optimizer(hyper, scale):
    mse(hyper.model, batch(7)).backward()
    hyper.optimizer.step()
    hyper.optimizer.zero_grad()


def load_optimizer(hyper, scale):
    model = network(5)
    optimizer = ADAM(model.parameters())
    mse(model, batch(7)).backward()
    optimizer.step()
    hyper.optimizer.load_state_dict(optimizer.state_dict())


def set_optimizer_state_in_place(hyper, scale):
    hyper.optimizer.state[hyper.model[0].weight]["exp_avg"].zero_()


def set_tuned_tensor(hyper, scale):
    with torch.no_grad():
        scale.add_(0.1)


def set_tuned_tensor_through_data(hyper, scale):
    scale.data.add_(0.1)


AT_ONCE = [
    (set_in_place, ["parameter '0.weight'"]),
    (set_through_data, ["parameter"]),
    (set_data_anew, ["parameter '0.weight'"]),
    (load_model, ["parameter '0.weight'"]),
    (step_the_wrapped_optimizer, ["parameter '0.weight'"]),
    (load_optimizer, ["optimizer's state"]),
    (set_optimizer_state_in_place, ["optimizer's state"]),
    (set_tuned_tensor, ["'scale'"]),
]
EVERY_CHANGE = [*AT_ONCE, (set_tuned_tensor_through_data, ["'scale'"])]
REMEDIES = ["hyper step", "restart()", "Implicit"]


def scaled(method, scale=None):
    """A HyperOptimizer with a tuned tensor that scales the training targets."""
    scale = torch.ones((), dtype=torch.float64, requires_grad=True) if scale is None else scale

    def train_loss(model, batch):
        x, y = batch
        return mse(model, (x, y * scale))

    return make(train_loss=train_loss, val_loss=mse, tune=[*DECAY, ("scale", scale)], method=method), scale


@pytest.mark.parametrize(("change", "words"), AT_ONCE, ids=short)
@pytest.mark.parametrize("method", REPLAYING, ids=str)
def test_a_change_in_the_middle_of_a_window_is_found_at_once(change, words, method):
    hyper, scale = scaled(method)
    for seed in range(2):
        hyper.step(batch(seed))
    change(hyper, scale)
    for call in (hyper.step, hyper.hypergradient, hyper.hyper_step):
        with unchanged(hyper), refused(TrajectoryError, "step 3", *words, *REMEDIES):
            call(batch(9))


@pytest.mark.parametrize("num_steps_after", [0, 2])
@pytest.mark.parametrize("method", REPLAYING, ids=str)
def test_a_change_of_a_tuned_tensor_without_a_trace_is_found_at_the_hyper_step(num_steps_after, method):
    hyper, scale = scaled(method)
    for seed in range(2):
        hyper.step(batch(seed))
    set_tuned_tensor_through_data(hyper, scale)
    for seed in range(num_steps_after):
        hyper.step(batch(2 + seed))
    for call in (hyper.hypergradient, hyper.hyper_step):
        with unchanged(hyper), refused(TrajectoryError, "'scale'", *REMEDIES):
            call(batch(9))


@pytest.mark.parametrize(("change", "words"), EVERY_CHANGE, ids=short)
def test_restart_recovers_from_a_change(change, words):
    """The run after it is what it would have been, with the tuned tensor as the change left it."""
    hyper, scale = scaled(Unrolled())
    for seed in range(2):
        hyper.step(batch(seed))
    change(hyper, scale)
    hyper.restart()
    untouched, _ = scaled(Unrolled(), scale.detach().clone().requires_grad_())
    runs = []
    for h in (hyper, untouched):
        torch.manual_seed(3)
        losses = [h.step(batch(seed)) for seed in range(2)]
        runs.append(frozen_bytes([losses, h.hypergradient(batch(9))]))
    assert runs[0] == runs[1]


@pytest.mark.parametrize(("change", "words"), EVERY_CHANGE, ids=short)
@pytest.mark.parametrize("method", REPLAYING, ids=str)
def test_between_two_windows_everything_may_be_changed(change, words, method):
    hyper, scale = scaled(method)
    hyper.step(batch(0))
    hyper.hyper_step(batch(9))
    change(hyper, scale)
    torch.manual_seed(3)
    hyper.step(batch(1))
    hyper.step(batch(2))
    found = hyper.hypergradient(batch(9))
    assert all(h.isfinite().all() for h in found.values())


@pytest.mark.parametrize(("change", "words"), EVERY_CHANGE, ids=short)
def test_implicit_goes_on_from_changed_weights(change, words):
    """Its hypergradient is that at the weights as they are, bitwise as if they had never been others."""
    hyper, scale = scaled(Implicit(Identity(0.5), num_batches=2))
    for seed in range(2):
        hyper.step(batch(seed))
    change(hyper, scale)
    hyper.step(batch(3))
    change(hyper, scale)
    checkpoint = copy.deepcopy(hyper.state_dict())
    decay = -0.5 * sum((g * p).sum() for g, p in zip(validation_gradients(hyper), hyper.model.parameters()))
    found = hyper.hypergradient(batch(9))
    torch.testing.assert_close(found["weight_decay/group0"], decay, rtol=1e-10, atol=0.0)
    assert hyper.hyper_step(batch(9)).hypergradient_norm > 0

    fresh, _ = scaled(Implicit(Identity(0.5), num_batches=2))
    fresh.load_state_dict(checkpoint)
    assert frozen_bytes(fresh.hypergradient(batch(9))) == frozen_bytes(found)


def validation_gradients(hyper):
    """By plain autograd, on a copy of the model and with the same dropout masks."""
    model = copy.deepcopy(hyper.model)
    with torch.random.fork_rng():
        return torch.autograd.grad(mse(model, batch(9)), list(model.parameters()))


@pytest.mark.parametrize("method", [Unrolled(), Unrolled(max_snapshots=2), Implicit(Identity(0.1), num_batches=4)], ids=str)
def test_a_batch_changed_in_place_before_its_replay(method):
    hyper = make(tune=DECAY, method=method)
    batches = [batch(seed) for seed in range(4)]
    for b in batches:
        hyper.step(b)
    batches[2][0].add_(1.0)
    for call in (hyper.hypergradient, hyper.hyper_step):
        with unchanged(hyper), refused(TrajectoryError, "step 3", "changed in place", "clone"):
            call(batch(9))


def test_forward_mode_needs_no_batch_again():
    hyper, other = (make(method=ForwardMode()) for _ in range(2))
    for h in (hyper, other):
        torch.manual_seed(1)
        b = batch(0)
        h.step(b)
        if h is hyper:
            b[0].zero_()
    assert frozen_bytes(hyper.hypergradient(batch(9))) == frozen_bytes(other.hypergradient(batch(9)))


# ---- hyper steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", EVERY_METHOD, ids=str)
@pytest.mark.parametrize("begin", ["new", "after a hyper step", "after restart"])
def test_nothing_recorded(method, begin):
    hyper = make(tune=DECAY, method=method)
    if begin != "new":
        hyper.step(batch(0))
        hyper.hyper_step(batch(9)) if begin == "after a hyper step" else hyper.restart()
    for call in (hyper.hypergradient, hyper.hyper_step):
        with unchanged(hyper), refused(TrajectoryError, "no training steps", "step(batch) first"):
            call(batch(9))


@pytest.mark.parametrize("method", [*REPLAYING, Implicit(Identity(0.1), num_batches=4)], ids=str)
@pytest.mark.parametrize("bad", [INFINITY, NAN])
@pytest.mark.parametrize("when", [0, 1, 2])
def test_a_training_loss_that_is_not_finite(method, bad, when):
    hyper = trained(num_steps=0, method=method)
    for t in range(3):
        x, y = batch(t)
        hyper.step((x, y + bad) if t == when else (x, y))
    for call in (hyper.hypergradient, hyper.hyper_step):
        # The first of the three is step 2: one was taken before.
        with unchanged(hyper), refused(NonFiniteError, f"training step {when + 2}", str(bad), "learning rate", "restart()"):
            call(batch(9))


@pytest.mark.parametrize("method", EVERY_METHOD, ids=str)
@pytest.mark.parametrize("bad", [INFINITY, NAN])
def test_a_validation_loss_that_is_not_finite(method, bad):
    hyper = trained(method=method)
    x, y = batch(9)
    for call in (hyper.hypergradient, hyper.hyper_step):
        with unchanged(hyper), refused(NonFiniteError, "validation loss", str(bad), "learning rate", "validation batch"):
            call((x, y + bad))


@pytest.mark.parametrize("method", REPLAYING, ids=str)
def test_a_hypergradient_that_is_not_finite(method):
    """|w|^1.5 has the derivative 0 and an infinite second derivative at 0: every loss is finite."""

    def train_loss(model, batch):
        return model.w.abs().pow(1.5).sum()

    hyper = make(
        Point(0.0, 1.0),
        partial(torch.optim.SGD, lr=0.1),
        train_loss,
        method=method,
        val_loss=lambda model, batch: model.w.sum(),
    )
    for _ in range(3):
        hyper.step(None)
    for call in (hyper.hypergradient, hyper.hyper_step):
        with unchanged(hyper), refused(NonFiniteError, "lr/group0", "not finite", "truncation"):
            call(None)


class OnlyOnce(torch.autograd.Function):
    """The square, whose backward pass autograd takes for a constant: silently, where it starts from one."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def once_at_the_end(model, batch):
    x, y = batch
    return OnlyOnce.apply(model(x) - y).mean()


def once_in_the_middle(model, batch):
    x, y = batch
    return (OnlyOnce.apply(model(x)) - y).square().mean()


@pytest.mark.parametrize("train_loss", [once_at_the_end, once_in_the_middle])
@pytest.mark.parametrize("method", [Unrolled(), Unrolled(max_snapshots=2), Implicit(CG())], ids=str)
def test_a_function_that_cannot_be_differentiated_twice(method, train_loss):
    hyper = make(train_loss=train_loss, tune=DECAY, method=method)
    for seed in range(2):
        hyper.step(batch(seed))
    for call in (hyper.hypergradient, hyper.hyper_step):
        with unchanged(hyper), refused(NotTwiceDifferentiableError, "once_differentiable", "differentiable operations"):
            call(batch(9))


@pytest.mark.parametrize("train_loss", [once_at_the_end, once_in_the_middle])
def test_forward_mode_finds_at_the_first_step_what_cannot_be_differentiated_twice(train_loss):
    hyper = make(train_loss=train_loss, method=ForwardMode())
    with unchanged(hyper), refused(NotTwiceDifferentiableError, "once_differentiable", "differentiable operations"):
        hyper.step(batch(0))


def test_a_compiled_loss_is_found_at_the_hyper_step():
    torch.compiler.reset()
    squares = torch.compile(lambda w: w.square().sum(), backend="aot_eager")
    hyper = make(Point(1.0, 2.0), partial(torch.optim.SGD, lr=0.1), lambda model, batch: squares(model.w))
    hyper.step(None)
    hyper.step(None)
    with unchanged(hyper), refused(NotTwiceDifferentiableError, "double backward", "before torch.compile"):
        hyper.hyper_step(None)


# Training losses whose Hessian is diag(1, -1), diag(3, 1) and 0.
INDEFINITE = torch.tensor([1.0, -1.0], dtype=torch.float64)
STEEP = torch.tensor([3.0, 1.0], dtype=torch.float64)
FLAT = torch.zeros(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("solver", "curvature", "words"),
    [
        (Neumann(12, scale=0.5), INDEFINITE, ["Neumann diverged", "12 terms", "scale 0.5", "(0, 4)", "damping"]),
        (Neumann(12), INDEFINITE, ["Neumann diverged", "12 terms", "damping"]),
        (Neumann(12, scale=1.0), STEEP, ["Neumann diverged", "12 terms", "scale 1", "(0, 2)", "lower", "scale=None"]),
        (Neumann(1100, scale=1.0), STEEP, ["Neumann diverged", "1100 terms", "scale=None"]),
        (Neumann(12), FLAT, ["Neumann", "damping"]),
        (CG(), INDEFINITE, ["CG", "curvature -0.6", "iteration 1", "damping", "above 0.6"]),
        (CG(damping=0.1), INDEFINITE, ["CG", "curvature -0.5", "damping", "above 0.6"]),
        (CG(), FLAT, ["CG", "curvature 0", "damping"]),
        (Cholesky(), INDEFINITE, ["Cholesky", "2 x 2", "eigenvalue is -1", "damping", "above 1"]),
        (Cholesky(damping=0.5), INDEFINITE, ["Cholesky", "eigenvalue is -0.5", "damping", "above 1"]),
        (Cholesky(), FLAT, ["Cholesky", "eigenvalue is 0", "damping"]),
    ],
    ids=short,
)
def test_a_linear_system_that_cannot_be_solved(solver, curvature, words):
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    hyper = make(
        Point(0.5, 0.5),
        partial(torch.optim.SGD, lr=0.1),
        lambda model, batch: (curvature * model.w.square()).sum() / 2 - shift @ model.w,
        tune=[("shift", shift)],
        method=Implicit(solver),
        val_loss=lambda model, batch: model.w @ torch.tensor([1.0, 2.0], dtype=torch.float64),
    )
    hyper.step(None)
    for call in (hyper.hypergradient, hyper.hyper_step):
        with unchanged(hyper), refused(SolverError, *words):
            call(None)


def test_a_training_loss_without_an_optimum():
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    hyper = make(
        Point(0.5, 0.5),
        partial(torch.optim.SGD, lr=0.1),
        lambda model, batch: model.w.sum(),
        tune=[("shift", shift)],
        method=Implicit(CG()),
        val_loss=lambda model, batch: model.w.square().sum(),
    )
    hyper.step(None)
    with unchanged(hyper), refused(SolverError, "linear", "no optimum", "weight decay", "Unrolled()"):
        hyper.hyper_step(None)


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lr/group1": torch.tensor(0.1)}, ["'lr/group1'", "lr/group0"]),
        ({"lr": torch.tensor(0.1)}, ["'lr'", "lr/group0"]),
        ({"lr/group0": torch.tensor(0.1), "weight_decay/0.bias": torch.ones(3)}, ["'weight_decay/0.bias'", "(4,)", "(3,)"]),
        ({"weight_decay/0.bias": torch.ones(4), "lr/group0": torch.tensor(-0.1)}, ["lr/group0", "-0.1", "log"]),
        ({"lr/group0": torch.tensor(0.0)}, ["lr/group0", "0", "log"]),
        ({"lr/group0": torch.tensor(NAN)}, ["lr/group0", "finite", "nan"]),
        ({"weight_decay/0.bias": torch.full((4,), INFINITY)}, ["weight_decay/0.bias", "finite", "inf"]),
        ({"weight_decay/0.bias": torch.tensor([0.1, 0.1, 0.1, 7.0])}, ["weight_decay/0.bias", "7", "5"]),
        ({"weight_decay/0.bias": torch.tensor([0.1, 0.1, 0.1, -1.0])}, ["weight_decay/0.bias", "-1", "0"]),
    ],
    ids=short,
)
def test_set_values_refuses(values, words):
    hyper = make(tune=[Hyperparameter("lr", log=True), Hyperparameter("weight_decay", per="element", high=5.0)])
    with unchanged(hyper), refused(ValueError, *words):
        hyper.set_values(values)


@pytest.mark.parametrize("method", REPLAYING, ids=str)
def test_set_values_in_the_middle_of_a_window(method):
    hyper = make(method=method)
    hyper.step(batch(0))
    with unchanged(hyper), refused(TrajectoryError, "hyperparameter", "window", "hyper step", "restart()"):
        hyper.set_values({"lr/group0": torch.tensor(0.1)})


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def two_groups(model, *, sizes):
    """An optimizer whose groups hold the parameters in order, so many each."""
    parameters = iter(list(model.parameters()))
    return ADAM([{"params": [next(parameters) for _ in range(size)]} for size in sizes])


ELEMENT = (Hyperparameter("weight_decay", per="element"),)
TWO = (Hyperparameter("lr"), Hyperparameter("weight_decay"))


@pytest.mark.parametrize(
    ("saved", "loaded", "words"),
    [
        ({"model": partial(network, width=5)}, {}, ["another model", "'0.weight'", "[5, 3]", "[4, 3]"]),
        (
            {"model": lambda: nn.Sequential(network()), "tune": LR},
            {"tune": LR},
            ["another model", "'0.0.weight'", "none"],
        ),
        ({"tune": DECAY}, {"tune": LR}, ["another hyperparameter", "'weight_decay/group0'", "none"]),
        ({"tune": ELEMENT}, {"tune": DECAY}, ["another hyperparameter", "'weight_decay/0.weight'"]),
        ({"tune": TWO}, {"tune": TWO[::-1]}, ["another hyperparameter", "order"]),
        (
            {"tune": [Hyperparameter("lr", log=True)]},
            {"tune": LR},
            ["another hyperparameter", "lr", "log"],
        ),
        ({"tune": [Hyperparameter("lr", init=0.5)]}, {"tune": [Hyperparameter("lr", high=0.1)]}, ["lr", "0.1"]),
        ({"optimizer": partial(torch.optim.AdamW, lr=0.1)}, {}, ["another optimizer", "AdamW", "Adam"]),
        ({"method": ForwardMode()}, {}, ["another method", "ForwardMode()", "Unrolled("]),
        ({"method": Unrolled(truncation=2)}, {}, ["another method", "truncation=2", "truncation=None"]),
        ({"hyper_optimizer": partial(torch.optim.Adam, lr=0.1)}, {}, ["another", "hyper", "Adam", "SGD"]),
        (
            {"optimizer": lambda p, model: two_groups(model, sizes=[6]), "tune": ELEMENT},
            {"optimizer": lambda p, model: two_groups(model, sizes=[2, 4]), "tune": ELEMENT},
            ["another", "group"],
        ),
        (
            {"model": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)).double()},
            {"model": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()},
            ["another model", "running_mean"],
        ),
    ],
    ids=short,
)
def test_a_checkpoint_of_another_run(saved, loaded, words):
    def made(model=network, optimizer=None, **options):
        model = model()
        chosen = ADAM if optimizer is None else optimizer
        if optimizer is not None and not isinstance(optimizer, partial):
            chosen = lambda p: optimizer(p, model)  # noqa: E731
        return make(model, chosen, **options)

    checkpoint = made(**saved)
    checkpoint.step(batch(0))
    hyper = made(**loaded)
    hyper.step(batch(1))
    with unchanged(hyper), refused(ValueError, *words):
        hyper.load_state_dict(checkpoint.state_dict())
    hyper.step(batch(2))
    assert hyper.hyper_step(batch(9)).hypergradient_norm > 0


@pytest.mark.parametrize(
    "checkpoint",
    [
        {},
        {"epoch": 3, 0: "mixed keys"},
        network().state_dict(),
        ADAM(network().parameters()).state_dict(),
        None,
        [1, 2],
        "run.pt",
    ],
    ids=["empty", "other", "model", "optimizer", "None", "list", "path"],
)
def test_what_is_no_checkpoint(checkpoint):
    hyper = trained()
    kind = ValueError if isinstance(checkpoint, dict) else TypeError
    with unchanged(hyper), refused(kind, "no checkpoint of a HyperOptimizer", "hyper.state_dict()"):
        hyper.load_state_dict(checkpoint)
    assert hyper.hyper_step(batch(9)).hypergradient_norm > 0


def test_a_checkpoint_that_lost_a_part():
    hyper = trained()
    for key in hyper.state_dict():
        part = {k: v for k, v in copy.deepcopy(hyper.state_dict()).items() if k != key}
        with unchanged(hyper), refused(ValueError, "checkpoint"):
            hyper.load_state_dict(part)
