"""Tables and plots of `transfer.py`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from methods import format_interval

from lightning_softprompt.checkpoints.library import Library, soft_tokens
from lightning_softprompt.checkpoints.prompt_file import read_prompt
from lightning_softprompt.evaluation.figures import similarity_figure
from lightning_softprompt.prompts.similarity import similarities

Records = Sequence[dict[str, Any]]
Cell = tuple[str, str]
BASELINE = "prompt tuning, retuned"


def tables(records: Records) -> str:
    """Returns Markdown tables of metrics, differences from the baseline, the search, and untrained source prompts."""
    runs = [record for record in records if "seed" in record]
    cells = list_cells(runs)
    methods = dict.fromkeys(record["method"] for record in runs)
    names = sorted(methods, key=lambda name: name != BASELINE)
    parts = [metric_table(runs, cells, names, metric) for metric in ("accuracy", "macro_f1", "cross_entropy")]
    parts += [difference_table(runs, cells, names[1:]), search_table(records), source_table(records)]
    return "\n\n".join(parts)


def list_cells(runs: Records) -> list[Cell]:
    """Returns the pairs of a target and a number of rows."""
    return list(dict.fromkeys((run["task"], run["shots"]) for run in runs))


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def values_by_seed(runs: Records, cell: Cell, name: str, metric: str) -> dict[int, float]:
    """Returns the values of a metric by seed."""
    members = [run for run in runs if (run["task"], run["shots"]) == cell]
    return {run["seed"]: run[metric] for run in members if run["method"] == name}


def metric_table(runs: Records, cells: Sequence[Cell], names: Sequence[str], metric: str) -> str:
    """Returns a table with a row for each method, and a column for each target and number of rows."""
    rows = []
    for name in names:
        values_by_cell = [list(values_by_seed(runs, cell, name, metric).values()) for cell in cells]
        overall = fmean(chain(*values_by_cell))
        rows.append([name, *map(format_values, values_by_cell), f"{overall:.3f}"])
    return markdown([metric, *map(" ".join, cells), "mean"], rows)


def format_values(values: Sequence[float]) -> str:
    """Returns the mean and its interval as text; empty without values."""
    return format_interval(values) if values else ""


def difference_table(runs: Records, cells: Sequence[Cell], names: Sequence[str]) -> str:
    """Returns a table of differences in accuracy from the baseline with the same seed."""
    rows = []
    for name in names:
        differences_by_cell = []
        for cell in cells:
            values = values_by_seed(runs, cell, name, "accuracy")
            baseline = values_by_seed(runs, cell, BASELINE, "accuracy")
            differences_by_cell.append([values[seed] - baseline[seed] for seed in values.keys() & baseline])
        overall = format_interval(list(chain(*differences_by_cell)))
        rows.append([name, *map(format_values, differences_by_cell), overall])
    return markdown([f"accuracy, difference from {BASELINE}", *map(" ".join, cells), "all"], rows)


def search_table(records: Records) -> str:
    """Returns a table of validation losses by rate, the selected rate, and the similarities of sources."""
    searches = [record for record in records if record["method"] == "search"]
    rows = []
    for search in searches:
        losses = [f"{loss:.3f}" for loss in search["losses"].values()]
        similarities = [f"{name} {share:.3f}" for name, share in search["similarities"].items()]
        target, rate = f"{search['task']} {search['shots']}", f"{search['rate']:g}"
        rows.append([target, *losses, rate, ", ".join(similarities)])
    rates = [f"loss at {float(rate):g}" for rate in searches[0]["losses"]]
    return markdown(["target", *rates, "rate", "most similar sources"], rows)


def source_table(records: Records) -> str:
    """Returns a table of accuracy and loss of source prompts on targets."""
    tests = [record for record in records if record["shots"] == "none"]
    sources = list(dict.fromkeys(test["method"] for test in tests))
    targets = list(dict.fromkeys(test["task"] for test in tests))
    texts = {}
    for test in tests:
        accuracy, loss = test["accuracy"], test["cross_entropy"]
        texts[test["method"], test["task"]] = f"{accuracy:.3f} ({loss:.2f})"
    rows = [[source, *(texts[source, target] for target in targets)] for source in sources]
    return markdown(["source, not trained further: accuracy (loss)", *targets], rows)


def draw(records: Records, library: Library, queries: Sequence[Path], start: Path, path: Path) -> None:
    """Plots accuracies by method and cell, and similarities of the changes from the shared initial values."""
    prompts = {name: soft_tokens(saved, library.path(name)) for name, saved in library.read().items()}
    prompts |= {f"{query.stem}": soft_tokens(read_prompt(query), query) for query in queries}
    first = soft_tokens(read_prompt(start), start)
    changes = similarities([prompt - first for prompt in prompts.values()], "mean")
    similarity_figure(changes, list(prompts)).savefig(path.with_name(f"{path.stem}-similar.png"), dpi=120)
    accuracy_figure(records).savefig(path, dpi=120)


def accuracy_figure(records: Records) -> Any:
    """Returns a heat map of means over seeds."""
    from matplotlib.figure import Figure

    runs = [record for record in records if "seed" in record]
    cells = list_cells(runs)
    names = list(dict.fromkeys(run["method"] for run in runs))
    means = []
    for name in names:
        values = [values_by_seed(runs, cell, name, "accuracy") for cell in cells]
        means.append([fmean(seeds.values()) for seeds in values])
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.add_subplot()
    best = [max(column) for column in zip(*means, strict=True)]
    deficits = [[mean - top for mean, top in zip(row, best, strict=True)] for row in means]
    image = axes.imshow(deficits, cmap="Blues", aspect="auto", vmin=-0.15, vmax=0.05)
    axes.set_xticks(range(len(cells)), [" ".join(cell) for cell in cells], rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    for i, row in enumerate(means):
        for j, mean in enumerate(row):
            weight = "bold" if mean == best[j] else "normal"
            axes.text(j, i, f"{mean:.3f}", ha="center", va="center", weight=weight)
    figure.colorbar(image, label="accuracy, difference from the best method")
    return figure
