"""Folds tuned together, against closed forms, finite differences of plain training, and torch's own
optimizers."""

from __future__ import annotations

import copy
import io
import re
from functools import partial
from itertools import pairwise

import pytest
import scipy.optimize
import torch
from sklearn.model_selection import KFold
from torch import Tensor, nn

from problems import FROZEN, REPLAY, Ridge, mse, random_batch, tanh_mlp
from torch_hypergrad import (
    CG,
    AdaptiveStep,
    Cholesky,
    ForwardMode,
    HyperOptimizer,
    Hyperparameter,
    Identity,
    Implicit,
    NonFiniteError,
    TrajectoryError,
    Unrolled,
)
from torch_hypergrad.bilevel import CrossValidation, fit, minimize, stratified_folds
from torch_hypergrad.testing import derivative

NUM_FOLDS, WIDTH, DIRECT = 3, 6, 0.05
FOLDS = [Ridge.make(WIDTH, seed=10 * number) for number in range(NUM_FOLDS)]
TRAIN, VAL = [one.train for one in FOLDS], [one.val for one in FOLDS]
START = torch.linspace(0.2, 0.9, WIDTH, dtype=torch.float64)
ADAM = partial(torch.optim.Adam, lr=0.1)
GROUP = "weight_decay/group0"
METHODS = [Unrolled(), REPLAY, Unrolled(max_graphs=1), Implicit(Cholesky())]


# ---- references --------------------------------------------------------------------------------------------


def closed_form(decays: Tensor) -> tuple[float, Tensor]:
    """Mean validation loss at the optima and its derivative in one decay for each feature."""
    at = [Ridge(one.train, one.val, decays) for one in FOLDS]
    losses = [(one.val[0] @ one.optimum() - one.val[1][:, 0]).square().mean() / 2 for one in at]
    gradients = torch.stack([one.hypergradient() for one in at])
    return float(torch.stack(losses).mean()), gradients.mean(0)


def shared_loss(decays: Tensor, share: float = 0.5):
    """Half of the mean squared error and a decay of the loss's own."""
    return lambda model, batch: mse(model, batch) / 2 + share * (decays * model.weight[0].square()).sum()


def plain_mean_loss(scale: Tensor, weight_decay: float, num_steps: int = 4) -> float:
    """Of networks trained by torch alone, whose losses, also those of validation, read ``scale``."""
    losses = []
    for number in range(NUM_FOLDS):
        model = tanh_mlp(number)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=weight_decay)
        for batch in batches_of_networks(number, num_steps):
            optimizer.zero_grad()
            scaled_loss(scale)(model, batch).backward()
            optimizer.step()
        losses.append(scaled_loss(scale)(model, random_batch(9, 4, 50 + number)).item())
    return sum(losses) / NUM_FOLDS


# ---- folds -------------------------------------------------------------------------------------------------


def ridge_folds(make_tune, method=None, hyper_optimizer=ADAM, loss=Ridge.loss, **options) -> CrossValidation:
    """Folds on ridge regression, at weights 1, with the tuned values that ``make_tune`` writes down."""
    return CrossValidation([ridge_fold(make_tune(), method, loss, **options) for _ in FOLDS], hyper_optimizer)


def ridge_fold(tune, method=None, loss=Ridge.loss, **options) -> HyperOptimizer:
    model = nn.Linear(WIDTH, 1, bias=False).double()
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    return HyperOptimizer(model, optimizer, loss, tune, method or Implicit(Cholesky()), FROZEN, **options)


def decay_of(per="group", init=0.5, **options):
    return lambda: [Hyperparameter("weight_decay", per=per, init=init, **options)]


def shared_folds(method=None, hyper_optimizer=ADAM, log=True) -> tuple[CrossValidation, Tensor]:
    """Folds whose training losses read one tensor, and their validation losses too."""
    decays = START.clone().requires_grad_()

    def val_loss(model: nn.Module, batch) -> Tensor:
        return Ridge.loss(model, batch) + DIRECT * decays.sum()

    def tune():
        return [Hyperparameter.of(decays, "decays", log=log)]

    loss = shared_loss(decays)
    return ridge_folds(tune, method, hyper_optimizer, loss, val_loss=val_loss), decays


def scaled_loss(scale: Tensor):
    return lambda model, batch: (scale[0] * model(batch[0]) - batch[1] * scale[1]).square().mean()


def batches_of_networks(number: int, num_steps: int = 4):
    return [random_batch(8, 4, 100 * number + step) for step in range(num_steps)]


def trained(folds: CrossValidation) -> CrossValidation:
    for fold, batch in zip(folds.folds, TRAIN):
        fit(fold, batch, tol=1e-10, method="newton")
    return folds


def leaves_of(fold: HyperOptimizer) -> list[Tensor]:
    return [tuned.leaf.detach().clone() for tuned in fold._hyperparameters.all]


def assert_shared(folds: CrossValidation) -> None:
    """The values of all folds, and what the hyper optimizer moves, are the same bit for bit."""
    for fold in folds.folds:
        for name, value in folds.values().items():
            assert torch.equal(fold.values()[name], value)
        for one, first in zip(leaves_of(fold), leaves_of(folds.folds[0])):
            assert torch.equal(one, first)


def everything(folds: CrossValidation):
    """Copies of all that a hyper step may move."""
    weights = [p.detach().clone() for fold in folds.folds for p in fold.model.parameters()]
    leaves = [leaf for fold in folds.folds for leaf in leaves_of(fold)]
    values = [value for fold in folds.folds for value in fold.values().values()]
    states = [fold.optimizer.state_dict() for fold in folds.folds] + [folds.hyper_optimizer.state_dict()]
    return copy.deepcopy((weights, leaves, values, states, torch.get_rng_state()))


def assert_same(first, second) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


# ---- loss and hypergradient --------------------------------------------------------------------------------


def test_loss_and_hypergradient_are_means_over_the_folds_at_their_optima():
    folds = trained(ridge_folds(decay_of("element", START)))
    found, (loss, gradient) = folds.evaluate(VAL), closed_form(START)
    assert found.val_loss == pytest.approx(loss, rel=1e-12)
    assert float(folds.validation_loss(VAL)) == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(found.hypergradient["weight_decay/weight"][0], gradient, rtol=1e-8, atol=1e-10)
    assert found.num_matvecs == NUM_FOLDS * WIDTH
    assert_same(folds.hypergradient(VAL), found.hypergradient)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("solver", [Cholesky(), CG(rtol=1e-12)], ids=repr)
def test_a_tensor_that_all_losses_read_has_its_direct_part_too(log, solver):
    folds, decays = shared_folds(Implicit(solver), log=log)
    found, (loss, gradient) = trained(folds).evaluate(VAL), closed_form(START)
    assert found.val_loss == pytest.approx(loss + DIRECT * START.sum().item(), rel=1e-12)
    torch.testing.assert_close(found.hypergradient["decays"], gradient + DIRECT, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(decays.detach(), START, rtol=1e-15, atol=0)


@pytest.mark.parametrize("method", [Unrolled(), REPLAY, Unrolled(max_graphs=2), ForwardMode()], ids=repr)
def test_training_steps_against_finite_differences_of_plain_training_of_all_folds(method):
    scale = torch.tensor([0.9, 1.1], dtype=torch.float64, requires_grad=True)

    def fold(number: int) -> HyperOptimizer:
        model = tanh_mlp(number)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        tune = [
            Hyperparameter("weight_decay", init=0.05, log=True),
            Hyperparameter.of(scale, "scale", log=True),
        ]
        loss = scaled_loss(scale)
        return HyperOptimizer(model, optimizer, loss, tune, method, FROZEN, val_loss=loss)

    folds = CrossValidation(list(map(fold, range(NUM_FOLDS))), FROZEN)
    for batches in zip(*map(batches_of_networks, range(NUM_FOLDS))):
        folds.step(list(batches))
    found = folds.evaluate([random_batch(9, 4, 50 + number) for number in range(NUM_FOLDS)])
    start = scale.detach().clone()
    assert found.val_loss == pytest.approx(plain_mean_loss(start, 0.05), rel=1e-12)
    reference, _ = derivative(lambda shift: plain_mean_loss(start, 0.05 + shift), 1e-3)
    assert found.hypergradient[GROUP].item() == pytest.approx(reference, rel=1e-7)
    for entry, unit in enumerate(torch.eye(2, dtype=torch.float64)):
        reference, _ = derivative(lambda h, unit=unit: plain_mean_loss(start + h * unit, 0.05), 1e-2)
        assert found.hypergradient["scale"][entry].item() == pytest.approx(reference, rel=1e-7)


# ---- moving the values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", [False, True])
def test_hyper_steps_are_those_of_the_optimizer_on_the_mean_gradient(log):
    folds, decays = shared_folds(log=log)
    leaf = (START.log() if log else START).clone().requires_grad_()
    adam = ADAM([leaf])
    for _ in range(3):
        values = leaf.detach().exp() if log else leaf.detach()
        loss, gradient = closed_form(values)
        report = trained(folds).hyper_step(VAL)
        assert report.val_loss == pytest.approx(loss + DIRECT * values.sum().item(), rel=1e-12)
        assert report.hypergradient_norm == pytest.approx(float((gradient + DIRECT).norm()), rel=1e-7)
        leaf.grad = (gradient + DIRECT) * (values if log else 1)
        adam.step()
        assert_shared(folds)
    torch.testing.assert_close(decays.detach(), leaf.exp() if log else leaf, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("log", [False, True])
def test_values_stay_the_same_in_all_folds(method, log):
    for folds in (shared_folds(method, log=log)[0], ridge_folds(decay_of(log=log), method)):
        (name,) = folds.values()
        assert_shared(folds)
        for factor in (1.0, 0.7, 1.3):
            folds.step(TRAIN)
            folds.step(TRAIN)
            folds.hyper_step(VAL)
            assert_shared(folds)
            wanted = factor * folds.values()[name]
            folds.set_values({name: wanted})
            assert_shared(folds)
            torch.testing.assert_close(folds.values()[name], wanted, rtol=1e-15, atol=0)


def test_adaptive_steps_are_those_of_the_rule_on_the_closed_form():
    adaptive = partial(AdaptiveStep, lr=200.0)  # too long
    folds, _ = shared_folds(hyper_optimizer=adaptive)
    leaf = START.log().requires_grad_()
    rule = adaptive([leaf])
    losses = []
    for _ in range(12):
        values = leaf.detach().exp()
        loss, gradient = closed_form(values)
        losses.append(loss + DIRECT * values.sum().item())
        leaf.grad = (gradient + DIRECT) * values
        rule.step(lambda: losses[-1])
        assert trained(folds).hyper_step(VAL).val_loss == pytest.approx(losses[-1], rel=1e-6)
        assert_shared(folds)
    assert folds.hyper_optimizer.param_groups[0]["lr"] == rule.param_groups[0]["lr"]
    assert any(after > before for before, after in pairwise(losses)), "a step back is among them"
    assert losses[-1] < losses[0]


def test_minimize_finds_the_optimum_of_the_mean():
    folds = ridge_folds(decay_of("element", 1.0, low=1e-3, high=1e3, log=True))
    found = minimize(folds, VAL, lambda: trained(folds), progress=False)

    def value(leaf):
        decays = torch.as_tensor(leaf).exp()
        loss, gradient = closed_form(decays)
        return loss, (gradient * decays).numpy()

    bounds = [(-6.9077552789821, 6.9077552789821)] * WIDTH
    reference = scipy.optimize.minimize(value, torch.zeros(WIDTH), jac=True, method="L-BFGS-B", bounds=bounds)
    assert found.fun == pytest.approx(reference.fun, rel=1e-6)
    assert found.evaluation.val_loss == found.fun
    assert_shared(folds)


def test_projection_and_what_is_reported():
    folds = ridge_folds(
        decay_of(init=0.5, low=0.4999, high=0.5001), hyper_optimizer=partial(torch.optim.SGD, lr=1e3)
    )
    report = trained(folds).hyper_step(VAL)
    assert report.clipped == {GROUP: 1}
    assert report.num_matvecs == NUM_FOLDS * WIDTH
    assert report.residual < 1e-12
    assert report.adjoint_growth is report.product_error is None
    assert_shared(folds)
    folds = ridge_folds(decay_of(), Unrolled(second_order="finite_difference"))
    folds.step(TRAIN)
    folds.step(TRAIN)
    singles = [fold.evaluate(batch) for fold, batch in zip(folds.folds, VAL)]
    report = folds.hyper_step(VAL)
    assert report.adjoint_growth == max(one.adjoint_growth for one in singles)
    assert report.product_error == max(one.product_error for one in singles)
    folds = ridge_folds(decay_of(), Implicit(Identity()))
    folds.record(TRAIN)
    assert folds.evaluate(VAL).residual is None


@pytest.mark.parametrize("high", [0.7, 3.0, 10.0, 1e3])
def test_values_on_a_bound_of_a_log_scale_may_be_set_and_loaded(high):
    """The exponential of a bound's logarithm may lie beyond the bound."""
    folds, other = (
        ridge_folds(decay_of(high=high, log=True), hyper_optimizer=partial(torch.optim.SGD, lr=1e6))
        for _ in range(2)
    )
    assert trained(folds).hyper_step(VAL).clipped == {GROUP: 1}
    assert folds.values()[GROUP].item() == pytest.approx(high, rel=1e-14)
    other.set_values(folds.values())
    other.load_state_dict(folds.state_dict())
    assert_shared(other)
    with pytest.raises(ValueError, match="out of the bounds"):
        other.set_values({GROUP: torch.tensor(high * (1 + 1e-9), dtype=torch.float64)})


def test_warnings_say_which_fold_they_are_about():
    folds = ridge_folds(decay_of(), Implicit(CG(max_steps=1)))
    folds.record(TRAIN)
    singles = [fold.evaluate(batch).warnings for fold, batch in zip(folds.folds, VAL)]
    expected = [f"Fold {i}: {text}" for i, texts in enumerate(singles) for text in texts]
    assert expected
    assert folds.evaluate(VAL).warnings == folds.hyper_step(VAL).warnings == expected


def test_a_tolerance_of_the_solve_is_that_of_each_fold():
    folds = ridge_folds(decay_of(), Implicit(CG(rtol=1e-10)))
    folds.record(TRAIN)
    assert folds.evaluate(VAL, rtol=0.5).num_matvecs < folds.evaluate(VAL).num_matvecs
    with pytest.raises(TypeError, match="a fixed amount of work"):
        ridge_folds(decay_of(), Implicit(Identity())).evaluate(VAL, rtol=0.1)


# ---- checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("hyper_optimizer", [ADAM, partial(AdaptiveStep, lr=0.5)], ids=["Adam", "Adaptive"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_run_goes_on_bitwise_from_the_middle_of_a_window(method, hyper_optimizer, shared):
    def make() -> CrossValidation:
        if shared:
            return shared_folds(method, hyper_optimizer)[0]
        return ridge_folds(decay_of("element", START, log=True), method, hyper_optimizer)

    def go_on(folds: CrossValidation) -> None:
        folds.step(TRAIN)
        folds.hyper_step(VAL)
        folds.step(TRAIN)
        folds.hyper_step(VAL)

    folds, other = make(), make()
    go_on(folds)
    folds.step(TRAIN)
    file = io.BytesIO()
    torch.save(folds.state_dict(), file)
    go_on(folds)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_shared(other)
    go_on(other)
    assert_same(everything(other), everything(folds))


def test_a_checkpoint_may_be_loaded_twice():
    folds, other = ridge_folds(decay_of()), ridge_folds(decay_of())
    folds.step(TRAIN)
    folds.hyper_step(VAL)
    saved = copy.deepcopy(folds.state_dict())
    ends = []
    for _ in range(2):
        other.load_state_dict(saved)
        other.step(TRAIN)
        other.hyper_step(VAL)
        ends.append(everything(other))
    assert_same(ends[0], ends[1])


def saved_by(make_tune=None, method=None, hyper_optimizer=ADAM, num=NUM_FOLDS) -> dict:
    tune = make_tune or decay_of()
    folds = CrossValidation([ridge_fold(tune(), method) for _ in range(num)], hyper_optimizer)
    return folds.state_dict()


def broken() -> dict:
    """The last fold is another one."""
    saved = saved_by()
    return {**saved, "folds": [*saved["folds"][:-1], saved_by(decay_of("tensor"))["folds"][0]]}


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: [1], TypeError, r"no checkpoint of a CrossValidation.*got '\[1\]'|got \[1\]"),
        (lambda: saved_by()["folds"][0], ValueError, r"no checkpoint of a CrossValidation.*'fingerprint'"),
        (lambda: saved_by(num=2), ValueError, r"has 2 folds tuned by Adam.*this CrossValidation has 3"),
        (lambda: saved_by(hyper_optimizer=torch.optim.SGD), ValueError, r"tuned by SGD.*tuned by Adam"),
        (lambda: saved_by(method=Unrolled()), ValueError, "another method"),
        (broken, ValueError, "another hyperparameter"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(make, error, words):
    folds, saved = ridge_folds(decay_of()), make()
    folds.step(TRAIN)
    before = everything(folds)
    with pytest.raises(error, match=words):
        folds.load_state_dict(saved)
    assert_same(everything(folds), before)
    folds.hyper_step(VAL)  # the recording is still there


# ---- a fold that fails -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("shared", [False, True])
def test_a_fold_that_fails_leaves_everything_as_it_was(method, shared):
    def make() -> CrossValidation:
        folds = shared_folds(method)[0] if shared else ridge_folds(decay_of(log=True), method)
        folds.step(TRAIN)
        folds.hyper_step(VAL)
        folds.step(TRAIN)
        return folds

    folds, undisturbed = make(), make()
    before = everything(folds)
    bad = [VAL[0], VAL[1], (VAL[2][0], torch.full_like(VAL[2][1], torch.nan))]
    for call in (folds.evaluate, folds.hypergradient, folds.hyper_step):
        with pytest.raises(NonFiniteError, match=r"Fold 2: The validation loss is nan"):
            call(bad)
        assert_same(everything(folds), before)
    for run in (folds, undisturbed):
        run.step(TRAIN)
        run.hyper_step(VAL)
    assert_same(everything(folds), everything(undisturbed))


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("log", [False, True])
def test_a_hyper_optimizer_that_fails_leaves_everything_as_it_was(method, shared, log):
    folds = shared_folds(method, log=log)[0] if shared else ridge_folds(decay_of(log=log), method)
    folds.step(TRAIN)
    folds.step(TRAIN)
    before, gradient = everything(folds), folds.hypergradient(VAL)
    folds.hyper_optimizer.param_groups[0]["lr"] = torch.inf
    with pytest.raises(NonFiniteError, match="The hyper step moved"):
        folds.hyper_step(VAL)
    folds.hyper_optimizer.param_groups[0]["lr"] = 0.1
    assert_same(everything(folds), before)
    assert_same(folds.hypergradient(VAL), gradient)
    folds.step(TRAIN)
    folds.hyper_step(VAL)
    assert_shared(folds)


def test_values_in_the_middle_of_the_window_of_one_fold_are_refused_for_all():
    for folds in (ridge_folds(decay_of(log=True), Unrolled()), shared_folds(Unrolled())[0]):
        folds.folds[2].step(TRAIN[2])
        before = everything(folds)
        (name,) = folds.values()
        with pytest.raises(TrajectoryError, match=r"Fold 2: set_values .* middle of a recorded window"):
            folds.set_values({name: 2 * folds.values()[name]})
        assert_same(everything(folds), before)
        folds.folds[2].step(TRAIN[2])
        with pytest.raises(ValueError, match="No hyperparameter is named 'decay'"):
            folds.set_values({"decay": 1.0})


def test_a_training_step_that_fails_says_which_fold_it_is_of():
    def loss(model: nn.Module, batch) -> Tensor:
        return Ridge.loss(model, batch).detach() if batch is TRAIN[1] else Ridge.loss(model, batch)

    folds = ridge_folds(decay_of(), loss=loss)
    with pytest.raises(Exception, match="graph"):
        folds.step(TRAIN)
    with pytest.raises(TrajectoryError, match="Fold 0: There are no training steps to differentiate"):
        ridge_folds(decay_of()).evaluate(VAL)


def test_restart_and_begin_window():
    folds = ridge_folds(decay_of(), Unrolled())
    start = [fold.model.weight.detach().clone() for fold in folds.folds]
    folds.step(TRAIN)
    folds.begin_window()
    with pytest.raises(TrajectoryError, match="Fold 0: There are no training steps"):
        folds.evaluate(VAL)
    folds.restart()
    assert_same([fold.model.weight.detach() for fold in folds.folds], start)


class Counting(nn.Linear):
    """Counts its calls in a buffer that no rule knows of."""

    def __init__(self, name: str) -> None:
        super().__init__(WIDTH, 1, bias=False, dtype=torch.float64)
        self.counter = name
        self.register_buffer(name, torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer(self.counter).add_(1)
        return super().forward(x)


def test_buffers_that_were_taken_for_constants_are_those_of_all_folds():
    models = [Counting("calls"), Counting("calls"), Counting("count")]
    folds = CrossValidation(
        [
            HyperOptimizer(m, torch.optim.SGD(m.parameters(), lr=0.1), mse, decay_of()(), Unrolled(), FROZEN)
            for m in models
        ],
        FROZEN,
    )
    folds.step(TRAIN)
    assert folds.hyper_step(VAL).constants == ["calls", "count"]


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [TRAIN[:2], [*TRAIN, TRAIN[0]], TRAIN[0][0], None, iter(TRAIN)])
def test_another_number_of_batches_is_refused(batches):
    folds = ridge_folds(decay_of())
    folds.step(TRAIN)
    before = everything(folds)
    for call in (folds.step, folds.record, folds.evaluate, folds.hyper_step, folds.validation_loss):
        with pytest.raises(
            ValueError, match=r"takes a list of 3 \w+ batches, one for each fold; got (a )?\w"
        ):
            call(batches)
    assert_same(everything(folds), before)


def other_folds(second) -> CrossValidation:
    return CrossValidation([ridge_fold(decay_of()()), second], ADAM)


def tuning(*tensors: Tensor, **options) -> HyperOptimizer:
    loss = shared_loss(tensors[0])
    tune = [Hyperparameter.of(tensor, f"t{i}", **options) for i, tensor in enumerate(tensors)]
    return ridge_fold(tune, loss=loss, val_loss=Ridge.loss)


def with_bias() -> HyperOptimizer:
    model = nn.Linear(WIDTH, 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return HyperOptimizer(model, optimizer, mse, decay_of()(), Implicit(Cholesky()), FROZEN)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ridge_fold(decay_of(init=0.6)()), f"Fold 1 .*begins with other values of '{GROUP}'"),
        (lambda: ridge_fold(decay_of(log=True)()), f"'{GROUP}' has Scale.*log=True.*in fold 0"),
        (lambda: ridge_fold(decay_of(high=2.0)()), f"'{GROUP}' has Scale.*high=2.0.*in fold 0"),
        (lambda: ridge_fold(decay_of("tensor")()), f"it tunes weight_decay/weight, and fold 0 {GROUP}"),
        (with_bias, "its model has the parameters weight, bias, and that of fold 0 weight"),
    ],
)
def test_folds_that_do_not_belong_together_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        other_folds(make())


def test_folds_that_tune_in_another_order_or_unit_are_refused():
    one, other = (torch.ones(WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2))
    first = [Hyperparameter.of(one, "one"), Hyperparameter.of(other, "other")]
    folds = [
        ridge_fold(tune, loss=shared_loss(one * 1), val_loss=Ridge.loss) for tune in (first, first[::-1])
    ]
    with pytest.raises(ValueError, match=r"Fold 1 .*tunes other, one, and fold 0 one, other, in this order"):
        CrossValidation(folds, ADAM)
    labels = {"weight": torch.arange(WIDTH) % 2}
    tunes = [
        Hyperparameter("weight_decay", per="label", labels=labels, init=0.1),
        Hyperparameter("weight_decay", per="step", num_steps=2, init=0.1),
    ]
    with pytest.raises(ValueError, match=f"'{GROUP}' is tuned per step, and per label in fold 0"):
        CrossValidation([ridge_fold(tune, Unrolled()) for tune in tunes], ADAM)
    shapes = [torch.ones(size, dtype=torch.float64, requires_grad=True) for size in (WIDTH, 1)]
    with pytest.raises(ValueError, match=r"'t0' has shape \(1,\), and \(6,\) in fold 0"):
        CrossValidation([tuning(tensor) for tensor in shapes], ADAM)


def test_folds_that_train_the_same_weights_are_refused():
    fold = ridge_fold(decay_of()())
    with pytest.raises(ValueError, match="Fold 1 trains a parameter of fold 0"):
        CrossValidation([fold, fold], ADAM)
    wrapper = nn.Module()
    wrapper.weight = fold.model.weight
    wrapper.forward = fold.model.forward
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
    second = HyperOptimizer(wrapper, optimizer, Ridge.loss, decay_of()(), Implicit(Cholesky()), FROZEN)
    with pytest.raises(ValueError, match=r"Fold 1 trains a parameter of fold 0.*copy\.deepcopy"):
        CrossValidation([fold, second], ADAM)


def test_too_few_folds_and_what_is_no_fold_are_refused():
    with pytest.raises(ValueError, match="takes two folds or more, got 1"):
        CrossValidation([ridge_fold(decay_of()())], ADAM)
    with pytest.raises(TypeError, match=r"takes a list of HyperOptimizers, got Linear"):
        CrossValidation([ridge_fold(decay_of()()), nn.Linear(2, 1)], ADAM)


# ---- splits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_labels", [list, torch.tensor, lambda rows: torch.tensor(rows).float().numpy()])
def test_each_row_is_validated_on_once_and_each_fold_has_all_classes(as_labels):
    rows = [0] * 50 + [1] * 13 + [4] * 5
    folds = stratified_folds(as_labels(rows), 5, seed=3)
    assert sorted(torch.cat([val for _, val in folds]).tolist()) == list(range(len(rows)))
    for train, val in folds:
        assert sorted([*train.tolist(), *val.tolist()]) == list(range(len(rows)))
        counts = [sum(rows[i] == kind for i in val.tolist()) for kind in (0, 1, 4)]
        assert counts[0] == 10
        assert counts[1] in (2, 3)
        assert counts[2] == 1
    assert_same(stratified_folds(as_labels(rows), 5, seed=3), folds)
    others = stratified_folds(as_labels(rows), 5, seed=4)
    assert any(not torch.equal(one[1], other[1]) for one, other in zip(folds, others))


@pytest.mark.parametrize(
    ("labels", "num_folds", "error", "words"),
    [
        ([0] * 9 + [7] * 3, 5, ValueError, "class 7 has 3 of the 12 rows.* one of 5 folds .*at most 3 folds"),
        ([0] * 9 + [7], 2, ValueError, "class 7 has 1 of the 10 rows.*a simple split"),
        ([2] * 9, 3, ValueError, "all 9 rows are of one class, 2"),
        ([], 3, ValueError, "all 0 rows are of one class"),
        ([[0, 1], [1, 0]], 2, ValueError, r"shape \(n,\).*got \(2, 2\)"),
        ([0, 1] * 5, 1, ValueError, "num_folds must be at least 2, got 1"),
        ([0, 1] * 5, 2.5, TypeError, "num_folds must be an int"),
    ],
)
def test_folds_without_a_class_are_refused(labels, num_folds, error, words):
    with pytest.raises(error, match=words):
        stratified_folds(labels, num_folds, seed=0)


def test_folds_of_scikit_learn_may_be_of_other_sizes():
    """Each fold counts the same, also where a model's size is that of its rows."""
    x, y = random_batch(11, WIDTH, 0)
    splits = [(torch.as_tensor(train), torch.as_tensor(val)) for train, val in KFold(3).split(x)]

    class Dual(nn.Module):
        """Ridge regression by one coefficient for each training row."""

        def __init__(self, rows: Tensor) -> None:
            super().__init__()
            self.rows, self.alpha = rows, nn.Parameter(torch.zeros(len(rows), 1, dtype=torch.float64))

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs @ self.rows.T @ self.alpha

    def fold(train: Tensor) -> HyperOptimizer:
        model = Dual(x[train])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return HyperOptimizer(model, optimizer, mse, decay_of()(), Implicit(Cholesky()), FROZEN)

    folds = CrossValidation([fold(train) for train, _ in splits], ADAM)

    def by_hand(decay: float) -> float:
        losses = []
        for train, val in splits:
            kernel = x[train] @ x[train].T
            system = 2 * kernel @ kernel / len(train) + decay * torch.eye(len(train), dtype=torch.float64)
            alpha = torch.linalg.solve(system, 2 * kernel @ y[train] / len(train))
            losses.append(float((x[val] @ x[train].T @ alpha - y[val]).square().mean()))
        return sum(losses) / len(losses)

    for one, (train, _) in zip(folds.folds, splits):
        fit(one, (x[train], y[train]), tol=1e-9, method="newton")
    found = folds.evaluate([(x[val], y[val]) for _, val in splits])
    assert found.val_loss == pytest.approx(by_hand(0.5), rel=1e-9)
    reference, _ = derivative(lambda shift: by_hand(0.5 + shift), 1e-2)
    assert found.hypergradient[GROUP].item() == pytest.approx(reference, rel=1e-7)
    assert re.fullmatch(r"\d+", str(found.num_matvecs))
