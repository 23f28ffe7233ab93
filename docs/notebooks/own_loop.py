# %% [markdown]
# # Own loop
#
# A training loop that has grown over the years: loader, scheduler, clipping, logging,
# early stopping, checkpoints. What of it changes when hyperparameters are tuned on the
# way? Two answers: one line of the loop, or none of it.

# %%
import io
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from torch_hypergrad import (
    CG,
    HyperOptimizer,
    Hyperparameter,
    Implicit,
    Unrolled,
    clip_grad_norm,
)

torch.set_default_dtype(torch.float64)
images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
train, val = (
    (images[rows] / 16, labels[rows]) for rows in (order[:200], order[200:700])
)


def loss_of(model, batch):
    pixels, digits = batch
    return F.cross_entropy(model(pixels), digits)


def make_loader():
    return DataLoader(
        TensorDataset(*train),
        batch_size=50,
        shuffle=True,
        generator=torch.Generator().manual_seed(1),
    )


def make_training(lr=0.02, decay=0.01):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 32), torch.nn.GELU(), torch.nn.Linear(32, 10)
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, weight_decay=decay, eps=1e-4
    )
    return (
        model,
        optimizer,
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=80),
    )


# %% [markdown]
# ## The loop as it was


# %%
def train_plainly(num_epochs, **settings):
    model, optimizer, scheduler = make_training(**settings)
    loader = make_loader()
    for _ in range(num_epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
    return model


# %% [markdown]
# ## One line of it
#
# `zero_grad`, `backward`, clipping and `step` become `hyper.step(batch)`; clipping is
# given once, as a function that can be differentiated. Loader and scheduler stay what
# they were.


# %%
def wrap(model, optimizer):
    return HyperOptimizer(
        model,
        optimizer,
        loss_of,
        tune=[Hyperparameter("lr", log=True), Hyperparameter("weight_decay", log=True)],
        method=Unrolled(),
        hyper_optimizer=partial(torch.optim.Adam, lr=0.1),
        grad_transform=clip_grad_norm(1.0),
    )


def train_epoch(hyper, loader, scheduler):
    for batch in loader:
        loss = hyper.step(batch)
        scheduler.step()
    return loss.item()


# %% [markdown]
# As long as no hyper step is taken, the weights are those of the loop as it was. And
# the hypergradient is the derivative of that loop, with scheduler and clipping in it:
# the reference are central differences of the plain loop above.

# %%
model, optimizer, scheduler = make_training()
hyper, loader = wrap(model, optimizer), make_loader()
for _ in range(8):
    train_epoch(hyper, loader, scheduler)
plain = train_plainly(8)
apart = max(
    (p - q).abs().max().item() for p, q in zip(model.parameters(), plain.parameters())
)
print(f"weights after 8 epochs differ by at most {apart:.0e}")
assert apart < 1e-12


def difference(name, value):
    h, losses = 1e-5 * value, []
    for side in (h, -h):
        model = train_plainly(8, **{name: value + side})
        losses.append(loss_of(model, val).item())
    return (losses[0] - losses[1]) / (2 * h)


found = hyper.hypergradient(val)
for key, reference in (
    ("lr/group0", difference("lr", 0.02)),
    ("weight_decay/group0", difference("decay", 0.01)),
):
    error = abs(found[key].item() / reference - 1)
    print(f"{key}: {found[key]:.8f}, by finite differences {reference:.8f}")
    print(f"relative difference {error:.0e}")
    assert error < 1e-5

# %% [markdown]
# ## Logging, early stopping, checkpoints
#
# All of these are yours. `state_dict` holds the whole run, recorded steps and random
# numbers included; scheduler and loader are saved as always. Here the run is killed
# after 10 epochs, in the middle of a window, and resumed in fresh objects.


# %%
def run(num_epochs, saved=None):
    """Tunes every second epoch; the log, and the checkpoint at the end."""
    model, optimizer, scheduler = make_training()
    hyper, loader, log = wrap(model, optimizer), make_loader(), []
    if saved:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        hyper.load_state_dict(state["hyper"])
        scheduler.load_state_dict(state["scheduler"])
        loader.generator.set_state(state["loader"])
    while scheduler.last_epoch < 4 * num_epochs:
        loss = train_epoch(hyper, loader, scheduler)
        epoch = scheduler.last_epoch // 4
        if epoch % 2 == 0:
            report = hyper.hyper_step(val)
            lr, decay = (value.item() for value in hyper.values().values())
            log.append(
                (
                    epoch,
                    loss,
                    report.val_loss,
                    lr,
                    optimizer.param_groups[0]["lr"],
                    decay,
                )
            )
            if len(log) > 3 and report.val_loss > 1.05 * min(entry[2] for entry in log):
                break  # early stopping
    file = io.BytesIO()
    state = {
        "hyper": hyper.state_dict(),
        "scheduler": scheduler.state_dict(),
        "loader": loader.generator.get_state(),
    }
    torch.save(state, file)
    return log, file.getvalue(), model


whole, _, model = run(20)
first, saved, _ = run(11)
second, _, resumed = run(20, saved)
assert whole == first + second
assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters()))
print(
    f"{len(first)} and {len(second)} hyper steps: "
    f"bit for bit the {len(whole)} of the run that was not killed"
)

# %% [markdown]
# The scheduler's factor multiplies the value that is tuned: `hyper.values()` is the
# value, the optimizer's group has what a step takes.

# %%
epochs, _, val_losses, tuned, taken, decays = zip(*whole)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
left.plot(epochs, val_losses, "o-", color="C3")
left.set(xlabel="epoch", ylabel="validation loss")
right.plot(epochs, tuned, "o-", color="C0", label="learning rate, tuned")
right.plot(
    epochs,
    [float(lr) for lr in taken],
    "o--",
    color="C0",
    label="learning rate, after the scheduler",
)
right.plot(epochs, decays, "o-", color="C2", label="weight decay, tuned")
right.set(xlabel="epoch", yscale="log")
right.legend(frameon=False)
plt.show()

# %% [markdown]
# ## None of it
#
# A method that asks only where training ended needs no part in the steps. `record`
# notes a batch; training may be anyone's: a framework's trainer, another optimizer,
# here LBFGS with the tuned decay in its loss. The optimizer that is wrapped never
# steps. It says what an optimum is: with the decay of `torch.optim.SGD`, a place where
# $\nabla L_{train}(\theta) + \lambda\, \theta = 0$.


# %%
def train_elsewhere(model, decay):
    trainer = torch.optim.LBFGS(
        model.parameters(), max_iter=200, line_search_fn="strong_wolfe"
    )

    def closure():
        trainer.zero_grad()
        loss = loss_of(model, train) + decay / 2 * sum(
            p.square().sum() for p in model.parameters()
        )
        loss.backward()
        return loss

    trainer.step(closure)


torch.manual_seed(0)
model = torch.nn.Linear(64, 10)
hyper = HyperOptimizer(
    model,
    torch.optim.SGD(model.parameters(), lr=0.1),
    loss_of,
    tune=[Hyperparameter("weight_decay", init=0.1, log=True)],
    method=Implicit(CG(max_steps=200)),
    hyper_optimizer=partial(torch.optim.Adam, lr=0.5),
)
for training in range(1, 19):
    decay = hyper.values()["weight_decay/group0"].item()
    train_elsewhere(model, decay)
    hyper.record(train)
    report = hyper.hyper_step(val)
    if training % 3 == 1:
        print(
            f"training {training:2}: decay {decay:.6f}, "
            f"validation loss {report.val_loss:.4f}"
        )

# %% [markdown]
# More: [recipes](../recipes.md) for evaluation mode, autocast and loaders with workers;
# [which method when](../how_to_choose.md).
