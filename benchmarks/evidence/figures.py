"""Figures of the evidence page, drawn from the results. A figure without results is not drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from claims import NUMBER, read_number
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_softprompt.evaluation.metrics.intervals import student_interval
from lightning_softprompt.system.atomic_files import write_file

Result = Mapping[str, Any]
MARKERS = "osD^vPX*"  # readable without colours
METADATA = {"Software": None}  # so that the same results give the same file


def draw_figures(results: Sequence[Result], folder: Path) -> dict[str, str]:
    """Draws the figures to a folder, and returns their captions by path relative to the page."""
    captions = {}
    for name, (caption, draw) in FIGURES.items():
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        if draw(axes, [result for result in results if "test" in result]):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{name}.png"
            with (folder / f"{name}.part").open("wb") as file:
                figure.savefig(file, dpi=120, format="png", metadata=METADATA)
            write_file(path, (folder / f"{name}.part").read_bytes())
            (folder / f"{name}.part").unlink()
            captions[f"{folder.name}/{path.name}"] = caption
    return captions


def group(results: Sequence[Result], key: Callable[[Result], Any]) -> dict[Any, list[Result]]:
    """Groups results by a key."""
    groups: dict[Any, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return groups


def draw_cost(axes: Axes, results: Sequence[Result]) -> bool:
    """Draws accuracy over the number of trainable parameters."""
    trained = [r for r in results if r["block"] == "classification" and r.get("trainable_parameters")]
    for marker, (method, members) in zip(MARKERS, group(trained, lambda r: r["method"]).items(), strict=False):
        mean, half_width = student_interval([result["test"] for result in members])
        error = half_width if np.isfinite(half_width) else 0.0
        size = members[0]["trainable_parameters"]
        axes.errorbar(size, mean, error, marker=marker, capsize=3, label=method, linestyle="none")
    axes.set(xscale="log", xlabel="trainable parameters", ylabel="accuracy, SST-2 test")
    if trained:
        axes.legend()
    return bool(trained)


def draw_series(axes: Axes, results: Sequence[Result], blocks: Sequence[str], xlabel: str) -> bool:
    """Draws the test metric over the number in the names of the methods, a line per block and method."""
    series = group(
        [result for result in results if result["block"] in blocks],
        lambda r: (r["block"], r["task"], NUMBER.sub("", r["method"])),
    )
    for marker, ((block, _, method), members) in zip(MARKERS, series.items(), strict=False):
        by_number = group(members, lambda r: read_number(r["method"]))
        numbers = sorted(by_number)
        means = [float(np.mean([result["test"] for result in by_number[number]])) for number in numbers]
        axes.plot(numbers, means, marker=marker, label=f"{block}: {method.rpartition(',')[0]}")
    axes.set(xscale="log", xlabel=xlabel, ylabel="test metric, mean over seeds")
    if series:
        axes.legend()
    return bool(series)


def draw_length(axes: Axes, results: Sequence[Result]) -> bool:
    """Draws the test metric over the length of the prompt."""
    blocks = ["length", "length with few rows", "prefix length", "length for question types", "length for generation"]
    return draw_series(axes, results, blocks, "length")


def draw_rows(axes: Axes, results: Sequence[Result]) -> bool:
    """Draws accuracy over the number of training rows."""
    return draw_series(axes, results, ["few rows"], "training rows per class, SST-2")


FIGURES: Mapping[str, tuple[str, Callable[[Axes, Sequence[Result]], bool]]] = {
    "cost": ("accuracy over the number of trainable parameters", draw_cost),
    "rows": ("accuracy over the number of training rows", draw_rows),
    "length": ("test metric over the length of the prompt", draw_length),
}
