"""Class scores of several tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast, final

from torch import Tensor, nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.types import Batch, Classes
from lightning_softprompt.readouts.base import Readout


@final
class ReadoutByTask(Readout):
    """A readout for each task that has classes; a batch is read by that of its rows' task.

    Args:
        codec: The backbone's.
        classes: How the classes of each task are spoken, in the order of the tasks' numbers; None where it has none.
        make: Makes the readout of a task.

    Raises:
        ValueError: Naming the task, if its classes do not suit the readout.
    """

    def __init__(
        self,
        codec: Codec,
        classes: Mapping[str, Classes | None],
        make: Callable[[Codec, Classes], Readout],
    ) -> None:
        super().__init__(codec, Classes({}))
        self.names = tuple(classes)
        self.of_tasks = nn.ModuleDict(
            {name: self._made(name, make, own) for name, own in classes.items() if own is not None}
        )

    def _made(self, name: str, make: Callable[[Codec, Classes], Readout], classes: Classes) -> Readout:
        try:
            return make(self.codec, classes)
        except ValueError as error:
            raise ValueError(f"task {name!r}: {error}") from error

    def build(self, backbone: Backbone) -> None:
        """Makes the parameters of each."""
        for readout in self.of_tasks.values():
            cast(Readout, readout).build(backbone)

    def forward(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Scores [B, C] of the classes of the one task that the rows are of.

        Raises:
            ValueError: If they are of several, which differ in their classes, or the task has none.
        """
        tasks = [self.names[task] for task, _, _ in batch.by_task()]
        if len(tasks) > 1:
            raise ValueError(f"classes are those of one task, but the rows are of {tasks}; score Batch.by_task apart")
        if tasks[0] not in self.of_tasks:
            raise ValueError(f"class scores were asked for, but task {tasks[0]!r} has no classes")
        return cast(Tensor, self.of_tasks[tasks[0]](lm, batch))
