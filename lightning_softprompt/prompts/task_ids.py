"""Task ids of the rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_softprompt.core.refusals import MissingTaskError
from lightning_softprompt.core.types import Batch

ONLY = "task"  # name of the task if the data module has a single one


def task_of_rows(batch: Batch, tasks: Sequence[str]) -> Tensor:
    """Returns the task id of each row [B], or one id [1] if all rows belong to the same task.

    With a single id, methods compute the prompt once.

    Raises:
        MissingTaskError: If there are several tasks, and the rows have no task ids.
        ValueError: If a task id is out of range.
    """
    device = batch.input_ids.device
    if len(tasks) == 1:
        return torch.zeros(1, dtype=torch.long, device=device)
    if batch.task_ids is None:
        raise MissingTaskError(
            f"rows have no task_ids to select one of the tasks {list(tasks)}; use MultitaskDataModule, or name the task"
        )
    first = batch.task_ids[:1]
    highest = int(batch.task_ids.max())
    if highest >= len(tasks):
        raise ValueError(f"task id {highest} is out of range for {len(tasks)} tasks: {list(tasks)}")
    return first if bool((batch.task_ids == first).all()) else batch.task_ids
