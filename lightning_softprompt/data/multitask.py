"""Training on several tasks in one run."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast, final

import torch
from torch import nn

from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import Batch, Classes, Encoded, Example
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.data.prepared import Collate, PreparedRows, Split
from lightning_softprompt.data.readers.sources import DataError, Rows
from lightning_softprompt.data.sampling.bucketing import BucketBatchSampler, Order, ResumableLoader
from lightning_softprompt.data.sampling.resumable import ResumableBatchSampler
from lightning_softprompt.data.sampling.shared_batches import SharedBatches, SharedBatchSampler
from lightning_softprompt.data.sampling.task_mixing import MixedBatchSampler, Proportional, Sampling, quotas
from lightning_softprompt.data.splits.row_source import Source
from lightning_softprompt.data.token_cache import content_key
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.by_task import EvaluationByTask

T = TypeVar("T")
NAME = re.compile(r"\w[\w-]*")
RESERVED = {*dir(nn.ModuleDict()), *dir(nn.ParameterDict())}  # these hold modules and parameters by task name
TASK = "task"  # the column that names the task of a row to predict


@dataclass(frozen=True)
class MixedRows(PreparedRows):
    """Rows of several tasks, with one numbering for all tasks.

    Args:
        tasks: Task id of each row.
        numbers: Index of each row in its task.
    """

    tasks: Sequence[int]
    numbers: Sequence[int]


@dataclass(frozen=True)
class MixedCollate:
    """Collates items of `MixedRows` into a batch. Picklable, so that data workers can use it."""

    codec: Codec
    tasks: Sequence[int]
    numbers: Sequence[int]

    def __call__(self, items: Sequence[tuple[int, Encoded, Example]]) -> Batch:
        """Returns the batch with the task of each row, and its index in its task and over all tasks."""
        global_row_ids = tuple(row for row, _, _ in items)
        task_items = [(self.numbers[row], encoded, example) for row, encoded, example in items]
        task_ids = torch.tensor([self.tasks[row] for row in global_row_ids])
        return replace(Collate(self.codec)(task_items), task_ids=task_ids, global_row_ids=global_row_ids)


@final
class MultitaskDataModule(SoftPromptDataModule):
    r"""Trains on several tasks. Each task has its own data module with its template, classes, metrics and batch size.

    By default, all rows of a training batch belong to one task: they share the template and the prompt, which are then
    computed once per batch, and the loss is the same mean over rows as in single-task training. To use several tasks
    in one optimizer step, set `trainer.accumulate_grad_batches`. To use several tasks in one batch, set `together`; the
    rows of each task then pass through the backbone separately.

        softprompt fit --model MPT --data MultitaskDataModule --data.sampling Temperature \
            --data.tasks '{sst2: configs/data/sst2.yaml, rte: configs/data/rte.yaml}' --data.tasks.rte.batch_size 4

    Metrics are logged as `<task>/<metric>`. `macro`, the mean of one score per task, selects the best checkpoint. If
    some tasks have classes and others have tags, set `--model.readout AutoReadout`. Rows to predict come from the
    sources of the tasks, or from one source with a column `task`.

    Args:
        tasks: Data module of each task by name. Task ids follow this order.
        sampling: How often each task is sampled in training.
        epoch_batches: Batches per epoch (default: the sum over tasks). With the default and `Proportional` sampling, an
            epoch is each row once, unless tasks share batches.
        together: Put rows of several tasks into each training batch (default: one task per batch).
        scores: Metric of each task that `macro` averages (default: the monitored metric of the task).
        predict: Source of the rows to predict, with a column `task` (default: the `predict` sources of the tasks).
        backbone: The frozen language model of all tasks. The data module uses only its tokenizer.
        seed: Seed of the order of tasks in training. Each task has its own seed for the order of its rows.
        num_workers: Number of processes that prepare batches.

    Raises:
        ValueError: If there are no tasks, a task name is not valid as a name of metrics and parameters, or a task has
            another backbone, compares answers, or has a curriculum that follows the training. Later, if a task
            resamples its rows in each epoch.
    """

    def __init__(
        self,
        tasks: dict[str, SoftPromptDataModule],
        sampling: Sampling | None = None,
        epoch_batches: int | None = None,
        together: SharedBatches | None = None,
        scores: dict[str, str] | None = None,
        predict: Source | None = None,
        backbone: BackboneSpec | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        spec = _common_backbone(backbone, tasks)
        super().__init__("{soft}{target}", spec, predict=predict, seed=seed, num_workers=num_workers)
        if wrong := [name for name in tasks if not NAME.fullmatch(name) or name in RESERVED]:
            raise ValueError(
                "names of tasks may contain only letters, digits, _ and -, and may not be names that PyTorch reserves, "
                f"such as type, got {wrong}"
            )
        if compared := [name for name, task in tasks.items() if task.compares_answers]:
            raise ValueError(
                f"MultitaskDataModule cannot compare answers, but the tasks {compared} do; train them alone"
            )
        curricula = {name: task.curriculum for name, task in tasks.items() if task.curriculum is not None}
        if self_paced := [name for name, curriculum in curricula.items() if curriculum.uses_trained_model]:
            raise ValueError(f"SelfPaced requires a single task, but the tasks {self_paced} use it; use Competence")
        self.tasks = dict(tasks)
        for task in self.tasks.values():
            task.spec = self.spec
        self.sampling = sampling or Proportional()
        self.epoch_batches, self.together, self.scores = epoch_batches, together, dict(scores or {})

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """The column `task`."""
        return (TASK,)

    @property
    def classes_by_task(self) -> Mapping[str, Classes | None]:
        """The classes of each task; None for tasks without classes."""
        return self._map_tasks(lambda task: task.classes)

    @property
    def row_formats(self) -> Mapping[str, RowFormat]:
        """How the rows of each task are written."""
        return {name: task.row_formats[""] for name, task in self.tasks.items()}

    @property
    def evaluation(self) -> Evaluation:
        """The evaluations of all tasks."""
        return EvaluationByTask(self._map_tasks(lambda task: task.evaluation), self.scores)

    def _map_tasks(
        self, function: Callable[[SoftPromptDataModule], T], names: Sequence[str] | None = None
    ) -> dict[str, T]:
        """Applies a function to the data module of each task, and adds the task to error messages."""
        results = {}
        for name in self.tasks if names is None else names:
            try:
                results[name] = function(self.tasks[name])
            except ValueError as error:
                raise DataError(f"task {name!r}: {error}") from error
        return results

    def prepare_data(self) -> None:
        """Prepares the data of each task."""
        self._map_tasks(lambda task: task.prepare_data())

    def example(self, row: Mapping[str, Any], labelled: bool) -> Example:
        """Converts a row with the data module of the task in its column `task`."""
        return self.tasks[self._task_of(row)].example(row, labelled)

    def _task_of(self, row: Mapping[str, Any]) -> str:
        if row.get(TASK) not in list(self.tasks):  # the value may be unhashable, such as a list
            raise ValueError(f"column {TASK!r} must name one of the tasks {list(self.tasks)}, got {row.get(TASK)!r}")
        return str(row[TASK])

    def prepare_split(self, name: Split) -> MixedRows:
        """Prepares the split of each task and numbers all rows.

        Raises:
            ValueError: If a task resamples its rows in each epoch.
        """
        for task in self.tasks.values():
            task.codec, task.trainer = self.codec, self.trainer
        self._refuse_resampling()
        if name == "predict" and self.sources["predict"] is not None:
            return self._split_by_task(self.rows("predict"))
        return self._concatenate(self._map_tasks(lambda task: task.split(name), self._tasks_with(name)))

    def _refuse_resampling(self) -> None:
        """Refuses rows that change in each epoch, which may depend on the backbone.

        Raises:
            ValueError: If a task has such rows.
        """
        if resampled := [name for name, task in self.tasks.items() if task.resamples]:
            raise ValueError(
                f"MultitaskDataModule cannot resample rows in each epoch, but the tasks {resampled} do; train them "
                "alone, or remove their noise, order=shuffled, target=any, augment, corruption and sentence pairs"
            )

    def _tasks_with(self, split: Split) -> list[str]:
        """The tasks that have a split. Only the split `predict` is optional."""
        if split != "predict":
            return list(self.tasks)
        names = [name for name, task in self.tasks.items() if task.sources[split] is not None]
        if not names:
            raise ValueError(
                f"no source of predict rows; set data.predict to rows with a column {TASK!r}, or "
                f"data.tasks.{next(iter(self.tasks))}.predict"
            )
        return names

    def _concatenate(self, parts: Mapping[str, PreparedRows]) -> MixedRows:
        """All rows of the first task, then those of the second, and so on."""
        numbered = [(task, number) for task, part in self._parts_by_id(parts) for number in range(len(part))]
        return self._mix(parts, numbered)

    def _split_by_task(self, rows: Rows) -> MixedRows:
        """Prepares each row with the data module of its task, and returns the rows in their original order."""
        indices: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            try:
                indices.setdefault(self._task_of(row), []).append(i)
            except ValueError as error:
                raise DataError(f"{rows.where(i)}: {error}") from None
        for name, task_indices in indices.items():
            self.tasks[name].set_rows("predict", rows.only(task_indices))
        parts = self._map_tasks(lambda task: task.split("predict"), list(indices))
        positions = {rows.where(i): i for i in range(len(rows))}
        ordered = []
        for task, part in self._parts_by_id(parts):
            ordered += [(positions[where], task, number) for number, where in enumerate(part.where)]
        return self._mix(parts, [(task, number) for _, task, number in sorted(ordered)])

    def _parts_by_id(self, parts: Mapping[str, PreparedRows]) -> list[tuple[int, PreparedRows]]:
        return [(task, parts[name]) for task, name in enumerate(self.tasks) if name in parts]

    def _mix(self, parts: Mapping[str, PreparedRows], order: Sequence[tuple[int, int]]) -> MixedRows:
        """Returns rows by task id and index in the task."""
        by_number = dict(self._parts_by_id(parts))
        selected = [(by_number[task], number) for task, number in order]
        return MixedRows(
            [part.examples[number] for part, number in selected],
            [part.encoded[number] for part, number in selected],
            [part.origins[number] for part, number in selected],
            array("l", [task for task, _ in order]),
            array("l", [number for _, number in order]),
        )

    def rows_with_tasks(self, name: Split) -> MixedRows:
        """Returns a split with the task of each row."""
        return cast(MixedRows, self.split(name))

    def describe_row(self, name: Split, row: int) -> dict[str, Any]:
        """Describes a row, including the name of its `task`."""
        rows = self.rows_with_tasks(name)
        task = list(self.tasks)[rows.tasks[row]]
        return {TASK: task, **self.tasks[task].describe_row(name, rows.numbers[row])}

    def identity(self, name: Split) -> str:
        """Returns a hash of a split's rows, of their tasks, and of the classes."""
        return content_key([super().identity(name), self.classes_by_task, *self.rows_with_tasks(name).tasks])

    def rows_digest(self, name: Split) -> str:
        """Returns the number of rows of a split, with a digest of their texts, labels, tokens and tasks in order."""
        rows, _, digest = super().rows_digest(name).partition(" rows (")
        return f"{rows} rows ({content_key([digest, *self.rows_with_tasks(name).tasks])[:12]})"

    def build_loader(self, name: Split, order: Order) -> ResumableLoader:
        """Returns a loader whose batches are of one task, or of several with `together`."""
        rows = self.rows_with_tasks(name)
        collate = MixedCollate(self.codec, rows.tasks, rows.numbers)
        return ResumableLoader(rows, self._sampler(name, order), collate, num_workers=self.num_workers)

    def _sampler(self, name: Split, order: Order) -> ResumableBatchSampler:
        if order == "given":
            smallest = min(task.eval_batch_size for task in self.tasks.values())
            rank, world = self.ranks
            return BucketBatchSampler(self.split(name).lengths, smallest, order=order, rank=rank, world_size=world)
        if order == "shuffled" and self.together is not None:
            return self._build_shared_sampler(self.together)
        samplers = self._map_tasks(lambda task: task.sampler(name, order, self.ranks))
        counts = self._counts(samplers) if order == "shuffled" else None
        return MixedBatchSampler(list(samplers.values()), counts, self.seed)

    def _build_shared_sampler(self, together: SharedBatches) -> SharedBatchSampler:
        samplers = self._map_tasks(lambda task: task.sampler("train", "shuffled", (0, 1)))
        rates = self.sampling.rates({name: len(sampler.lengths) for name, sampler in samplers.items()})
        return SharedBatchSampler(list(samplers.values()), together, rates, self.epoch_batches, self.seed, self.ranks)

    def _counts(self, samplers: Mapping[str, BucketBatchSampler]) -> list[int]:
        """Number of batches of each task in an epoch."""
        sizes = {name: len(sampler.lengths) for name, sampler in samplers.items()}
        rates = zip(self.sampling.rates(sizes), sizes.values(), samplers.values(), strict=True)
        weights = [rate / size * len(sampler) for rate, size, sampler in rates]
        return quotas(self.epoch_batches or sum(map(len, samplers.values())), weights)


def _common_backbone(backbone: BackboneSpec | None, tasks: Mapping[str, SoftPromptDataModule]) -> BackboneSpec:
    """Returns the backbone of all tasks.

    Raises:
        ValueError: If there are no tasks, or the tasks name different backbones.
    """
    if not tasks:
        raise ValueError(
            "MultitaskDataModule requires tasks; name each, as in --data.tasks='{sst2: configs/data/sst2.yaml}'"
        )
    named = {name: task.spec for name, task in tasks.items() if task.spec != BackboneSpec()}
    common = backbone or next(iter(named.values()), BackboneSpec())
    others = [name for name, spec in named.items() if spec != common]
    if others:
        raise ValueError(f"all tasks share one backbone, but {others} name another than {common.name}; set it once")
    return common
