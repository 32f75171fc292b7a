"""Tables and pictures of `transfer.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from methods import interval

from lightning_softprompt.checkpoints.library import Library, soft_tokens
from lightning_softprompt.checkpoints.prompt_file import read_prompt
from lightning_softprompt.evaluation.figures import similarity_figure
from lightning_softprompt.prompts.similarity import similarities

Records = Sequence[dict[str, Any]]
Place = tuple[str, str]
BASE = "prompt tuning, retuned"


def tables(records: Records) -> str:
    """Markdown: each metric, differences from retuned prompt tuning, the search, and sources as they are."""
    runs = [r for r in records if "seed" in r]
    places = list(dict.fromkeys((r["task"], r["shots"]) for r in runs))
    names = sorted(dict.fromkeys(r["method"] for r in runs), key=lambda name: name != BASE)
    parts = [of_metric(runs, places, names, metric) for metric in ("accuracy", "macro_f1", "cross_entropy")]
    return "\n\n".join([*parts, differences(runs, places, names[1:]), searches(records), as_they_are(records)])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def values(runs: Records, place: Place, name: str, metric: str) -> dict[int, float]:
    """By seed."""
    return {r["seed"]: r[metric] for r in runs if (r["task"], r["shots"], r["method"]) == (*place, name)}


def of_metric(runs: Records, places: Sequence[Place], names: Sequence[str], metric: str) -> str:
    """A row for each method, a column for each target and number of rows."""
    rows = []
    for name in names:
        each = [list(values(runs, place, name, metric).values()) for place in places]
        overall = fmean(value for of in each for value in of)
        rows.append([name, *(interval(of) if of else "" for of in each), f"{overall:.3f}"])
    return markdown([metric, *(" ".join(place) for place in places), "mean"], rows)


def differences(runs: Records, places: Sequence[Place], names: Sequence[str]) -> str:
    """Accuracy less that of retuned prompt tuning with the same seed."""
    rows = []
    for name in names:
        pairs = [[values(runs, place, kind, "accuracy") for kind in (name, BASE)] for place in places]
        apart = [[own[seed] - base[seed] for seed in own.keys() & base] for own, base in pairs]
        rows.append([name, *(interval(of) if of else "" for of in apart), interval([d for of in apart for d in of])])
    return markdown([f"accuracy, less {BASE}", *(" ".join(place) for place in places), "all"], rows)


def searches(records: Records) -> str:
    """Validation losses by rate, the one taken, and the likest sources."""
    found = [r for r in records if r["method"] == "search"]
    rows = [
        [f"{r['task']} {r['shots']}", *(f"{loss:.3f}" for loss in r["losses"].values()), f"{r['rate']:g}",
         ", ".join(f"{name} {share:.3f}" for name, share in r["likest"].items())] for r in found
    ]  # fmt: skip
    return markdown(["target", *(f"loss at {float(rate):g}" for rate in found[0]["losses"]), "rate", "likest"], rows)


def as_they_are(records: Records) -> str:
    """Accuracy and loss of sources' prompts on targets."""
    found = {(r["method"], r["task"]): r for r in records if r["shots"] == "none"}
    sources, targets = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
    cells = {key: f"{r['accuracy']:.3f} ({r['cross_entropy']:.2f})" for key, r in found.items()}
    rows = [[source, *(cells[source, target] for target in targets)] for source in sources]
    return markdown(["source, not trained further: accuracy (loss)", *targets], rows)


def draw(records: Records, library: Library, queries: Sequence[Path], start: Path, path: Path) -> None:
    """Accuracies by method and place, and how alike sources and targets moved from the start that they share."""
    prompts = {name: soft_tokens(saved, library.path(name)) for name, saved in library.read().items()}
    prompts |= {f"{query.stem}": soft_tokens(read_prompt(query), query) for query in queries}
    first = soft_tokens(read_prompt(start), start)
    found = similarities([prompt - first for prompt in prompts.values()], "mean")
    similarity_figure(found, list(prompts)).savefig(path.with_name(f"{path.stem}-similar.png"), dpi=120)
    accuracies(records).savefig(path, dpi=120)


def accuracies(records: Records) -> Any:
    """A heat map; numbers are means over seeds."""
    from matplotlib.figure import Figure

    runs = [r for r in records if "seed" in r]
    places = list(dict.fromkeys((r["task"], r["shots"]) for r in runs))
    names = list(dict.fromkeys(r["method"] for r in runs))
    means = [[fmean(values(runs, place, name, "accuracy").values()) for place in places] for name in names]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.add_subplot()
    best = [max(column) for column in zip(*means, strict=True)]
    behind = [[mean - top for mean, top in zip(row, best, strict=True)] for row in means]
    image = axes.imshow(behind, cmap="Blues", aspect="auto", vmin=-0.15, vmax=0.05)
    axes.set_xticks(range(len(places)), [" ".join(place) for place in places], rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    for i, row in enumerate(means):
        for j, mean in enumerate(row):
            axes.text(j, i, f"{mean:.3f}", ha="center", va="center", weight="bold" if mean == best[j] else "normal")
    figure.colorbar(image, label="accuracy, less the column's best")
    return figure
