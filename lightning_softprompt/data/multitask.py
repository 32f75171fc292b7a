"""Several tasks in one run."""

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
from lightning_softprompt.data.datamodule import Collate, Prepared, SoftPromptDataModule, Source, Split
from lightning_softprompt.data.readers.sources import DataError, Rows
from lightning_softprompt.data.sampling.bucketing import BucketBatchSampler, Order, ResumableLoader
from lightning_softprompt.data.sampling.resumable import ResumableBatchSampler
from lightning_softprompt.data.sampling.shared_batches import SharedBatches, SharedBatchSampler
from lightning_softprompt.data.sampling.task_mixing import MixedBatchSampler, Proportional, Sampling, quotas
from lightning_softprompt.data.token_cache import content_key
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.by_task import EvaluationByTask

T = TypeVar("T")
NAME = re.compile(r"\w[\w-]*")
TAKEN = {*dir(nn.ModuleDict()), *dir(nn.ParameterDict())}  # where what tasks have of their own is kept by name
TASK = "task"  # the column of rows to be predicted that names their task


@dataclass(frozen=True)
class MixedRows(Prepared):
    """Rows of several tasks, numbered through all of them.

    Args:
        tasks: Of each row the number of its task.
        numbers: Of each row its number among those of its task.
    """

    tasks: Sequence[int]
    numbers: Sequence[int]


@dataclass(frozen=True)
class MixedCollate:
    """Makes rows of `MixedRows` one batch; picklable, for data workers."""

    codec: Codec
    tasks: Sequence[int]
    numbers: Sequence[int]

    def __call__(self, items: Sequence[tuple[int, Encoded, Example]]) -> Batch:
        """The batch, which knows the task of each row, and its number both in its task and over all."""
        overall = [row for row, _, _ in items]
        own = [(self.numbers[row], encoded, example) for row, encoded, example in items]
        tasks = torch.tensor([self.tasks[row] for row in overall])
        return replace(Collate(self.codec)(own), task_ids=tasks, global_rows=torch.tensor(overall))


@final
class MultitaskDataModule(SoftPromptDataModule):
    r"""Rows of several tasks, each by a data module of its own, with its own template, classes, metrics and batch size.

    A batch of training holds rows of one task: they share template and prompt, which are then computed once for all of
    them, and a loss that is a mean over its rows means what it does where the task is alone.
    `trainer.accumulate_grad_batches` puts several tasks into one step, and `together` into one batch, of which each
    task's rows then pass through the backbone apart.

        softprompt fit --model MPT --data MultitaskDataModule --data.sampling Temperature \
            --data.tasks '{sst2: configs/data/sst2.yaml, rte: configs/data/rte.yaml}' --data.tasks.rte.batch_size 4

    Metrics are logged as `<task>/<metric>`; `macro`, the mean over tasks of one score each, says which checkpoint is
    best. Where some tasks have classes and others tags, set `--model.readout AutoReadout`. Rows to be predicted are
    the tasks' own, or come from one source, where a column `task` names the task.

    Args:
        tasks: By name, in the order of their numbers.
        sampling: How often each task comes up in training.
        epoch_batches: Batches of an epoch; None takes as many as the tasks have together. With `Proportional` sampling
            an epoch is then each row once, unless tasks share batches.
        together: Gives a batch of training rows of several tasks; None gives it those of one.
        scores: Metrics that `macro` takes, by task; the one that watches a task elsewhere unless named.
        predict: Source of rows to be predicted with their task in a column `task`; None takes those of the tasks that
            have a source of their own.
        backbone: The frozen language model, of which only the tokenizer is used, for all tasks.
        seed: Of the turns of tasks in training; the order of a task's rows is by its own.
        num_workers: Processes that make batches.

    Raises:
        ValueError: If there are no tasks, a name will not do as that of a metric and a parameter, or a task names
            another backbone, or has rows that are another draw in each epoch.
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
        spec = _shared(backbone, tasks)
        super().__init__("{soft}{target}", spec, predict=predict, seed=seed, num_workers=num_workers)
        if wrong := [name for name in tasks if not NAME.fullmatch(name) or name in TAKEN]:
            raise ValueError(
                f"names of tasks are of letters, digits, _ and -, and none of torch's own such as type, got {wrong}"
            )
        if redrawn := [name for name, task in tasks.items() if task.redraws]:
            raise ValueError(
                f"rows of several tasks are the same in each epoch, but those of {redrawn} are drawn anew; leave out "
                f"their noise, order=shuffled and target=any"
            )
        self.tasks = dict(tasks)
        for task in self.tasks.values():
            task.spec = self.spec
        self.sampling = sampling or Proportional()
        self.epoch_batches, self.together, self.scores = epoch_batches, together, dict(scores or {})

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """The column that names the task of a row."""
        return (TASK,)

    @property
    def classes_by_task(self) -> Mapping[str, Classes | None]:
        """How classes are spoken, for the tasks that have any."""
        return self._of_each(lambda task: task.classes)

    @property
    def row_formats(self) -> Mapping[str, RowFormat]:
        """How the rows of each task are written."""
        return {name: task.row_formats[""] for name, task in self.tasks.items()}

    @property
    def evaluation(self) -> Evaluation:
        """That of each task."""
        return EvaluationByTask(self._of_each(lambda task: task.evaluation), self.scores)

    def _of_each(self, ask: Callable[[SoftPromptDataModule], T], names: Sequence[str] | None = None) -> dict[str, T]:
        """What the tasks answer, by name. What goes wrong is told with the name."""
        answers = {}
        for name in self.tasks if names is None else names:
            try:
                answers[name] = ask(self.tasks[name])
            except ValueError as error:
                raise DataError(f"task {name!r}: {error}") from error
        return answers

    def prepare_data(self) -> None:
        """What the tasks want to be there."""
        self._of_each(lambda task: task.prepare_data())

    def example(self, row: Mapping[str, Any], labelled: bool) -> Example:
        """A row as the task has it that its column `task` names."""
        return self.tasks[self._named_by(row)].example(row, labelled)

    def _named_by(self, row: Mapping[str, Any]) -> str:
        if row.get(TASK) not in list(self.tasks):  # it may be anything, a list too
            raise ValueError(f"column {TASK!r} must name one of the tasks {list(self.tasks)}, got {row.get(TASK)!r}")
        return str(row[TASK])

    def _prepare(self, name: Split) -> MixedRows:
        for task in self.tasks.values():
            task.codec = self.codec
        if name == "predict" and self.sources["predict"] is not None:
            return self._told_apart(self.rows("predict"))
        return self._together(self._of_each(lambda task: task.split(name), self._with(name)))

    def _with(self, split: Split) -> list[str]:
        """The tasks that have a split: all, but for rows to be predicted."""
        having = [name for name, task in self.tasks.items() if split != "predict" or task.sources[split] is not None]
        if not having:
            raise ValueError(
                f"no source of predict rows was given; set data.predict to rows with a column {TASK!r}, or "
                f"data.tasks.{next(iter(self.tasks))}.predict"
            )
        return having

    def _together(self, parts: Mapping[str, Prepared]) -> MixedRows:
        """Rows task after task."""
        numbered = [(task, number) for task, part in self._numbered(parts) for number in range(len(part))]
        return self._mixed(parts, numbered)

    def _told_apart(self, rows: Rows) -> MixedRows:
        """Rows in their given order, each prepared by its own task."""
        places: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            try:
                places.setdefault(self._named_by(row), []).append(i)
            except ValueError as error:
                raise DataError(f"{rows.where(i)}: {error}") from None
        for name, own in places.items():
            self.tasks[name].take("predict", rows.only(own))
        parts = self._of_each(lambda task: task.split("predict"), list(places))
        order = {rows.where(i): i for i in range(len(rows))}
        found = [(order[at], task, n) for task, part in self._numbered(parts) for n, at in enumerate(part.where)]
        return self._mixed(parts, [(task, number) for _, task, number in sorted(found)])

    def _numbered(self, parts: Mapping[str, Prepared]) -> list[tuple[int, Prepared]]:
        return [(task, parts[name]) for task, name in enumerate(self.tasks) if name in parts]

    def _mixed(self, parts: Mapping[str, Prepared], order: Sequence[tuple[int, int]]) -> MixedRows:
        """Rows by number of task and number in the task."""
        by_number = dict(self._numbered(parts))
        chosen = [(by_number[task], number) for task, number in order]
        return MixedRows(
            [part.examples[number] for part, number in chosen],
            [part.encoded[number] for part, number in chosen],
            [part.origins[number] for part, number in chosen],
            array("l", [task for task, _ in order]),
            array("l", [number for _, number in order]),
        )

    def mixed(self, name: Split) -> MixedRows:
        """A split, which knows the task of each row."""
        return cast(MixedRows, self.split(name))

    def shown(self, name: Split, row: int) -> dict[str, Any]:
        """A row as a person reads it, with the name of its `task`."""
        rows = self.mixed(name)
        task = list(self.tasks)[rows.tasks[row]]
        return {TASK: task, **self.tasks[task].shown(name, rows.numbers[row])}

    def identity(self, name: Split) -> str:
        """A hash of a split's rows, of which task each is, and of the classes that they may be given."""
        return content_key([super().identity(name), self.classes_by_task, *self.mixed(name).tasks])

    def rows_digest(self, name: Split) -> str:
        """How many rows a split has, and a digest of their texts, labels, tokens and tasks in their order."""
        rows, _, digest = super().rows_digest(name).partition(" rows (")
        return f"{rows} rows ({content_key([digest, *self.mixed(name).tasks])[:12]})"

    def _loader(self, name: Split, order: Order) -> ResumableLoader:
        rows = self.mixed(name)
        collate = MixedCollate(self.codec, rows.tasks, rows.numbers)
        return ResumableLoader(rows, self._sampler(name, order), collate, num_workers=self.num_workers)

    def _sampler(self, name: Split, order: Order) -> ResumableBatchSampler:
        if order == "given":
            smallest = min(task.eval_batch_size for task in self.tasks.values())
            rank, world = self.ranks
            return BucketBatchSampler(self.split(name).lengths, smallest, order=order, rank=rank, world_size=world)
        if order == "shuffled" and self.together is not None:
            return self._sampler_together(self.together)
        samplers = self._of_each(lambda task: task.sampler(name, order, self.ranks))
        counts = self._counts(samplers) if order == "shuffled" else None
        return MixedBatchSampler(list(samplers.values()), counts, self.seed)

    def _sampler_together(self, together: SharedBatches) -> SharedBatchSampler:
        samplers = self._of_each(lambda task: task.sampler("train", "shuffled", (0, 1)))
        rates = self.sampling.rates({name: len(sampler.lengths) for name, sampler in samplers.items()})
        own = list(samplers.values())
        return SharedBatchSampler(own, together, rates, self.epoch_batches, self.seed, self.ranks)

    def _counts(self, samplers: Mapping[str, BucketBatchSampler]) -> list[int]:
        """Batches of each task in an epoch."""
        sizes = {name: len(sampler.lengths) for name, sampler in samplers.items()}
        rates = zip(self.sampling.rates(sizes), sizes.values(), samplers.values(), strict=True)
        weights = [rate / size * len(sampler) for rate, size, sampler in rates]
        return quotas(self.epoch_batches or sum(map(len, samplers.values())), weights)


def _shared(backbone: BackboneSpec | None, tasks: Mapping[str, SoftPromptDataModule]) -> BackboneSpec:
    """The one backbone of all tasks.

    Raises:
        ValueError: If there are no tasks, or they name several.
    """
    if not tasks:
        raise ValueError(
            "MultitaskDataModule wants tasks; give each a name, as in --data.tasks='{sst2: configs/data/sst2.yaml}'"
        )
    named = {name: task.spec for name, task in tasks.items() if task.spec != BackboneSpec()}
    shared = backbone or next(iter(named.values()), BackboneSpec())
    if other := [name for name, spec in named.items() if spec != shared]:
        raise ValueError(
            f"all tasks share one backbone, but {other} name another than {shared.name}; set backbone once"
        )
    return shared
