"""A saved view of a W&B project: panels by kind of metric, and runs grouped by experiment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

PROMPT = ("prompt/norm", "prompt/moved", "prompt/grad_norm")
SPEED = ("speed/step_ms", "speed/tokens_per_s", "speed/memory_mb")
STEP = "trainer/global_step"
SECTIONS = ("by_class", "retrieval")  # sections of metrics besides those of a stage


def build_workspace(
    entity: str, project: str, metrics: Sequence[str], name: str, mode: Literal["min", "max"] = "max"
) -> Workspace:
    """Builds the view. Saving it is a call of its method `save`.

    Lines are the mean over the runs of a group, such as seeds, with the range from the smallest to the largest value.
    Runs are sorted by their best validation, the best run first.

    Args:
        entity: User or team of the project.
        project: The project.
        metrics: Metrics of validation and test, without their stage, such as `accuracy` or `retrieval/mrr`.
        name: Name of the view.
        mode: Whether lower or higher values of the best validation are better.

    Raises:
        ModuleNotFoundError: If the package `wandb-workspaces` is not installed.
    """
    from wandb_workspaces import workspaces
    from wandb_workspaces.reports.v2.interface import BarPlot, LinePlot, MediaBrowser, RunComparer

    def line(metric: str) -> LinePlot:
        return LinePlot(x=STEP, y=[metric], title=metric, groupby_aggfunc="mean", groupby_rangefunc="minmax")

    def bar(metric: str) -> BarPlot:
        return BarPlot(metrics=[metric], title=metric)

    def section(title: str, panels: Sequence[Any], is_open: bool = True) -> Any:
        return workspaces.Section(name=title, panels=list(panels), is_open=is_open)

    sections = [
        section("Validation", [line(metric_name("val", metric)) for metric in metrics]),
        section("Training", [line("train/loss")]),
        section("Test", [bar(metric_name("test", metric)) for metric in metrics]),
        section("Prompt", [line(metric) for metric in PROMPT], is_open=False),
        section("Speed", [line(metric) for metric in SPEED], is_open=False),
        section("Plots", [MediaBrowser(media_keys=["plots/learning_curve", "plots/val_confusion"])], is_open=False),
        section("Settings that differ", [RunComparer(diff_only=True)], is_open=False),
    ]
    columns = [f"summary:{name}" for name in ("best_value", "best_step", "trainable_parameters", "seconds")]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis=STEP),
        runset_settings=workspaces.RunsetSettings(
            groupby=[workspaces.Metric("Group")],
            order=[workspaces.Ordering(workspaces.Summary("best_value"), ascending=mode == "min")],
            pinned_columns=columns,
        ),
    )


def metric_name(stage: str, metric: str) -> str:
    """Returns the name of a metric on W&B.

    >>> metric_name("val", "f1"), metric_name("test", "f1/positive"), metric_name("test", "retrieval/mrr")
    ('val/f1', 'test/f1/positive', 'test_retrieval/mrr')
    """
    is_in_section = metric.partition("/")[0] in SECTIONS
    return f"{stage}_{metric}" if is_in_section else f"{stage}/{metric}"
