"""What a method uses of a data module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.checkpoints.hyperparameters import to_plain
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import Classes
from lightning_softprompt.evaluation.base import Evaluation


class TaskData(Protocol):
    """The part of a data module that a method uses: task, evaluation and backbone."""

    spec: BackboneSpec

    @property
    def classes(self) -> Classes | None:
        """The classes and their label words, if the task has any."""

    @property
    def classes_by_task(self) -> Mapping[str, Classes | None] | None:
        """The classes of each of several tasks by name; None for a single task."""

    @property
    def evaluation(self) -> Evaluation:
        """How answers are scored."""


def formats_of(data: Any) -> Mapping[str, RowFormat]:
    """Returns the row formats of a data module by task; empty for None or another object."""
    return getattr(data, "row_formats", {})


def plain_formats(formats: Mapping[str, RowFormat]) -> dict[str, Any]:
    """Returns row formats as plain values, for files."""
    return {task: to_plain(asdict(row_format)) for task, row_format in formats.items()}
