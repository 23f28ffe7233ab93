# %% [markdown]
# # Weight decay per element
#
# One weight decay for every single weight of a network, thousands of them, learned from
# validation images while the network trains. A grid of ten values each would take
# $10^{4810}$ trainings; an implicit hypergradient has all derivatives from products
# with one Hessian.
#
# The data: 200 of scikit-learn's digits to train on, 500 for validation, the other
# 1,097 for the test at the end.

# %%
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from tabulate import tabulate

from torch_hypergrad import CG, HyperOptimizer, Hyperparameter, Implicit, Neumann

torch.set_default_dtype(torch.float64)
images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
train, val, test = (
    (images[rows] / 16, labels[rows]) for rows in order.tensor_split([200, 700])
)
NUM_STEPS = 1000


def loss_of(model, batch):
    pixels, digits = batch
    return F.cross_entropy(model(pixels), digits)


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10)
    )


def make_hyper(model, method, init):
    return HyperOptimizer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        loss_of,
        tune=[
            Hyperparameter("weight_decay", per="element", init=init, high=1.0, log=True)
        ],
        method=method,
        hyper_optimizer=partial(torch.optim.Adam, lr=0.1, betas=(0.5, 0.9)),
    )


# %% [markdown]
# ## Are the derivatives right?
#
# At a training optimum the gradient and the decay balance, $\nabla L_{train}(\theta) +
# \lambda \odot \theta = 0$, and so the derivative of the optimum with respect to all
# $\lambda$ follows from one solve with the Hessian, here by conjugate gradients. The
# reference knows nothing of it: plain `torch.optim.LBFGS` trains to the optimum of
# cross-entropy plus $\tfrac12 \sum_i \lambda_i \theta_i^2$, again with one $\lambda_i$
# a little larger, and again with it a little smaller. For this the model is a linear
# one, whose optimum can be reached in every digit.


# %%
def train_to_optimum(decays):
    """A linear model at which the gradient vanishes, without torch_hypergrad."""
    model = torch.nn.Linear(64, 10)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=500,
        tolerance_grad=1e-9,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        penalty = sum(
            (decays[f"weight_decay/{name}"] * p.square()).sum()
            for name, p in model.named_parameters()
        )
        loss = loss_of(model, train) + penalty / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


def difference(decays, name, index):
    losses = []
    h = 1e-2 * decays[name].flatten()[index].item()
    for side in (h, -h):
        moved = {key: value.clone() for key, value in decays.items()}
        moved[name].view(-1)[index] += side
        with torch.no_grad():
            losses.append(loss_of(train_to_optimum(moved), val).item())
    return (losses[0] - losses[1]) / (2 * h)


model = torch.nn.Linear(64, 10)
hyper = make_hyper(model, Implicit(CG(max_steps=500, rtol=1e-8)), init=1e-2)
decays = hyper.values()
model.load_state_dict(train_to_optimum(decays).state_dict())
hyper.record(
    train
)  # the weights are an optimum on these images, however they came about
found = hyper.evaluate(val)

rows = []
name = "weight_decay/weight"
for index in found.hypergradient[name].flatten().abs().topk(3).indices.tolist():
    computed, reference = (
        found.hypergradient[name].flatten()[index].item(),
        difference(decays, name, index),
    )
    rows.append(
        [f"{name}[{index}]", computed, reference, abs(computed / reference - 1)]
    )
    assert rows[-1][-1] < 1e-4
columns = ["entry", "hypergradient", "finite differences", "relative difference"]
print(tabulate(rows, columns, floatfmt=("", ".7f", ".7f", ".0e")))
num_entries = sum(value.numel() for value in decays.values())
print(f"{num_entries} entries, {found.num_matvecs} products with the Hessian")

# %% [markdown]
# ## Training and tuning in one
#
# No optimum is waited for: every 20 training steps the decays move, by Adam on their
# logarithms, at the weights as they are. A Neumann series of 20 terms is a good enough
# solve, and damping makes up for the negative curvature that a loss has on the way.

# %%
model = make_model()
hyper = make_hyper(model, Implicit(Neumann(num_terms=20, damping=0.1)), init=1e-3)
losses = []
for step in range(1, NUM_STEPS + 1):
    loss = hyper.step(train)
    if step >= 100 and step % 20 == 0:
        report = hyper.hyper_step(val)
        losses.append((step, loss.item(), report.val_loss))
learned = hyper.values()

steps, training, validation = zip(*losses)
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
axes.plot(steps, validation, color="C3", label="validation")
axes.plot(steps, training, color="0.5", label="training")
axes.set(xlabel="training step", ylabel="cross-entropy", ylim=0)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## What was learned
#
# Each pixel feeds 64 weights of the first layer; the map has the mean decay of these,
# beside the mean image. Pixels that are always black move nothing, so their decays stay
# where they started, at $10^{-3}$. Elsewhere a few pixels are told to count less, by up
# to five times.

# %%
mean = learned["weight_decay/0.weight"].log10().mean(0).view(8, 8)
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
shown = left.imshow(train[0].mean(0).view(8, 8), cmap="gray")
figure.colorbar(shown, ax=left, label="brightness")
shown = right.imshow(mean, cmap="viridis")
figure.colorbar(shown, ax=right, label="log10 of the weight decay")
left.set(title="mean training image", xticks=[], yticks=[])
right.set(title="learned weight decay", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## Was it worth it?
#
# Against no decay; the best single decay of a grid, chosen by validation loss; and the
# honest rival: thousands of values learn from the validation labels too, so one may
# train on these directly. Nothing has seen the test images so far.


# %%
def train_plainly(decay, batch):
    model = make_model()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=decay
    )
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return model


def on_test(model):
    with torch.no_grad():
        accuracy = (model(test[0]).argmax(1) == test[1]).double().mean().item()
        return [100 * accuracy, loss_of(model, test).item()]


grid = {decay: train_plainly(decay, train) for decay in (3e-4, 1e-3, 3e-3, 1e-2)}
with torch.no_grad():
    best = min(grid, key=lambda decay: loss_of(grid[decay], val).item())
both = tuple(torch.cat(parts) for parts in zip(train, val))
table = [
    ["none", 0, *on_test(train_plainly(0.0, train))],
    [f"best of a grid, {best:g}", 1, *on_test(grid[best])],
    [
        "per element, by hypergradients",
        sum(value.numel() for value in learned.values()),
        *on_test(model),
    ],
    [f"{best:g}, training on both sets", 1, *on_test(train_plainly(best, both))],
]
print(
    tabulate(
        table,
        ["weight decay", "values", "test accuracy (%)", "test loss"],
        floatfmt=("", "", ".1f", ".3f"),
    )
)

# %% [markdown]
# One seed is an anecdote. More seeds, and MNIST: [one weight decay for every
# weight](../results/per_parameter_weight_decay.md), by [this
# program](../../examples/per_parameter_weight_decay.py).
