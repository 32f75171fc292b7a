"""Plots of evaluation results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from torch import Tensor

Numbers = npt.NDArray[np.float64]


def confusion_figure(counts: Tensor, names: Sequence[str]) -> Figure:
    """Plots a confusion matrix [C, C] of counts. Colours show fractions of the true class, numbers show rows."""
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    size = max(3.5, 0.7 * len(names) + 2)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), list(names), rotation=30, ha="right", parse_math=False)
    axes.set_yticks(range(len(names)), list(names), parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    for i, row in enumerate(counts.tolist()):
        for j, count in enumerate(row):
            axes.text(j, i, str(count), ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black")
    figure.colorbar(image, label="fraction of the true class")
    return figure


def similarity_figure(similarities: Tensor, names: Sequence[str]) -> Figure:
    """Plots a heat map of similarities [prompts, prompts] between -1 and 1."""
    size = max(3.5, 0.6 * len(names) + 2)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(similarities.numpy(), cmap="RdBu", vmin=-1, vmax=1)
    axes.set_xticks(range(len(names)), list(names), rotation=30, ha="right", parse_math=False)
    axes.set_yticks(range(len(names)), list(names), parse_math=False)
    for i, row in enumerate(similarities.tolist()):
        for j, value in enumerate(row):
            color = "white" if abs(value) > 0.6 else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=color)
    figure.colorbar(image, label="cosine similarity")
    return figure


def histogram_figure(scores: Mapping[str, Numbers], baselines: Mapping[str, float], baseline: str) -> Figure:
    """Plots histograms of scores [R] between 0 and 1, one panel each, with lines at the mean and at a baseline."""
    figure = Figure(figsize=(3.6 * len(scores) + 0.4, 3), layout="constrained")
    panels = figure.subplots(1, len(scores), sharey=True, squeeze=False)[0]
    for axes, (name, values) in zip(panels, scores.items(), strict=True):
        axes.hist(values, bins=25, range=(0, 1), color="tab:blue", alpha=0.6)
        axes.axvline(values.mean(), color="tab:blue", label=f"mean {values.mean():.3f}")
        if name in baselines:
            axes.axvline(baselines[name], color="black", ls="--", label=f"{baseline} {baselines[name]:.3f}")
        axes.set_xlabel(name)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("rows")
    return figure


def length_figure(lengths: Numbers, scores: Numbers, name: str) -> Figure:
    """Plots a score [R] against the length of each row's source [R], and its mean in ten bins of equal size."""
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter(lengths, scores, s=8, alpha=0.35, color="tab:blue", linewidths=0)
    bins = [rows for rows in np.array_split(lengths.argsort(kind="stable"), 10) if len(rows)]
    means = [(lengths[rows].mean(), scores[rows].mean()) for rows in bins]
    axes.plot(*zip(*means, strict=True), color="black", lw=1, label="mean")
    axes.set_xlabel("words of the source")
    axes.set_ylabel(name)
    axes.set_ylim(-0.02, 1.02)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def line_figure(positions: Sequence[float], scores: Mapping[str, Sequence[float]]) -> Figure:
    """Plots scores by name at positions between two prompts, one panel each."""
    figure = Figure(figsize=(3.8 * len(scores) + 0.4, 3), layout="constrained")
    panels = figure.subplots(1, len(scores), squeeze=False)[0]
    for axes, (name, values) in zip(panels, scores.items(), strict=True):
        ends = [0, -1]
        axes.plot([positions[i] for i in ends], [values[i] for i in ends], color="black", ls="--", lw=1)
        axes.plot(positions, values, marker="o", color="tab:blue")
        axes.set_xlabel("fraction of the other prompt")
        axes.set_ylabel(name)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
