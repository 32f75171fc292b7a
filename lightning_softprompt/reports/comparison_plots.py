"""The plots of a comparison: learning curves, and scores by cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lightning_softprompt.reports.comparison import ComparedRun
from lightning_softprompt.reports.experiments import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_COLORS = 10  # lines of a legend, each with a color
MAX_LABEL = 50  # characters of a line of a legend
OTHERS = "#9aa4b2"  # color of runs without a line in the legend


def curve_figures(comparison: Comparison) -> Iterator[tuple[str, Figure]]:
    """Yields the validation curves of each monitored metric, with a title."""
    monitored: dict[str, list[ComparedRun]] = {}
    for run in comparison.runs:
        if run.summary.validation is not None:
            monitored.setdefault(run.summary.validation.metric, []).append(run)
    for metric, runs in monitored.items():
        colors = _Colors(comparison, runs)
        figure, (axes,) = _start_figure(1)
        for run in runs:
            curve = run.curve(f"val/{metric}")
            if curve:
                steps, values = zip(*curve, strict=True)
                marker = "o" if len(steps) < 30 else ""
                # logged steps start at 0
                axes.plot(
                    [step + 1 for step in steps], values, marker, linestyle="-", markersize=3, **colors.style(run)
                )
        _use_whole_numbers(axes)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(f"validation {_plain(metric)}")
        _add_legend(figure, axes)
        yield f"{metric} by step", figure


def cost_figures(comparison: Comparison) -> Iterator[tuple[str, Figure]]:
    """Yields the test scores by minutes and by parameters for each metric, with a title."""
    tested: dict[str, list[ComparedRun]] = {}
    for run in comparison.runs:
        if run.summary.test is not None:
            tested.setdefault(run.summary.test.metric, []).append(run)
    for metric, runs in tested.items():
        trained = [run for run in runs if run.summary.minutes is not None and run.summary.trainable_parameters]
        if trained:
            yield (
                f"{metric} by cost",
                _draw_cost(comparison, metric, trained, [run for run in runs if run not in trained]),
            )


def _draw_cost(comparison: Comparison, metric: str, trained: list[ComparedRun], others: list[ComparedRun]) -> Figure:
    colors = _Colors(comparison, [*trained, *others])
    figure, (by_minutes, by_parameters) = _start_figure(2)
    for axes, cost in ((by_minutes, "minutes"), (by_parameters, "trainable_parameters")):
        styles = _Colors(comparison, [*trained, *others]) if axes is by_parameters else colors
        for run in trained:
            axes.plot(getattr(run.summary, cost), _score(run), "o", markersize=5, **styles.style(run))
        for run in others:
            axes.axhline(_score(run), linestyle="--", linewidth=1, **styles.style(run))
    by_parameters.set_xscale("log")
    counts = {run.summary.trainable_parameters or 1 for run in trained}
    by_parameters.set_xticks(_choose_ticks(counts), minor=False)
    by_parameters.xaxis.set_major_formatter("{x:,.0f}")
    by_parameters.xaxis.set_minor_formatter("")
    by_minutes.set_xlabel("minutes of training")
    by_parameters.set_xlabel("trainable parameters")
    by_minutes.set_ylabel(f"test {_plain(metric)}")
    _add_legend(figure, by_minutes)
    return figure


def _score(run: ComparedRun) -> float:
    assert run.summary.test is not None
    return run.summary.test.value


class _Colors:
    """Gives the runs of an experiment one color, or those of a method if there are many experiments.

    Args:
        comparison: The comparison.
        runs: The runs of a plot.
    """

    def __init__(self, comparison: Comparison, runs: list[ComparedRun]) -> None:
        names = {run.folder: comparison.experiment_of(run).name for run in runs}
        if len(set(names.values())) > MAX_COLORS:
            names = {run.folder: run.summary.method for run in runs}
        self.names = names
        self.colors: dict[str, str] = {}
        for name in dict.fromkeys(names.values()):
            self.colors[name] = f"C{len(self.colors)}" if len(self.colors) < MAX_COLORS else OTHERS
        self._labelled: set[str] = set()

    def style(self, run: ComparedRun) -> Mapping[str, Any]:
        """Returns the color of a run, and the label of its color if it is the first run with it."""
        name = self.names[run.folder]
        color = self.colors[name]
        label = "_" if name in self._labelled or color == OTHERS else _plain(name)[:MAX_LABEL]
        self._labelled.add(name)
        return {"color": color, "label": label, "alpha": 0.8}


def _plain(text: Any) -> str:
    """Text for a figure, in which matplotlib would read `$` as the start of a formula."""
    return str(text).replace("$", r"\$")


def _use_whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _choose_ticks(values: Iterable[int]) -> list[int]:
    """Returns the values that have room for a label on a logarithmic axis.

    >>> _choose_ticks([100, 110, 1000])
    [100, 1000]
    """
    ordered = sorted(values)
    least_ratio = max(1.2, (ordered[-1] / ordered[0]) ** 0.2)
    ticks: list[int] = []
    for value in ordered:
        if not ticks or value >= least_ratio * ticks[-1]:
            ticks.append(value)
    return ticks


def _add_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower left", ncols=3)


def _start_figure(columns: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    grid = figure.subplots(1, columns, sharey=True, squeeze=False)
    for axes in grid[0]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e3e6ea", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, list(grid[0])
