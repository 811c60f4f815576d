"""Train torchvision's EfficientNet-B0, at half its width, on scikit-learn's handwritten digits: as it is and converted,
from the same seeds.

Runs of one seed start from the same weights and draw the same batches and masks, and yet part: training multiplies a
difference of one rounding until the losses differ in the first digit. So it is seeds that are compared, not runs.

python examples/digits.py docs/samples/digits
"""

import argparse
import json
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.models.efficientnet import EfficientNet, MBConvConfig

import effkernels

# Of each stage of EfficientNet-B0: expansion, kernel size, stride, input and output channels, blocks.
STAGES = (
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)
COLOURS = {"eager": "0.55", "effkernels": "tab:orange"}


def digits(size: int) -> tuple[Tensor, Tensor]:
    """1797 images [N, 3, size, size], about normal, in a fixed random order, and their labels."""
    images, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = (images.float().view(-1, 1, 8, 8)[order] - 5) / 6
    images = F.interpolate(images, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)
    return images.contiguous(memory_format=torch.channels_last), labels[order]


def network() -> nn.Module:
    stages = [MBConvConfig(*stage, width_mult=0.5, depth_mult=1.0) for stage in STAGES]
    return EfficientNet(stages, dropout=0.2, num_classes=10).to(memory_format=torch.channels_last)


def train(
    converted: bool, seed: int, images: Tensor, labels: Tensor, epochs: int, batch_size: int = 50, held_out: int = 297
) -> dict[str, Any]:
    """The mean loss of each epoch, and the accuracy on the images held out."""
    torch.manual_seed(seed)
    model = network().to(images.dtype)
    if converted:
        effkernels.convert(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    count = len(images) - held_out
    steps = epochs * (count // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for batch in torch.randperm(count).split(batch_size)[: count // batch_size]:
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        losses.append(total / (count // batch_size))
    with torch.no_grad():
        right = model.eval()(images[count:]).argmax(1) == labels[count:]
    return {"seed": seed, "losses": losses, "accuracy": right.float().mean().item()}


def plot(runs: dict[str, list[dict[str, Any]]], file: pathlib.Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, colour in COLOURS.items():
        losses = list(zip(*(run["losses"] for run in runs[name]), strict=True))
        epochs = range(1, len(losses) + 1)
        axes.fill_between(epochs, [min(e) for e in losses], [max(e) for e in losses], color=colour, alpha=0.3, lw=0)
        label = f"{name}: mean and range of {len(runs[name])} seeds"
        axes.plot(epochs, [statistics.mean(e) for e in losses], color=colour, label=label, lw=1.5, marker=".")
    axes.set(xlabel="epoch", ylabel="mean training loss", title="EfficientNet-B0 (half width) on handwritten digits")
    axes.set_yscale("log")
    axes.set_yticks([0.2, 0.5, 1, 2, 4], labels=["0.2", "0.5", "1", "2", "4"])
    axes.tick_params(which="minor", labelleft=False)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def summary(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Of each epoch's loss and of the accuracy: the means, and their difference with its standard error."""

    def row(name: str, eager: Sequence[float], ours: Sequence[float]) -> str:
        means = statistics.mean(eager), statistics.mean(ours)
        error = math.sqrt((statistics.variance(eager) + statistics.variance(ours)) / len(eager))
        return f"{name:>8}" + "".join(f"{value:12.3f}" for value in (*means, means[1] - means[0], error))

    titles = ("eager", "effkernels", "difference", "error")
    losses = [zip(*(run["losses"] for run in runs[name]), strict=True) for name in COLOURS]
    lines = [" " * 8 + "".join(f"{title:>12}" for title in titles)]
    lines += [row(str(epoch), *values) for epoch, values in enumerate(zip(*losses, strict=True), 1)]
    return "\n".join([*lines, row("accuracy", *([run["accuracy"] for run in runs[name]] for name in COLOURS))])


def main(folder: pathlib.Path, seeds: int = 20, epochs: int = 10, size: int = 32) -> None:
    images, labels = digits(size)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in COLOURS}
    for seed in range(seeds):
        for name in COLOURS:
            run = train(name == "effkernels", seed, images, labels, epochs)
            runs[name].append(run)
            losses = " ".join(f"{loss:.3f}" for loss in run["losses"])
            print(f"seed {seed}, {name}: losses {losses}; accuracy {run['accuracy']:.3f}", flush=True)
    print(summary(runs))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.json").write_text(json.dumps(runs, indent=1) + "\n")
    plot(runs, folder / "losses.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path, help="where runs.json and losses.png go")
    main(parser.parse_args().folder)
