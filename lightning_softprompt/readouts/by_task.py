"""Class scores for several tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast, final

from torch import Tensor, nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.checkpoints.hyperparameters import class_of
from lightning_softprompt.core.types import Batch, Classes
from lightning_softprompt.readouts.base import Readout


@final
class ReadoutByTask(Readout):
    """A readout for each task that has classes; a batch uses the readout of its task.

    Args:
        codec: Codec of the backbone.
        classes: The classes of each task, in the order of the task ids; None for a task without classes.
        make: Creates the readout of a task.

    Raises:
        ValueError: If the readout cannot be used with the classes of a task, naming the task.
    """

    def __init__(
        self,
        codec: Codec,
        classes: Mapping[str, Classes | None],
        make: Callable[[Codec, Classes], Readout],
    ) -> None:
        super().__init__(codec, Classes({}))
        self.names = tuple(classes)
        self.of_tasks = nn.ModuleDict()
        for name, classes_of_task in classes.items():
            if classes_of_task is not None:
                self.of_tasks[name] = self._build_readout(name, make, classes_of_task)

    def _build_readout(self, name: str, make: Callable[[Codec, Classes], Readout], classes: Classes) -> Readout:
        try:
            return make(self.codec, classes)
        except ValueError as error:
            raise ValueError(f"task {name!r}: {error}") from error

    def build(self, backbone: Backbone) -> None:
        """Creates the parameters of each readout."""
        for readout in self.of_tasks.values():
            cast(Readout, readout).build(backbone)

    def forward(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Computes scores [B, C] of the classes of the rows' task.

        Raises:
            ValueError: If the rows belong to several tasks, or the task has no classes.
        """
        tasks = [self.names[task] for task, _, _ in batch.by_task()]
        if len(tasks) > 1:
            raise ValueError(
                f"class scores are defined for one task, but the rows are of {tasks}; use the parts of Batch.by_task"
            )
        if tasks[0] not in self.of_tasks:
            raise ValueError(f"the objective needs class scores, but task {tasks[0]!r} has no classes")
        return cast(Tensor, self.of_tasks[tasks[0]](lm, batch))


def build_readout(
    make: Callable[[Codec, Classes], Readout],
    codec: Codec,
    classes: Classes | None,
    by_task: Mapping[str, Classes | None] | None,
) -> Readout | None:
    """Creates the readout of one task or of several.

    None if the task has no classes, and neither answers nor their tokens are scored.
    """
    if by_task is not None:
        return ReadoutByTask(codec, by_task, make)
    readout = class_of(make)
    has_scores = getattr(readout, "scores_answers", False) or getattr(readout, "scores_tokens", False)
    if classes is None and not has_scores:
        return None
    return make(codec, classes or Classes({}))
