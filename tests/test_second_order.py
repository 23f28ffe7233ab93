"""Products with second derivatives, three ways, against references that use none of them: dense Jacobians,
closed forms, plain training with torch.optim, and finite differences of re-run training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm

from cells import ROWS, Cell, assert_close, exact, hypergradient, references
from problems import FROZEN, REPLAY, GradientDescent, mse, random_batch, tanh_mlp
from test_modules import ADAM, SGD, build
from torch_hypergrad import (
    HyperOptimizer,
    Hyperparameter,
    Implicit,
    Neumann,
    NotTwiceDifferentiableError,
    Unrolled,
)
from torch_hypergrad.step.second_order import way as way_of
from torch_hypergrad.step.traced import TracedGradient
from torch_hypergrad.testing import check_hypergradient

BATCHES = [random_batch(8, 4, seed) for seed in range(5)]
VAL = random_batch(8, 4, seed=100)
DECAY = Hyperparameter("weight_decay", per="tensor", init=0.01)
OPTIMIZERS = ("SGD momentum", "Adam", "AdamW", "Muon nesterov")
NEW_WAYS = ["forward", "finite_difference"]  # double backward is what every other test takes
RTOL = {"reverse": 1e-10, "forward": 1e-10, "finite_difference": 1e-7}
"""Central differences in float64: at the step u^(1/3) = 6e-6 both errors are about 1e-10,
times the third derivative's size and the number of steps that they add up over."""
every_way = pytest.mark.parametrize("way", ["reverse", *NEW_WAYS])
new_ways = pytest.mark.parametrize("way", NEW_WAYS)


def made(
    way: Any = "reverse",
    make: Callable[[], nn.Module] = tanh_mlp,
    tune: Any = None,
    optimizer: Any = SGD,
    **options: Any,
) -> HyperOptimizer:
    torch.manual_seed(0)
    model = make()
    method = options.pop("method", None) or Unrolled(memory=0, second_order=way)
    loss = options.pop("train_loss", mse)
    tune = [DECAY] if tune is None else tune
    return HyperOptimizer(
        model, optimizer(model.parameters()), loss, tune, method, FROZEN, val_loss=mse, **options
    )


def trained(way: Any = "reverse", batches: Any = BATCHES, **options: Any) -> HyperOptimizer:
    hyper = made(way, **options)
    torch.manual_seed(1)
    for batch in batches:
        hyper.step(batch)
    return hyper


def checked(way: Any, make: Callable[[], nn.Module], **options: Any) -> None:
    """Against finite differences of re-run training, and not by being zero on both sides."""
    tune = [Hyperparameter("lr"), Hyperparameter("weight_decay", init=0.01)]
    entries = check_hypergradient(lambda: made(way, make, tune, **options), BATCHES, VAL)
    assert any(abs(entry.computed) > 1e-6 for entry in entries)


def assert_all_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    """Relative to the largest entry of each tensor."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= rtol * float(value.abs().max()), name


# ---- one product, against the dense Jacobian ---------------------------------------------------------------

SCALE = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
TILT = torch.tensor([0.5, -0.2, 0.1, 0.4], dtype=torch.float64, requires_grad=True)


def tilted_loss(model: Any, batch: Any) -> Tensor:
    x, y = batch
    return SCALE.exp() * (model(x * TILT) - y).square().mean()


def clipped(grads: list[Tensor]) -> list[Tensor]:
    """To a norm that is always exceeded: its Jacobian is not symmetric
    once it is applied to the gradient's."""
    norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
    return [g * (0.1 / norm) for g in grads]


def scaled_by_tuned(grads: list[Tensor]) -> list[Tensor]:
    return [torch.tanh(g * SCALE) for g in grads]


def in_place(grads: list[Tensor]) -> list[Tensor]:
    for g in grads:
        g.mul_(0.5)
    return grads


TRANSFORMS = [None, clipped, scaled_by_tuned]


def traced(way: str, hyper: HyperOptimizer) -> TracedGradient:
    """The gradient of the first recorded step, and what it was taken from."""
    step, state, _ = list(hyper._window._history.visits())[-1]  # type: ignore[attr-defined]
    return way_of(way)(hyper._problem.transition.gradient, step, state)  # type: ignore[arg-type]


def dense_products(transform: Any, v: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The transposed Jacobian of the transformed gradient times v, for parameters, scale and tilt."""
    torch.manual_seed(0)
    model = tanh_mlp()
    names, start = zip(*((n, p.detach()) for n, p in model.named_parameters()))
    x, y = BATCHES[0]

    def gradient(flat: Tensor, scale: Tensor, tilt: Tensor) -> Tensor:
        params = [part.view(p.shape) for part, p in zip(flat.split([p.numel() for p in start]), start)]
        loss = (
            scale.exp() * (functional_call(model, dict(zip(names, params)), (x * tilt,)) - y).square().mean()
        )
        grads = list(torch.autograd.grad(loss, params, create_graph=True))
        if transform is clipped:
            grads = clipped(grads)
        elif transform is not None:
            grads = [torch.tanh(g * scale) for g in grads]
        return torch.cat([g.reshape(-1) for g in grads])

    flat = torch.cat([p.reshape(-1) for p in start])
    jacobians = torch.autograd.functional.jacobian(gradient, (flat, SCALE.detach(), TILT.detach()))
    if transform is None:  # the same by another road
        hessian = torch.autograd.functional.hessian(
            lambda w: SCALE.exp() * loss_at(model, names, start, w, x * TILT.detach(), y), flat
        )
        torch.testing.assert_close(jacobians[0], hessian)
    flat_v = torch.cat([u.reshape(-1) for u in v])
    return jacobians[0].T @ flat_v, jacobians[1] @ flat_v, jacobians[2].T @ flat_v


def loss_at(model: nn.Module, names: Any, start: Any, flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
    params = [part.view(p.shape) for part, p in zip(flat.split([p.numel() for p in start]), start)]
    return (functional_call(model, dict(zip(names, params)), (x,)) - y).square().mean()


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "clipped", "tuned"])
@every_way
def test_products_are_those_of_the_dense_jacobian(way: str, transform: Any) -> None:
    hyper = trained(
        way, BATCHES[:1], train_loss=tilted_loss, tune=[DECAY, SCALE, TILT], grad_transform=transform
    )
    gradient = traced(way, hyper)
    v = [
        torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(3))
        for p in hyper.model.parameters()
    ]
    again, mixed_again = gradient.product(v), gradient.mixed(v)
    products, mixed, _ = gradient.pull(v)
    expected = dense_products(transform, v)
    for found, reference in (
        (products, expected[0]),
        (again, expected[0]),
        ([mixed[0]], expected[1]),
        ([mixed[1]], expected[2]),
        ([mixed_again[1]], expected[2]),
    ):
        flat = torch.cat([f.reshape(-1) for f in found if f is not None])
        torch.testing.assert_close(flat, reference.reshape(-1), rtol=RTOL[way], atol=RTOL[way])


@every_way
def test_a_zero_adjoint_has_zero_products(way: str) -> None:
    hyper = trained(way, BATCHES[:1])
    gradient = traced(way, hyper)
    zeros = [torch.zeros_like(p) for p in hyper.model.parameters()]
    products = gradient.pull(zeros).params
    assert gradient.error is None or float(gradient.error) == 0
    assert all(product is None or not product.any() for product in products)


# ---- whole hypergradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("truncation", [None, 4])
@every_way
def test_gradient_descent_on_a_quadratic(way: Any, truncation: int | None) -> None:
    """The window of a truncation is the recursion from a later start."""
    problem, num_steps = GradientDescent.make(), 9
    tune = [Hyperparameter("lr", init=0.05), Hyperparameter("weight_decay", init=0.2)]
    model = problem.model()
    hyper = HyperOptimizer(
        model, torch.optim.SGD(model.parameters(), lr=0.05), problem.train_loss, tune,
        Unrolled(truncation=truncation, second_order=way), FROZEN, val_loss=problem.val_loss,
    )  # fmt: skip
    first = 0 if truncation is None else num_steps - truncation
    for t in range(num_steps):
        if t == first:
            problem_from_here = dataclasses.replace(problem, start=model.w.detach().clone())
        hyper.step(None)
    expected = problem_from_here.hypergradient(0.05, 0.2, num_steps - first)
    assert [g.item() for g in hyper.hypergradient(None).values()] == pytest.approx(list(expected), rel=1e-8)


@pytest.mark.parametrize(
    "kind", ["batch_norm", "dropout", "lstm", "tied", "frozen", "sometimes", "rebinding"]
)
@new_ways
def test_modules(way: str, kind: str) -> None:
    checked(way, lambda: build(kind), optimizer=ADAM if kind in ("tied", "sometimes") else SGD)


@pytest.fixture
def double_precision() -> Iterator[None]:
    with exact():
        yield


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in OPTIMIZERS], ids=attrgetter("name"))
@new_ways
def test_optimizers_against_plain_torch(way: Any, row: Any, double_precision: None) -> None:
    setting = "weight_decay"
    for per in ("group", "tensor", "element"):
        cell = Cell(row, setting, row.value(setting), per)
        if not cell.in_torch:
            continue
        found, _ = hypergradient(row, [cell.hyperparameter()], Unrolled(second_order=way))
        assert_close(found[setting], references(row)[setting, cell.start].derivatives[per], 1e-5)


@new_ways
def test_tuned_tensors_modules_and_schedules(way: str) -> None:
    """Mixed products with a module, and a tensor that the transformed gradient reads."""

    def make() -> HyperOptimizer:
        torch.manual_seed(7)
        stretch = nn.Linear(4, 4).double()
        scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

        def train_loss(model: nn.Module, batch: Any) -> Tensor:
            return (model(batch[0] + torch.tanh(stretch(batch[0]))) - batch[1]).square().mean()

        return made(
            way, train_loss=train_loss, optimizer=ADAM,
            grad_transform=lambda grads: [scale * g for g in clipped(grads)],
            tune=[Hyperparameter("lr", per="step", num_steps=len(BATCHES)),
                  ("stretch", stretch), ("scale", scale)],
        )  # fmt: skip

    entries = check_hypergradient(make, BATCHES, VAL, num_entries=1)
    assert all(abs(entry.computed) > 1e-9 for entry in entries)


class Awkward(nn.Module):
    """Parameters without dimensions, without entries, transposed, strided,
    and a convolution in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.nothing = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.zeros(0))
        self.transposed = nn.Parameter(torch.randn(6, 4).t())
        self.strided = nn.Parameter(torch.randn(6, 2)[:, :1])
        self.convolution = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ self.transposed) @ self.strided * self.factor + self.nothing.sum()
        images = x.repeat(1, 2).view(-1, 2, 2, 2).contiguous(memory_format=torch.channels_last)
        return hidden + torch.tanh(self.convolution(images)).mean((1, 2, 3))[:, None]


@every_way
def test_awkward_layouts(way: str) -> None:
    checked(way, lambda: Awkward().double())


class TwoTypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.single, self.double_ = nn.Linear(4, 5), nn.Linear(5, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.double_(torch.tanh(self.single(x.to(self.single.weight.dtype))).double())


def by_module(params: Any, lr: float = 0.1) -> torch.optim.Optimizer:
    first, second, *rest = params
    return torch.optim.SGD(
        [{"params": [first, second], "weight_decay": 0.02}, {"params": rest}], lr=lr, momentum=0.9
    )


@new_ways
def test_several_groups_and_types(way: str) -> None:
    """In float32 and float64 together; all in float64 is the reference, which double backward gives."""
    expected = trained(make=lambda: TwoTypes().double(), optimizer=by_module).hypergradient(VAL)
    assert_all_close(trained(way, make=TwoTypes, optimizer=by_module).hypergradient(VAL), expected, 1e-3)
    checked(way, lambda: TwoTypes().double(), optimizer=by_module)


@pytest.mark.parametrize(
    "options",
    [{"max_snapshots": 2}, {"offload": "cpu"}, {"max_snapshots": 3, "offload": "cpu", "truncation": 4}],
    ids=str,
)
@new_ways
def test_snapshots_never_change_the_answer(way: Any, options: Any) -> None:
    """With gradients kept or not: bitwise the same, with buffers and dropout."""
    plain = {"truncation": options.get("truncation")}
    answers = [
        trained(
            make=lambda: nn.Sequential(build("batch_norm"), nn.Dropout(0.3)), optimizer=ADAM,
            grad_transform=clipped, method=Unrolled(second_order=way, **chosen),
        ).hypergradient(VAL)
        for chosen in (options, plain)
    ]  # fmt: skip
    assert all(torch.equal(answers[0][name], answers[1][name]) for name in answers[0])


@every_way
def test_a_transformation_in_place(way: Any) -> None:
    expected = trained(grad_transform=lambda grads: [g * 0.5 for g in grads]).hypergradient(VAL)
    assert_all_close(trained(way, grad_transform=in_place).hypergradient(VAL), expected, 1e-8)


@new_ways
def test_a_checkpoint_in_the_middle(way: Any) -> None:
    expected = trained(way).hypergradient(VAL)
    half, other = trained(way, BATCHES[:3]), made(way)
    other.load_state_dict(half.state_dict())
    for batch in BATCHES[3:]:
        other.step(batch)
    assert all(torch.equal(g, expected[name]) for name, g in other.hypergradient(VAL).items())


# ---- accuracy of finite differences ------------------------------------------------------------------------


def test_exact_ways_report_no_error() -> None:
    for way in ("reverse", "forward"):
        assert trained(way).hyper_step(VAL).product_error is None


def in_float32() -> dict[str, Any]:
    return {"make": lambda: tanh_mlp().float(), "batches": [(x.float(), y.float()) for x, y in BATCHES]}


@pytest.mark.parametrize("single", [False, True], ids=["float64", "float32"])
def test_accuracy_and_its_estimate(single: bool) -> None:
    """Within 1e-7 in float64 and 1 % in float32, and the estimate is neither far below the true error nor far
    above it: the two differences share most of the third derivative's part, and little of rounding."""
    options = in_float32() if single else {}
    val = (VAL[0].float(), VAL[1].float()) if single else VAL
    hyper = trained("finite_difference", **options)
    assert_all_close(
        hyper.hypergradient(val), trained(**options).hypergradient(val), 1e-2 if single else 1e-7
    )
    v = [
        torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(3))
        for p in hyper.model.parameters()
    ]
    gradient, exact = (traced(way, hyper) for way in ("finite_difference", "reverse"))
    found, expected = (
        torch.cat([p.reshape(-1) for p in g.pull(v).params if p is not None]) for g in (gradient, exact)
    )
    true = float((found - expected).norm() / expected.norm())
    estimated = gradient.error
    assert estimated is not None
    assert true / 5 <= float(estimated) <= 20 * true
    reported = hyper.hyper_step(val).product_error
    assert reported is not None
    assert 0 < reported < (1e-2 if single else 1e-7)


def test_no_product_is_no_error() -> None:
    """Rprop reads signs, which have no derivative."""
    rprop = partial(torch.optim.Rprop, lr=0.01)
    hyper = trained("finite_difference", optimizer=rprop, tune=[Hyperparameter("etas.0")])
    assert hyper.hyper_step(VAL).product_error == 0


# ---- what has no second derivative -------------------------------------------------------------------------


class OnceTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


class ReverseTanh(OnceTanh):
    """Twice differentiable, without a formula for dual numbers."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


class Activated(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.first, self.last = function, nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def activated(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return Activated(function).double()


def test_a_once_differentiable_function() -> None:
    checked("finite_difference", lambda: activated(OnceTanh.apply))
    with pytest.raises(NotTwiceDifferentiableError, match="once_differentiable"):
        trained(make=lambda: activated(OnceTanh.apply)).hypergradient(VAL)
    with pytest.raises(NotTwiceDifferentiableError, match="once_differentiable"):
        trained(make=lambda: activated(OnceTanh.apply), method=Unrolled(max_graphs=2))


def test_a_function_without_a_formula_for_dual_numbers() -> None:
    hyper = trained("forward", make=lambda: activated(ReverseTanh.apply))
    before = [p.detach().clone() for p in hyper.model.parameters()]
    with pytest.raises(NotTwiceDifferentiableError, match=r"dual numbers.*jvp.*second_order='reverse'"):
        hyper.hypergradient(VAL)
    assert all(torch.equal(p, b) for p, b in zip(hyper.model.parameters(), before))
    hyper.step(BATCHES[0])  # and training goes on
    checked("reverse", lambda: activated(ReverseTanh.apply))


def test_forward_needs_no_double_backward() -> None:
    """Double backward is made to fail: with dual numbers, no graph of a gradient is made."""
    expected = trained().hypergradient(VAL)
    hyper = trained("forward")
    original = torch.autograd.grad

    def without_graph(*args: Any, **kwargs: Any) -> Any:
        assert not kwargs.get("create_graph")
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", without_graph)
        found = hyper.hypergradient(VAL)
    assert_all_close(found, expected, 1e-12)


def with_weight_norm() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 1)).double()


def test_weight_norm() -> None:
    """Its second derivative is wrong in PyTorch (``gradgradcheck`` fails),
    so it is refused where it would be used."""
    checked("finite_difference", with_weight_norm)
    for method in (REPLAY, Implicit(Neumann(2))):
        with pytest.raises(NotTwiceDifferentiableError, match=r"weight norm.*finite_difference"):
            trained(make=with_weight_norm, method=method).hypergradient(VAL)


class Attention(nn.Module):
    def __init__(self, seen: list[bool]) -> None:
        super().__init__()
        self.embed, self.head, self.seen = nn.Linear(1, 8), nn.Linear(8, 1), seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(torch.backends.cuda.flash_sdp_enabled() and torch.backends.cudnn.enabled)
        e = self.embed(x[..., None])[:, None]
        return self.head(F.scaled_dot_product_attention(e, e, e)[:, 0].mean(1))


@every_way
def test_fused_attention_is_switched_off_for_second_derivatives_alone(way: str) -> None:
    seen: list[bool] = []
    hyper = trained(way, make=lambda: Attention(seen).double())
    hyper.hypergradient(VAL)
    seen.pop(len(BATCHES))  # validation, which no step replays
    assert set(seen) == {way == "finite_difference"}
    checked(way, lambda: Attention([]).double())


def test_a_compiled_module() -> None:
    def compiled() -> nn.Module:
        return torch.compile(tanh_mlp(), backend="aot_eager")  # type: ignore[return-value]

    try:
        compiled()(BATCHES[0][0])
    except Exception as error:  # no compiler for this Python or platform
        pytest.skip(f"torch.compile does not work here: {error}")
    hyper = trained("finite_difference", make=compiled)
    found = {name.replace("_orig_mod.", ""): g for name, g in hyper.hypergradient(VAL).items()}
    assert_all_close(found, trained().hypergradient(VAL), 1e-7)
    for way in ("reverse", "forward"):
        with pytest.raises(ValueError, match="compiled"):
            made(way, make=compiled)


def test_what_counts_as_a_constant() -> None:
    """Reverse takes all that has no graph for a constant;
    dual numbers go through ``no_grad``, not through ``detach``; differences see everything move.
    ``docs/notation.md`` says so."""

    def detached(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - 0.5 * model(batch[0]).detach() - batch[1]).square().mean()

    expected = trained(train_loss=detached).hypergradient(VAL)
    assert_all_close(trained("forward", train_loss=detached).hypergradient(VAL), expected, 1e-10)
    differences = trained("finite_difference", train_loss=detached).hypergradient(VAL)
    assert max(float((g - expected[name]).abs().max()) for name, g in differences.items()) > 1e-4


# ---- views of parameters that live outside the model -------------------------------------------------------


class HoldsView(nn.Module):
    """Reads its weight through a view made once, which shares the parameter's memory for good."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.double()
        self.views = [self.linear.weight.view(-1)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.views[0])[:, None] * self.views[0].sum() + self.linear.bias


@pytest.mark.parametrize("method", [REPLAY, Unrolled(max_snapshots=2), Unrolled(max_graphs=3)], ids=str)
def test_a_view_outside_the_model_follows_the_replay(method: Unrolled) -> None:
    checked(None, HoldsView, method=method)


@new_ways
def test_a_view_outside_the_model_follows_the_product(way: str) -> None:
    checked(way, HoldsView)
