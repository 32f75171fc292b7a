"""Runs the rows of requests in batches: answers of all prompts together, classes by prompt."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar, final

import torch

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.prompts.merge_rows import merge_prompts
from lightning_softprompt.serving.batching.jobs import Answer, ClassificationJob, GenerationJob, Job
from lightning_softprompt.serving.batching.row_decoding import BatchDecoder, DividedRowsError, RowDecoder
from lightning_softprompt.serving.errors import invalid, too_long
from lightning_softprompt.serving.registry import ServedPrompt

log = logging.getLogger(__name__)
J = TypeVar("J", bound=Job)


class Lane(ABC, Generic[J]):
    """Runs rows of one kind.

    Args:
        backbone: The backbone of all prompts.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    @abstractmethod
    def run(self, jobs: Sequence[J]) -> None:
        """Runs rows together as far as possible, and finishes each of them."""

    def batch_of(self, jobs: Sequence[J]) -> Batch:
        """The rows of one prompt as a batch."""
        number = jobs[0].served.view.number
        tasks = None if number is None else torch.full((len(jobs),), number)
        rows, examples = [job.encoded for job in jobs], [job.example for job in jobs]
        batch = self.backbone.codec.collate(rows, task_ids=tasks, examples=examples)
        return batch.to(self.backbone.word_embeddings.device)


@final
class ClassificationLane(Lane[ClassificationJob]):
    """Predicts classes, by the readout of each prompt. Rows of the same prompt run together."""

    def run(self, jobs: Sequence[ClassificationJob]) -> None:
        """See `Lane.run`."""
        for served, rows in _by_prompt(jobs):
            evaluation = served.view.evaluation
            assert evaluation is not None, "the request was checked"
            try:
                with torch.inference_mode():
                    records = evaluation.predict(served.prompt.method.lm(), self.batch_of(rows))
            except ValueError as error:
                for job in rows:
                    job.fail(invalid(str(error), "input"))
                continue
            for job, record in zip(rows, records, strict=True):
                job.finish(record)


@dataclass(frozen=True)
class _Group:
    """Rows of one prompt in a batch, with their soft prompt."""

    positions: Sequence[int]
    prompt: SoftPrompt

    @property
    def structure(self) -> Hashable:
        """Prompts with the same structure can be merged."""
        if self.prompt.hidden:  # cannot be merged with any other prompt
            return id(self)
        return tuple(sorted((kind, tuple(layers)) for kind, layers in self.prompt.kv.items()))

    @property
    def length(self) -> int:
        """Positions that the soft prompt takes up."""
        tokens = 0 if self.prompt.tokens is None else self.prompt.tokens.shape[1]
        keys = [next(iter(layers.values()))[0].shape[2] for layers in self.prompt.kv.values()]
        hidden = [part.shape[1] for part in self.prompt.hidden.values()]
        return tokens + max(keys, default=0) + max(hidden, default=0)


@final
class GenerationLane(Lane[GenerationJob]):
    """Generates answers. Rows of all prompts and decoding options run together.

    Args:
        backbone: The backbone of all prompts.
        after_token: Called after each step with the number of rows that are not done.
    """

    def __init__(self, backbone: Backbone, after_token: Callable[[int], None] = lambda rows: None) -> None:
        super().__init__(backbone)
        self.after_token = after_token
        self.runs_together = True  # whether the backbone runs rows of different lengths together
        config = backbone.model.generation_config
        ends = None if config is None else config.eos_token_id
        self.ends = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def run(self, jobs: Sequence[GenerationJob]) -> None:
        """See `Lane.run`. Rows with beam search run alone, and so do rows of different numbers of slots."""
        by_slots: dict[int, list[GenerationJob]] = {}
        for job in jobs:
            if job.decoding.num_beams > 1:
                self._search_beams(job)
            else:
                by_slots.setdefault(len(job.encoded.slots), []).append(job)
        for rows in by_slots.values():
            self._run_together(rows)

    def _run_together(self, jobs: Sequence[GenerationJob]) -> None:
        if not self.runs_together and len(jobs) > 1:
            self._run_one_by_one(jobs)
            return
        questions, groups = self._prepare(jobs)
        if remaining := [job for job in jobs if not job.is_finished]:
            if len(remaining) < len(jobs):  # rows were refused
                self._run_together(remaining)
                return
            mergeable: dict[Hashable, list[_Group]] = {}
            for group in groups:
                mergeable.setdefault(group.structure, []).append(group)
            for part in mergeable.values():
                self._generate(jobs, questions, part)

    def _run_one_by_one(self, jobs: Sequence[GenerationJob]) -> None:
        for job in jobs:
            if not job.is_dropped:
                self._run_together([job])

    def _prepare(self, jobs: Sequence[GenerationJob]) -> tuple[Batch, list[_Group]]:
        """Returns the rows and the soft prompts of each prompt's rows; rows that cannot run are refused.

        All rows have the width of the longest, as prompts that shift the embeddings of text require.
        """
        batch = self.backbone.codec.collate([job.encoded for job in jobs])
        questions = self.backbone.without_answers(batch.to(self.backbone.word_embeddings.device))
        positions_of: dict[int, list[int]] = {}
        for position, job in enumerate(jobs):
            positions_of.setdefault(id(job.served), []).append(position)
        groups = []
        for positions in positions_of.values():
            served = jobs[positions[0]].served
            number = served.view.number
            tasks = None if number is None else torch.full((len(positions),), number, device=questions.mask.device)
            rows = replace(questions.only(positions), task_ids=tasks)
            try:
                with torch.inference_mode():
                    group = _Group(positions, served.prompt.method.lm().prompt(rows))
            except ValueError as error:
                for position in positions:
                    jobs[position].fail(invalid(str(error), "prompt"))
                continue
            self._refuse_long_rows([jobs[position] for position in positions], group.length)
            groups.append(group)
        return questions, groups

    def _refuse_long_rows(self, jobs: Sequence[GenerationJob], num_soft: int) -> None:
        window = self.backbone.window
        if window is None:
            return
        for job in jobs:
            num_new = job.decoding.most if self.backbone.is_causal else 0
            length = len(job.encoded.ids) - len(job.encoded.answers) + num_soft + num_new
            if length > window:
                job.fail(too_long(f"the row has {length} tokens with soft and new ones, the window has {window}"))

    def _generate(self, jobs: Sequence[GenerationJob], questions: Batch, groups: Sequence[_Group]) -> None:
        """Generates the answers of the rows of some groups."""
        positions = [position for group in groups for position in group.positions]
        batch, prompt = questions.only(positions), groups[0].prompt
        if len(groups) > 1:
            parts, first = [], 0
            for group in groups:
                parts.append((list(range(first, first + len(group.positions))), group.prompt))
                first += len(group.positions)
            prompt = merge_prompts(parts, batch)
        rows = [RowDecoder(jobs[position], self.backbone.codec, self.ends) for position in positions]
        decoder = BatchDecoder(rows, lambda: self.after_token(sum(not row.is_done for row in rows)))
        try:
            with torch.inference_mode():
                self.backbone.generate(batch, prompt, **decoder.options)
        except DividedRowsError:
            log.info("%s does not generate rows of different lengths together; they run alone", self.backbone.spec.name)
            self.runs_together = False
            self._run_one_by_one([jobs[position] for position in positions])

    def _search_beams(self, job: GenerationJob) -> None:
        questions, groups = self._prepare([job])
        if job.is_finished:
            return
        with torch.inference_mode():
            ids = self.backbone.generate(questions, groups[0].prompt, **job.decoding.options)
        (text,) = job.decoding.texts(self.backbone.codec, ids)
        (is_finished,) = job.decoding.are_finished(self.backbone.codec, ids)
        job.finish(Answer(text, "stop" if is_finished else "length", ids.shape[1]))


def _by_prompt(jobs: Sequence[J]) -> Iterator[tuple[ServedPrompt, list[J]]]:
    """Yields the rows of each prompt."""
    rows: dict[int, list[J]] = {}
    for job in jobs:
        rows.setdefault(id(job.served), []).append(job)
    for of_prompt in rows.values():
        yield of_prompt[0].served, of_prompt
