# %% [markdown]
# # First hypergradient
#
# How would the validation loss change if the weight decay had been a little larger, and
# the whole training had been run again? A hypergradient answers that from one training.
# Here it is computed, checked against training that is run again and again by plain
# PyTorch, drawn, and followed downhill.
#
# The data: 442 patients of scikit-learn, ten measurements each, and how their diabetes
# went on. To leave something to overfit, all products of measurements are features too.

# %%
from functools import partial

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from torch_hypergrad import HyperOptimizer, Hyperparameter, Unrolled

torch.set_default_dtype(torch.float64)
measurements, course = load_diabetes(return_X_y=True)
features = StandardScaler().fit_transform(
    PolynomialFeatures(2, include_bias=False).fit_transform(measurements)
)
x, y = torch.tensor(features), torch.tensor((course - course.mean()) / course.std())
train, val, test = (
    (x[part], y[part]) for part in (slice(100), slice(100, 250), slice(250, None))
)


def loss_of(model, batch):
    inputs, targets = batch
    return (model(inputs).squeeze(1) - targets).square().mean()


# %% [markdown]
# ## Training as usual
#
# 100 steps of `torch.optim.SGD` on a linear model with 65 features. It starts from the
# same weights each time, so the validation loss after training is a function of two
# numbers, $f(\text{weight decay}, \text{lr})$.

# %%
NUM_STEPS, DECAY, LR = 100, 0.02, 0.03


def make_model():
    torch.manual_seed(0)
    return torch.nn.Linear(x.shape[1], 1)


def train_plainly(decay=DECAY, lr=LR):
    """The validation loss after training, without torch_hypergrad."""
    model = make_model()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, weight_decay=decay
    )
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        loss_of(model, train).backward()
        optimizer.step()
    with torch.no_grad():
        return loss_of(model, val).item()


print(f"validation loss {train_plainly():.4f}")

# %% [markdown]
# ## The hypergradient
#
# The same training, recorded. `Unrolled` goes back through the recorded steps, last one
# first.


# %%
def make_hyper(decay=DECAY, lr=LR):
    model = make_model()
    return HyperOptimizer(
        model,
        torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=decay),
        loss_of,
        tune=[Hyperparameter("weight_decay", log=True), Hyperparameter("lr", log=True)],
        method=Unrolled(),
        hyper_optimizer=partial(torch.optim.Adam, lr=0.2),
    )


def evaluate_at(decay=DECAY, lr=LR):
    hyper = make_hyper(decay, lr)
    for _ in range(NUM_STEPS):
        hyper.step(train)
    return hyper.evaluate(val)


found = evaluate_at()
print(f"validation loss {found.val_loss:.4f}")
for name, derivative in found.hypergradient.items():
    print(f"derivative with respect to {name}: {derivative:.8f}")

# %% [markdown]
# ## Is it right?
#
# Central differences of the plain training above, which knows nothing of this library:
# $f' \approx \big(f(v + h) - f(v - h)\big) / 2h$.


# %%
def difference(name, value):
    h = 1e-5 * value
    return (train_plainly(**{name: value + h}) - train_plainly(**{name: value - h})) / (
        2 * h
    )


references = {
    "weight_decay/group0": difference("decay", DECAY),
    "lr/group0": difference("lr", LR),
}
for name, reference in references.items():
    error = abs(found.hypergradient[name].item() / reference - 1)
    print(
        f"{name}: finite differences {reference:.8f}, relative difference {error:.0e}"
    )
    assert error < 1e-6

# %% [markdown]
# [`check_hypergradient`](../api/testing.md) does this for any model, loss and
# optimizer.
#
# ## Tangents
#
# The grey curves are plain trainings, one for each of 41 values. The red tangents are
# hypergradients, from one training each; on a logarithmic axis straight lines are bent.

# %%
SWEEPS = {
    "decay": (
        "weight decay",
        "weight_decay/group0",
        torch.logspace(-3, 1, 41).tolist(),
        (0.004, 0.05, 0.6, 4),
    ),
    "lr": (
        "learning rate",
        "lr/group0",
        torch.logspace(-3.5, -1, 41).tolist(),
        (0.0008, 0.004, 0.015, 0.06),
    ),
}
figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
for panel, (key, (title, name, values, points)) in zip(panels, SWEEPS.items()):
    panel.plot(
        values,
        [train_plainly(**{key: value}) for value in values],
        color="0.6",
        label="training, run again",
    )
    for point in points:
        tangent = evaluate_at(**{key: point})
        around = torch.linspace(point / 1.7, point * 1.7, 20)
        line = tangent.val_loss + tangent.hypergradient[name] * (around - point)
        panel.plot(
            around,
            line,
            color="C3",
            label="hypergradient" if point == points[0] else None,
        )
        panel.plot(point, tangent.val_loss, "o", color="C3", markersize=5)
    panel.set(xscale="log", xlabel=title)
panels[0].set(ylabel="validation loss after training", ylim=(0.55, 1.0))
panels[0].legend(frameon=False)
plt.show()

# %% [markdown]
# ## Downhill
#
# `hyper_step` computes the hypergradient and takes a step of Adam on the logarithms of
# both values; `restart` goes back to the first weights, for the next training. The test
# data has not been looked at so far.

# %%
hyper = make_hyper()


def test_loss_now():
    with torch.no_grad():
        return loss_of(hyper.model, test).item()


for episode in range(31):
    hyper.restart()
    for _ in range(NUM_STEPS):
        hyper.step(train)
    test_loss = test_loss_now()
    decay, lr = (value.item() for value in hyper.values().values())
    report = hyper.hyper_step(val)
    if episode % 10 == 0:
        print(
            f"training {episode:2}: weight decay {decay:.3f}, lr {lr:.4f}, "
            f"validation loss {report.val_loss:.4f}, test loss {test_loss:.4f}"
        )

# %% [markdown]
# Next: [thousands of values at once](../notebooks/weight_decay_per_element.py), or
# [which method when](../how_to_choose.md).
