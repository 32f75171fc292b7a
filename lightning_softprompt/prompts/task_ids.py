"""Which task the rows of a batch are of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_softprompt.core.types import Batch

ONLY = "task"  # the name of the one task, where the data module names none


def task_of_rows(batch: Batch, tasks: Sequence[str]) -> Tensor:
    """[B] the number of each row's task, or [1] where all rows are of one: what is made from it is then made once.

    Raises:
        ValueError: If there are several tasks, and the rows do not say which of them they are of.
    """
    device = batch.input_ids.device
    if len(tasks) == 1:
        return torch.zeros(1, dtype=torch.long, device=device)
    if batch.task_ids is None:
        raise ValueError(
            f"rows do not say which of the tasks {list(tasks)} they are of; give them task_ids, as MultitaskDataModule "
            f"does, or name the task"
        )
    first = batch.task_ids[:1]
    if int(batch.task_ids.max()) >= len(tasks):
        raise ValueError(f"rows are of task {int(batch.task_ids.max())}, but there are {len(tasks)}: {list(tasks)}")
    return first if bool((batch.task_ids == first).all()) else batch.task_ids
