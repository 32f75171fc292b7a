"""A saved view of a W&B project: panels by kind of metric, and runs grouped by experiment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

PROMPT = ("prompt/norm", "prompt/moved", "prompt/grad_norm")
SPEED = ("speed/step_ms", "speed/tokens_per_s", "speed/memory_mb")
STEP = "trainer/global_step"


def build_workspace(entity: str, project: str, metrics: Sequence[str], name: str) -> Workspace:
    """Builds the view. Saving it is a call of its method `save`.

    Lines are the mean over the runs of a group, such as seeds, with the range from the smallest to the largest value.

    Args:
        entity: User or team of the project.
        project: The project.
        metrics: Metrics of validation and test, without their stage.
        name: Name of the view.

    Raises:
        ModuleNotFoundError: If the package `wandb-workspaces` is not installed.
    """
    from wandb_workspaces import workspaces
    from wandb_workspaces.reports.v2.interface import BarPlot, LinePlot, MediaBrowser, RunComparer

    def line(metric: str) -> LinePlot:
        return LinePlot(x=STEP, y=[metric], title=metric, groupby_aggfunc="mean", groupby_rangefunc="minmax")

    def section(title: str, panels: Sequence[Any], is_open: bool = True) -> Any:
        return workspaces.Section(name=title, panels=list(panels), is_open=is_open)

    sections = [
        section("Validation", [line(f"val/{metric}") for metric in metrics]),
        section("Training", [line("train/loss")]),
        section("Test", [BarPlot(metrics=[f"test/{metric}"], title=f"test/{metric}") for metric in metrics]),
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
            order=[workspaces.Ordering(workspaces.Summary("best_value"), ascending=False)],
            pinned_columns=columns,
        ),
    )
