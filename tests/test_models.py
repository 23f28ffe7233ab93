"""The networks, networks of one's own, the augmentation network, and random shifts and flips."""

import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_hypergrad.experiment.config import ConfigError
from torch_hypergrad.experiment.networks import Augmenter, make_network, random_crop_flip, random_flip

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32)]
NAMES = ["Linear", "MLP", "CNN", "ResNet18"]


def names_of(model):
    return [name for name, _ in model.named_parameters()]


def refused(config, image_shape=(1, 8, 8)):
    with pytest.raises(ConfigError) as caught:
        make_network(config, image_shape, 10)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, (2, 5, 3), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_network_maps_images_of_any_size_to_logits(name, shape):
    torch.manual_seed(0)
    logits = make_network({"name": name}, shape, 7)(torch.rand(2, *shape))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_initial_weights_follow_the_global_seed(name):
    def weights():
        torch.manual_seed(3)
        return make_network({"name": name}, (1, 8, 8), 10).state_dict()

    first, second = weights(), weights()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_names_and_shapes_that_a_report_can_draw():
    assert names_of(make_network({"name": "Linear"}, (1, 8, 8), 10)) == ["out.weight", "out.bias"]
    mlp = make_network({"name": "MLP", "hidden": [32, 16]}, (3, 4, 5), 10)
    shapes = {name: tuple(parameter.shape) for name, parameter in mlp.named_parameters()}
    assert {name: shape for name, shape in shapes.items() if "weight" in name} == {
        "hidden.0.weight": (32, 60),
        "hidden.1.weight": (16, 32),
        "out.weight": (10, 16),
    }
    cnn = make_network({"name": "CNN", "width": 4}, (1, 28, 28), 10)
    layers = ["convs.0", "convs.1", "convs.2", "out"]
    assert names_of(cnn) == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    resnet = make_network({"name": "ResNet18"}, (1, 28, 28), 10)
    assert resnet.conv1.weight.shape == (64, 1, 3, 3)


def test_default_sizes():
    assert make_network({"name": "MLP"}, (1, 8, 8), 10).hidden[0].weight.shape == (256, 64)
    assert make_network({"name": "MLP", "hidden": []}, (1, 8, 8), 10).out.weight.shape == (10, 64)
    numel = sum(p.numel() for p in make_network({"name": "ResNet18"}, (3, 32, 32), 10).parameters())
    assert numel == 11_173_962  # the ResNet-18 that is customary for CIFAR-10


@pytest.mark.parametrize("name", ["MLP", "CNN"])
def test_dropout_acts_in_training_alone(name):
    model = make_network({"name": name, "dropout": 0.5}, (1, 8, 8), 10)
    images = torch.rand(4, 1, 8, 8)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_norms_of_the_resnet():
    kinds = {
        norm: Counter(
            type(m) for m in make_network({"name": "ResNet18", "norm": norm}, (3, 8, 8), 10).modules()
        )
        for norm in ("batch", "group")
    }
    assert kinds["batch"][nn.BatchNorm2d] == kinds["group"][nn.GroupNorm] == 20
    assert kinds["batch"][nn.GroupNorm] == kinds["group"][nn.BatchNorm2d] == 0


@pytest.mark.parametrize("name", NAMES)
def test_networks_are_differentiable_twice(name):
    torch.manual_seed(0)
    model = make_network({"name": name}, (1, 8, 8), 10)
    loss = F.cross_entropy(model(torch.rand(4, 1, 8, 8)), torch.arange(4))
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in gradients), list(model.parameters()))
    assert all(g.isfinite().all() for g in second)
    assert any(g.abs().max() > 0 for g in second)


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("MLP", {"hiden": [3]}, ["model: MLP has no hiden", "Did you mean hidden?"]),
        ("MLP", {"hidden": 3}, ["model.hidden: got 3"]),
        ("MLP", {"hidden": [0]}, ["model: MLP refused", "at least 1 unit"]),
        ("MLP", {"dropout": 2.0}, ["model: MLP refused", "between 0 and 1"]),
        ("CNN", {"width": 0}, ["model: CNN refused", "width must be at least 1"]),
        ("CNN", {"input_shape": [1, 2, 3]}, ["CNN has no input_shape"]),
        ("Linear", {"hidden": [3]}, ["linear has no hidden", "no options"]),
        (
            "ResNet18",
            {"norm": "layer"},
            ["model.norm: got 'layer', expected one of batch, group."],
        ),
    ],
)
def test_options_that_a_network_does_not_take_are_refused(name, options, parts):
    message = refused({"name": name, **options})
    assert all(part in message for part in parts), message


# ---- networks of one's own ---------------------------------------------------------------------------------

OWN = """
import torch
from torch import nn

class MyNet(nn.Module):
    def __init__(self, width: int = 4, num_classes: int = 10):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.lazy = nn.LazyLinear(width)
        self.out = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.out(self.lazy(self.norm(images).flatten(1)))

class Pair(MyNet):
    def forward(self, images):
        return images, images

def build():
    return MyNet()
"""


@pytest.fixture
def my_net(tmp_path, monkeypatch):
    """The current folder holds my_net.py, broken_net.py and needy_net.py."""
    (tmp_path / "my_net.py").write_text(OWN)
    (tmp_path / "broken_net.py").write_text("def f(:\n")
    (tmp_path / "needy_net.py").write_text("import surely_not_installed\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path not in ("", str(tmp_path))])
    for name in ("my_net", "broken_net", "needy_net"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("my_net")
def test_a_network_in_the_current_folder():
    model = make_network({"name": "my_net.MyNet", "width": 6}, (1, 8, 8), 10)
    # Lazy layers have their shapes, so that an optimizer can take them.
    assert model.lazy.weight.shape == (6, 64)
    assert model.training
    assert model.norm.num_batches_tracked == 0  # the trial left no trace
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.usefixtures("my_net")
@pytest.mark.parametrize(
    ("module", "options", "parts"),
    [
        ("MyNet", {}, ["model: there is no MyNet", "my_package.MyClass"]),
        ("my_net.", {}, ["package.Class"]),
        (".MyNet", {}, ["package.Class"]),
        ("nowhere_to_be_found.MyNet", {}, ["importing nowhere_to_be_found failed", "install it"]),
        ("broken_net.MyNet", {}, ["importing broken_net failed (SyntaxError"]),
        ("needy_net.MyNet", {}, ["importing needy_net failed", "surely_not_installed"]),
        ("my_net.MyNett", {}, ["my_net has no MyNett", "Did you mean MyNet?"]),
        ("my_net.build", {}, ["my_net.build is no subclass of torch's Module"]),
        ("my_net.torch", {}, ["is no subclass"]),
        ("my_net.MyNet", {"widht": 3}, ["model: MyNet has no widht", "Did you mean width?"]),
        ("my_net.MyNet", {"width": "x"}, ["model.width: got 'x', expected int"]),
        ("my_net.MyNet", {"width": -1}, ["model: MyNet refused {'width': -1}"]),
        (
            "my_net.MyNet",
            {"num_classes": 3},
            ["gives (2, 3) for inputs of shape (2, 1, 8, 8), expected (2, 10)"],
        ),
        ("my_net.Pair", {}, ["gives tuple for inputs"]),
        (
            "torch.nn.Linear",
            {"in_features": 3, "out_features": 10},
            ["torch.nn.Linear fails on inputs", "RuntimeError"],
        ),
    ],
)
def test_modules_that_are_no_network_for_these_images_are_refused(module, options, parts):
    message = refused({"name": module, **options})
    assert all(part in message for part in parts), message


# ---- the augmentation network ------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_the_augmenter_starts_as_the_identity_and_can_leave_it(channels):
    torch.manual_seed(0)
    augmenter, images = Augmenter(channels), torch.rand(4, channels, 8, 8)
    out = augmenter(images)
    assert torch.equal(out, images)
    gradients = dict(
        zip(names_of(augmenter), torch.autograd.grad(out.square().sum(), list(augmenter.parameters())))
    )
    assert gradients["last.weight"].abs().max() > 0
    assert gradients["last.bias"].abs().max() > 0


def moved_augmenter():
    torch.manual_seed(0)
    augmenter = Augmenter(2).double()
    nn.init.normal_(augmenter.last.weight)
    return augmenter


def test_the_augmenter_draws_new_noise_in_every_call_from_the_global_generator():
    augmenter, images = moved_augmenter(), torch.rand(3, 2, 5, 5, dtype=torch.float64)
    state = torch.get_rng_state()
    first, second = augmenter(images), augmenter(images)
    torch.set_rng_state(state)
    assert torch.equal(augmenter(images), first)
    assert not torch.equal(first, second)
    same_images = augmenter(images[:1].expand(2, -1, -1, -1))
    assert not torch.equal(same_images[0], same_images[1])


def test_the_augmenter_is_differentiable_twice():
    augmenter, images = moved_augmenter(), torch.rand(2, 2, 4, 4, dtype=torch.float64)
    names = names_of(augmenter)

    def loss(*parameters):
        torch.manual_seed(1)
        return torch.func.functional_call(augmenter, dict(zip(names, parameters)), images).pow(3).mean()

    parameters = tuple(augmenter.parameters())
    subset = tuple(p if p.numel() < 40 else p.detach() for p in parameters)
    assert torch.autograd.gradcheck(loss, subset)
    assert torch.autograd.gradgradcheck(loss, subset)


# ---- shifts and flips --------------------------------------------------------------------------------------


def crops_of(image, padding):
    """Every shift of one image, by slicing."""
    _, height, width = image.shape
    padded = F.pad(image, [padding] * 4)
    starts = range(2 * padding + 1)
    return {(y, x): padded[:, y : y + height, x : x + width] for y in starts for x in starts}


def test_flips_are_flips():
    torch.manual_seed(0)
    images = torch.rand(200, 3, 4, 5)
    flipped = random_flip(images)
    as_is = [torch.equal(new, old) for new, old in zip(flipped, images)]
    mirrored = [torch.equal(new, old.flip(2)) for new, old in zip(flipped, images)]
    assert all(a != m for a, m in zip(as_is, mirrored))
    assert 60 < sum(mirrored) < 140  # binomial: 100, and a standard deviation of 7


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_crops_are_shifts_with_zeros_and_flips(padding):
    torch.manual_seed(0)
    images = torch.rand(400, 2, 6, 7)
    changed = random_crop_flip(images, padding)
    assert changed.shape == images.shape
    assert changed.is_contiguous()
    found = set()
    for new, old in zip(changed, images):
        candidates = crops_of(old, padding).items()
        matches = {
            (where, flip)
            for where, crop in candidates
            for flip in (0, 1)
            if torch.equal(new.flip(2) if flip else new, crop)
        }
        assert len(matches) == 1
        found |= matches
    num = 2 * (2 * padding + 1) ** 2
    assert len(found) > 0.85 * num  # of 162 cells, 400 draws leave a share of exp(-2.5) = 8 % out


@pytest.mark.parametrize("change", [random_flip, random_crop_flip])
def test_changes_follow_the_global_seed(change):
    images = torch.rand(20, 1, 8, 8)
    torch.manual_seed(5)
    first, second = change(images), change(images)
    torch.manual_seed(5)
    assert torch.equal(change(images), first)
    assert not torch.equal(first, second)
    assert change(images.double()).dtype == torch.float64
    assert change(images[:0]).shape == (0, 1, 8, 8)
