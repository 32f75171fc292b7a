"""Plots of the scores of preferred and rejected answers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_softprompt.evaluation.metrics.text_rows import Numbers

BINS = 10  # of equal numbers of pairs
BETTER, WORSE = "tab:blue", "tab:red"


def preference_figures(columns: Mapping[str, Numbers]) -> dict[str, Figure]:
    """Returns the figures of pairs by name.

    Args:
        columns: The columns of all pairs by name, each [N].
    """
    return {
        "calibration": calibration_figure(columns["better"] - columns["worse"]),
        "score_by_length": length_figure(columns),
    }


def calibration_figure(differences: Numbers) -> Figure:
    """Plots the accuracy over the confidence: the sigmoid of the absolute difference [N] of scores, in ten bins."""
    figure = Figure(figsize=(4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    confidence = 1 / (1 + np.exp(-np.abs(differences)))
    correct = (np.sign(differences) + 1) / 2
    bins = [rows for rows in np.array_split(confidence.argsort(kind="stable"), BINS) if len(rows)]
    points = [(confidence[rows].mean(), correct[rows].mean()) for rows in bins]
    axes.plot([0.5, 1], [0.5, 1], color="black", ls="--", lw=1, label="calibrated")
    axes.plot(*zip(*points, strict=True), color=BETTER, marker="o", label="ten bins of equal size")
    axes.set_xlabel("confidence in the answer with the higher score")
    axes.set_ylabel("accuracy")
    axes.set_ylim(-0.02, 1.02)
    _tidy(axes)
    return figure


def length_figure(columns: Mapping[str, Numbers]) -> Figure:
    """Plots the score of each answer over its number of tokens."""
    figure = Figure(figsize=(4.5, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for name, label, color in (("better", "preferred", BETTER), ("worse", "rejected", WORSE)):
        axes.scatter(columns[f"{name}_length"], columns[name], s=8, alpha=0.4, color=color, linewidths=0, label=label)
    axes.set_xlabel("tokens of the answer")
    axes.set_ylabel("score")
    _tidy(axes)
    return figure


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
