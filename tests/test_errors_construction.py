"""Bad options and arguments are refused when they are given, with what came,
what was expected and what to do."""

from functools import partial

import pytest
import torch
from torch import nn

from refusals import ADAM, DECAY, HYPER_SGD, INFINITY, LR, NAN, make, mse, network, refused, short
from torch_hypergrad import (
    CG,
    Cholesky,
    HyperOptimizer,
    Hyperparameter,
    Identity,
    Implicit,
    Neumann,
    Nystrom,
    Unrolled,
)

# ---- options -----------------------------------------------------------------------------------------------


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
        (
            lambda: Unrolled(truncation=5, max_snapshots=1),
            ValueError,
            ["max_snapshots=1", "truncation", "max_snapshots=2"],
        ),
        (lambda: Unrolled(offload="disk"), ValueError, ["offload", "'disk'", "'cpu'"]),
        (lambda: Unrolled(offload=True), ValueError, ["offload", "True", "'cpu'"]),
        (lambda: Unrolled(memory=-1), ValueError, ["memory", "-1", "at least 0", "bytes"]),
        (lambda: Unrolled(memory=1.5), ValueError, ["memory", "1.5", "at most 1"]),
        (lambda: Unrolled(memory=float("nan")), ValueError, ["memory", "nan"]),
        (lambda: Unrolled(memory="1GB"), TypeError, ["memory", "'1GB'", "int", "float"]),
        (lambda: Unrolled(memory=True), TypeError, ["memory", "True"]),
        (
            lambda: Unrolled(memory=0.5, max_graphs=3),
            ValueError,
            ["memory=0.5", "max_graphs=3", "one of them"],
        ),
        (
            lambda: Unrolled(memory=1000, second_order="forward"),
            ValueError,
            ["memory=1000", "second_order='forward'", "Leave memory=1000 out"],
        ),
        (lambda: Unrolled(memory=0.1, offload="cpu"), ValueError, ["memory=0.1", "offload='cpu'"]),
        (lambda: Unrolled(max_graphs=0), ValueError, ["max_graphs", "0", "at least 1"]),
        (lambda: Unrolled(max_graphs=True), TypeError, ["max_graphs", "int", "True"]),
        (
            lambda: Unrolled(max_graphs=2, offload="cpu"),
            ValueError,
            ["max_graphs=2", "offload='cpu'", "Leave"],
        ),
        (
            lambda: Unrolled(max_graphs=2, second_order="forward"),
            ValueError,
            ["max_graphs=2", "'forward'", "'reverse'"],
        ),
        (
            lambda: Unrolled(second_order="exact"),
            ValueError,
            ["second_order", "'exact'", "'reverse'", "'finite_difference'"],
        ),
        (lambda: Unrolled(second_order=None), ValueError, ["second_order", "None"]),
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
        (lambda: Nystrom(0), ValueError, ["rank", "0", "at least 1"]),
        (lambda: Nystrom(2.0), TypeError, ["rank", "int", "2.0"]),
        (lambda: Nystrom(damping=-1.0), ValueError, ["damping", "at least 0", "-1"]),
        (lambda: Nystrom(max_steps=-1), ValueError, ["max_steps", "-1"]),
        (lambda: Nystrom(max_steps=False), TypeError, ["max_steps", "False"]),
        (lambda: Nystrom(max_steps=0), ValueError, ["max_steps=0", "damping above 0", "got 0"]),
        (lambda: Nystrom(rtol="small"), TypeError, ["rtol", "'small'"]),
        (
            lambda: Implicit(CG(), curvature="fisher"),
            ValueError,
            ["curvature", "'hessian' or 'gauss_newton'", "'fisher'"],
        ),
        (
            lambda: Implicit(CG(), preconditioner="adam"),
            ValueError,
            ["preconditioner", "'second_moments'", "'adam'"],
        ),
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


# ---- construction ------------------------------------------------------------------------------------------


def not_an_optimizer_of_the_leaves(leaves):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        (
            {"tune": [Hyperparameter("weight_deacy")]},
            ValueError,
            ["'weight_deacy'", "Did you mean 'weight_decay'", "lr"],
        ),
        ({"tune": [Hyperparameter("momentum")]}, ValueError, ["'momentum'", "lr", "betas.0", "weight_decay"]),
        ({"tune": [Hyperparameter("params")]}, ValueError, ["'params'", "lr"]),
        ({"tune": [Hyperparameter("amsgrad")]}, ValueError, ["'amsgrad'", "continuous", "lr"]),
        ({"tune": [Hyperparameter("foreach")]}, ValueError, ["'foreach'", "continuous", "lr"]),
        ({"tune": [Hyperparameter("betas")]}, ValueError, ["'betas'", "betas.0", "pair"]),
        ({"tune": [Hyperparameter("betas.2")]}, ValueError, ["'betas.2'", "betas.1"]),
        (
            {"tune": [Hyperparameter("lr"), Hyperparameter("lr", per="tensor")]},
            ValueError,
            ["2 entries", "'lr'", "one"],
        ),
        ({"tune": [Hyperparameter("lr", low=0.2)]}, ValueError, ["'lr'", "0.01", "0.2", "init"]),
        ({"tune": [Hyperparameter("lr", init=-0.1)]}, ValueError, ["'lr'", "-0.1", "low"]),
        ({"tune": [Hyperparameter("betas.1", init=1.0)]}, ValueError, ["'betas.1'", "1", "bounds"]),
        ({"tune": [Hyperparameter("eps", high=1e-9)]}, ValueError, ["'eps'", "1e-08", "1e-09"]),
        (
            {"tune": [Hyperparameter("lr", init=torch.ones(3))]},
            ValueError,
            ["3 entries", "1 values", "order"],
        ),
        (
            {"tune": [Hyperparameter("lr", per="tensor", init=torch.ones(4))]},
            ValueError,
            ["4 entries", "6 values"],
        ),
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
        (
            {"tune": [("noise", torch.zeros(2))], "val_loss": mse},
            ValueError,
            ["'noise'", "requires_grad=False"],
        ),
        (
            {"tune": [("noise", torch.zeros(2, dtype=torch.int64))], "val_loss": mse},
            ValueError,
            ["'noise'", "int64"],
        ),
        (
            {
                "tune": [("a", torch.zeros(2, requires_grad=True)), ("a", torch.ones(2, requires_grad=True))],
                "val_loss": mse,
            },
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
        (
            {"hyper_optimizer": partial(torch.optim.LBFGS, lr=0.1)},
            ValueError,
            ["hyper_optimizer", "LBFGS", "closure"],
        ),
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


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")
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


def test_the_method_is_known_and_cannot_be_exchanged():
    """Steps are recorded for the one that it was made with."""
    method = Implicit(CG())
    hyper = make(tune=DECAY, method=method)
    assert hyper.method is method
    with pytest.raises(AttributeError, match="method"):
        hyper.method = Unrolled()
