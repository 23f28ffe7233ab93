"""Half of the training labels are wrong: a weight for each example, tuned on a few clean validation images.

As in Franceschi et al. 2017. Each example's loss counts with the weight sigmoid(logit), and every 20 training
steps an implicit hypergradient moves all logits. Every step takes all images: only those of recorded batches
get a hypergradient. The rivals train on the noisy images, on the clean validation images, and on both; each
has that decay of a grid which is best on the test images, which favours it; the tuned run has a fixed one.
The last two rows train anew: on what the weights keep (above 0.5) and validation images, and on right labels.

    python examples/data_cleaning.py
    python examples/data_cleaning.py --dataset mnist --data-root data --download

It prints tables, and draws the weights of right and wrong labels; a minute on scikit-learn's digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor, nn
from tqdm import tqdm

from command_line import option_parser, parse, saved, spread, table
from common import Batch, Data, accuracy_of, joined, load_data, loss_of, make_mlp, plain_step
from torch_hypergrad import HyperOptimizer, Implicit, Neumann

SIZES = {"digits": (1000, 200), "mnist": (5000, 1000)}
NUM_HIDDEN = 64
GRID = (1e-3, 3e-3, 1e-2, 3e-2)
DECAY, WARMUP, HYPER_EVERY = 1e-2, 100, 20  # of the tuned run


def make(data: Data, seed: int, decay: float) -> tuple[nn.Module, torch.optim.SGD]:
    model = make_mlp(data.train[0].shape[1], NUM_HIDDEN, seed)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=decay)


def learn_weights(data: Data, num_steps: int, seed: int) -> tuple[nn.Module, Tensor]:
    """All of the tuning: the trained network, and one weight for each training example."""
    logits = torch.zeros(len(data.train[1]), requires_grad=True)

    def weighted_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        indices, images, labels = batch
        losses = F.cross_entropy(model(images), labels, reduction="none")
        return (torch.sigmoid(logits[indices]) * losses).mean()

    model, optimizer = make(data, seed, DECAY)
    hyper = HyperOptimizer(
        model,
        optimizer,
        weighted_loss,
        tune=[("logits", logits)],
        method=Implicit(Neumann(num_terms=20, damping=0.1)),
        hyper_optimizer=partial(torch.optim.Adam, lr=0.3, betas=(0.5, 0.9)),
        val_loss=loss_of,
    )
    batch = torch.arange(len(logits)), *data.train
    for step in range(1, num_steps + 1):
        hyper.step(batch)
        if step >= WARMUP and step % HYPER_EVERY == 0:
            hyper.hyper_step(data.val)
    return model, torch.sigmoid(logits.detach())


def best_accuracy(batch: Batch, data: Data, num_steps: int, seed: int, bar: tqdm) -> float:
    """Of plain training on ``batch``, with that decay of the grid which is best on the test images."""
    accuracies = []
    for decay in GRID:
        model, optimizer = make(data, seed, decay)
        for _ in range(num_steps):
            plain_step(model, optimizer, batch)
        accuracies.append(accuracy_of(model, data.test))
        bar.update()
    return max(accuracies)


def with_wrong_labels(batch: Batch, seed: int) -> tuple[Batch, Tensor]:
    """A random half of the labels gets one of the nine other classes; and which half."""
    images, labels = batch
    generator = torch.Generator().manual_seed(seed)
    is_wrong = torch.zeros(len(labels), dtype=torch.bool)
    is_wrong[torch.randperm(len(labels), generator=generator)[: len(labels) // 2]] = True
    others = (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10
    return (images, torch.where(is_wrong, others, labels)), is_wrong


def compare(clean: Data, num_steps: int, seed: int, bar: tqdm) -> tuple[dict[str, float], Tensor, Tensor]:
    """Test accuracies, the weights, and which labels are wrong."""
    noisy, is_wrong = with_wrong_labels(clean.train, seed)
    data = Data(noisy, clean.val, clean.test)
    model, weights = learn_weights(data, num_steps, seed)
    bar.update()
    keep = weights > 0.5
    batches = {
        "noisy training images": noisy,
        "clean validation images": data.val,
        "both together": joined(noisy, data.val),
        "kept by the weights, and validation": joined((noisy[0][keep], noisy[1][keep]), data.val),
        "right labels, which nobody knows": (noisy[0][~is_wrong], noisy[1][~is_wrong]),
    }
    accuracies = {name: best_accuracy(batch, data, num_steps, seed, bar) for name, batch in batches.items()}
    return {"noisy, one tuned weight for each": accuracy_of(model, data.test)} | accuracies, weights, is_wrong


def draw(weights: Tensor, is_wrong: Tensor) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    of_labels = [weights[~is_wrong].numpy(), weights[is_wrong].numpy()]
    kinds, colors = ["right label", "wrong label"], ["#0072B2", "#D55E00"]
    left.hist(of_labels, bins=20, range=(0, 1), color=colors, label=kinds)
    left.set(title="learned weights", xlabel="weight of the example", ylabel="number of examples")
    left.legend(frameon=False)
    false_alarms, found, _ = roc_curve(is_wrong, 1 - weights)
    right.plot(false_alarms, found, color="#000000", label=f"area {roc_auc_score(is_wrong, 1 - weights):.3f}")
    right.plot([0, 1], [0, 1], color="#999999", ls=":", label="chance")
    right.set_title("wrong labels by low weight")
    right.set(xlabel="right labels taken for wrong", ylabel="wrong labels found")
    right.legend(frameon=False, loc="lower right")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(option_parser(__doc__, "data_cleaning", steps=500, seeds=3), argv, SIZES, min_steps=WARMUP)
    of_seeds = load_data(args)
    with tqdm(total=args.seeds * (1 + 5 * len(GRID)), unit="run") as bar:
        runs = [compare(data, args.steps, seed, bar) for seed, data in enumerate(of_seeds)]
    noisy = f"{args.train_size} training images with half of their labels wrong"
    print(f"\n{args.dataset}: {noisy}, {args.val_size} clean ones\n")
    rows = [[name, spread([run[0][name] for run in runs], 1)] for name in runs[0][0]]
    print(table(["training on", "test accuracy (%)"], rows) + "\n")
    num_wrong = args.train_size // 2
    found = spread([(weights[is_wrong] < 0.5).sum().item() for _, weights, is_wrong in runs], 0)
    lost = spread([(weights[~is_wrong] < 0.5).sum().item() for _, weights, is_wrong in runs], 0)
    rows = [["wrong", num_wrong, found], ["right", args.train_size - num_wrong, lost]]
    print(table(["labels", "of", "weight under 0.5"], rows))
    areas = [roc_auc_score(is_wrong, 1 - weights) for _, weights, is_wrong in runs]
    print(f"\nArea under the ROC curve: {spread(areas, 3)}")
    _, weights, is_wrong = runs[0]
    print(f"Picture of the first seed: {saved(draw(weights, is_wrong), args.out / 'weights.png')}")


if __name__ == "__main__":
    main()
