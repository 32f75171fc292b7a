"""Figures of a pass."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor


def confusion_figure(counts: Tensor, names: Sequence[str]) -> Figure:
    """A confusion matrix [C, C] of counts: colours are shares of the true class, numbers are rows of the data."""
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    size = max(3.5, 0.7 * len(names) + 2)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), list(names), rotation=30, ha="right")
    axes.set_yticks(range(len(names)), list(names))
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    for i, row in enumerate(counts.tolist()):
        for j, count in enumerate(row):
            axes.text(j, i, str(count), ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black")
    figure.colorbar(image, label="share of the true class")
    return figure
