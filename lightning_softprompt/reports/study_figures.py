"""Plots of the results of a study and of a hyperparameter search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MAX_LABEL = 40  # characters of the label of a row


def interval_figure(rows: Sequence[str], results: Mapping[str, Mapping[str, tuple[float, float | None]]]) -> Figure:
    """Plots means with their intervals, one panel per metric and one line per row of the table.

    Args:
        rows: Labels of the rows, from top to bottom.
        results: By metric and label: the mean, and half the width of its interval or None.
    """
    size = (3.4 * len(results) + 1.5, 0.35 * len(rows) + 1.2)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, (metric, by_row) in zip(panels, results.items(), strict=True):
        for position, row in enumerate(rows):
            if row in by_row:
                mean, half_width = by_row[row]
                axes.errorbar(mean, position, xerr=half_width, fmt="o", color="tab:blue", capsize=3)
        axes.set_xlabel(metric, parse_math=False)
        axes.grid(axis="x", color="#e3e6ea", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    labels = [row if len(row) <= MAX_LABEL else f"{row[:MAX_LABEL]}..." for row in rows]
    panels[0].set_yticks(range(len(rows)), labels, parse_math=False)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    return figure


def search_figure(
    values: Sequence[float], options: Mapping[str, Sequence[Any]], is_log: Mapping[str, bool], metric: str, mode: str
) -> Figure:
    """Plots the result of each trial of a search over its number and over each option; the best one is marked.

    Args:
        values: Results of the trials, in their order.
        options: Values of each option, in the same order; None where a trial lacks it.
        is_log: Whether an option is sampled on a logarithmic scale.
        metric: Name of the result.
        mode: `min` or `max`.
    """
    best = values.index(min(values) if mode == "min" else max(values))
    figure = Figure(figsize=(3.2 * (len(options) + 1) + 0.5, 3.2), layout="constrained")
    panels = figure.subplots(1, len(options) + 1, sharey=True, squeeze=False)[0]
    columns: dict[str, Sequence[Any]] = {"trial": range(len(values)), **options}
    for axes, (name, positions) in zip(panels, columns.items(), strict=True):
        known = [number for number, position in enumerate(positions) if position is not None]
        is_numeric = all(isinstance(positions[number], int | float) for number in known)
        points = [positions[number] if is_numeric else str(positions[number]) for number in known]
        axes.plot(points, [values[number] for number in known], "o", color="tab:blue", alpha=0.7)
        if best in known:
            axes.plot(points[known.index(best)], values[best], "*", color="#d1495b", markersize=13, label="best")
        if is_log.get(name):
            axes.set_xscale("log")
        axes.set_xlabel(name, parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel(metric, parse_math=False)
    panels[0].legend(frameon=False)
    return figure
