"""`load_prompt` and `save_prompt`: a trained prompt in Python, without a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, overload

import torch

from lightning_softprompt import __version__
from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.checkpoints.backbone_identity import backbone_identity
from lightning_softprompt.checkpoints.prompt_file import READOUT, SavedPrompt, read_prompt, write_prompt
from lightning_softprompt.checkpoints.restore import load_method
from lightning_softprompt.checkpoints.safe_loading.arguments import read_arguments
from lightning_softprompt.checkpoints.safe_loading.class_spec import build
from lightning_softprompt.core.types import Batch, Classes, Encoded, Example, OptionExample, Spans
from lightning_softprompt.data.multiple_choice import LISTING, list_options, read_options
from lightning_softprompt.data.tagging import spans
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.classification import ClassificationEvaluation
from lightning_softprompt.evaluation.options import OptionEvaluation
from lightning_softprompt.evaluation.tagging import TaggingEvaluation
from lightning_softprompt.inference.streaming import refuse_open_stream, stream_answer
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.methods.task_data import plain_formats

Row = str | Mapping[str, Any]
Rows = Row | Iterable[Row]


def load_prompt(
    path: str | Path, backbone: Backbone | None = None, template: str | None = None, trust: Iterable[str] = ()
) -> Prompt:
    """Loads a trained prompt, ready to predict and generate.

    Args:
        path: A `prompt.safetensors`, or a checkpoint of a run.
        backbone: A loaded backbone to share, such as `prompt.backbone` of another prompt; None loads the one that the
            file names.
        template: How a row is written. None takes the template of training, which files of version 0.1.0 store for
            tasks with classes only.
        trust: Further modules whose classes the file may name.

    Raises:
        ValueError: If the file cannot be loaded, belongs to another backbone or holds several prompts.
    """
    path = Path(path).expanduser()
    saved = read_prompt(path)
    method = cast(SoftPromptModule, load_method(saved, path, backbone, trust))
    formats = _read_formats(saved.rows, path)
    if template is not None:
        first = next(iter(formats.values()), RowFormat(template))
        formats = {"": replace(first, template=template, truncate=None)}
    return Prompt(method, formats)


def save_prompt(method: SoftPromptModule, path: str | Path) -> Path:
    """Saves the current parameters of a method as a prompt file.

    Args:
        method: A method with a loaded backbone, usually after training.
        path: The file, such as `prompt.safetensors`.

    Returns:
        The file.
    """
    rows = plain_formats(method.row_formats)
    training = {"version": __version__}
    if method.readout is not None:
        training[READOUT] = type(method.readout).__name__
    backbone = backbone_identity(method.loaded)
    write_prompt(Path(path), SavedPrompt(method.state_dict(), backbone, dict(method.hparams), rows, training=training))
    return Path(path)


class Prompt:
    """A trained prompt on its backbone.

    Args:
        method: The method with a loaded backbone, as after `Trainer.fit`.
        formats: How rows are written, by task; None takes those that the method was trained with.

    Attributes:
        method: The method.
        backbone: The backbone, which other prompts may share.
    """

    def __init__(self, method: SoftPromptModule, formats: Mapping[str, RowFormat] | None = None) -> None:
        self.method = method.eval()
        self.backbone = method.loaded
        self._formats = dict(method.row_formats if formats is None else formats)
        method.remember_formats(self._formats)

    def __repr__(self) -> str:
        return f"Prompt({type(self.method).__name__} on {self.backbone.spec.name})"

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, if there are several."""
        return self.method.tasks

    def row_format(self, task: str | None = None) -> RowFormat:
        """Returns how the rows of a task are written.

        Args:
            task: The task, if the prompt was trained on several.

        Raises:
            ValueError: If there is no such task, or the format of its rows is unknown.
        """
        return self.view(task).format

    def predict(self, rows: Rows, task: str | None = None, batch_size: int = 16) -> list[dict[str, Any]]:
        """Predicts the class of each row, or generates its answer if the task has no classes.

        Args:
            rows: Texts, or mappings with the columns of the template.
            task: The task of the rows, if the prompt was trained on several.
            batch_size: Number of rows of a batch.

        Returns:
            For each row a record with `prediction` (a label, a list of tags, or a text) and `scores` (the probability
            of each label; None for tags and texts).

        Raises:
            ValueError: If the format of rows is unknown, or a row lacks a column.
        """
        view = self.view(task)
        if view.evaluation is None:
            return [{"prediction": text, "scores": None} for text in self.generate(rows, task, batch_size)]
        refuse_open_stream(self.backbone)
        records: list[dict[str, Any]] = []
        for batch in view.batches(rows, batch_size):
            with torch.inference_mode():
                records += view.evaluation.predict(self.method.lm(), batch)
        return records

    @overload
    def generate(
        self,
        rows: Rows,
        task: str | None = ...,
        batch_size: int = ...,
        *,
        stream: Literal[False] = ...,
        **decoding: Any,
    ) -> list[str]: ...

    @overload
    def generate(
        self, rows: Rows, task: str | None = ..., batch_size: int = ..., *, stream: Literal[True], **decoding: Any
    ) -> Iterator[str]: ...

    def generate(
        self, rows: Rows, task: str | None = None, batch_size: int = 16, *, stream: bool = False, **decoding: Any
    ) -> list[str] | Iterator[str]:
        """Generates the answer of each row.

        Args:
            rows: Texts, or mappings with the columns of the template.
            task: The task of the rows, if the prompt was trained on several.
            batch_size: Number of rows of a batch.
            stream: Whether to return an iterator over the text of one answer, for one row. It yields pieces of whole
                words while tokens are generated; joined, they are the answer that `generate` returns without `stream`.
                Exhaust or close the iterator before you use the backbone for anything else.
            decoding: Arguments of `Decoding`, such as `max_new_tokens` and `do_sample`, that replace those of training.

        Returns:
            The answers, in the order of the rows; with `stream`, the pieces of the answer.

        Raises:
            ValueError: If the prompt is a reward model, the format of rows is unknown, a row lacks a column, or an
                option has a wrong value; with `stream`, also for several rows and for beam search, which knows its
                answer only at the end.
            RuntimeError: If the backbone is in the middle of a stream.
        """
        view = self.view(task)
        if self.method.readout is not None and self.method.readout.scores_answers:
            raise ValueError(
                "the prompt is a reward model, which scores answers and writes none; use softprompt predict"
            )
        options = replace(view.format.decoding or Decoding(), **decoding)
        batches = view.batches(rows, batch_size)
        if stream:
            return stream_answer(self.method.lm(), _only_row(list(batches), options), options)
        return list(self._answers(batches, options))

    def _answers(self, batches: Iterable[Batch], decoding: Decoding) -> Iterator[str]:
        refuse_open_stream(self.backbone)
        for number, batch in enumerate(batches):
            with torch.inference_mode(), decoding.drawing(number):
                ids = self.method.lm().generate(batch, **decoding.options)
            yield from decoding.texts(self.backbone.codec, ids)

    def view(self, task: str | None) -> TaskView:
        """Returns one task of the prompt: how its rows become batches.

        Raises:
            ValueError: If there is no such task, or the format of its rows is unknown.
        """
        names = self.tasks
        if (task or "") not in (names or ("",)):
            tasks = f"one of the tasks {list(names)}" if names else "None, since the prompt has a single task"
            raise ValueError(f"task must be {tasks}, got {task!r}")
        by_task = self.method.classes_by_task
        classes = self.method.classes if by_task is None else by_task[str(task)]
        row_format = self._formats.get(task or "")
        if row_format is None and classes is not None:
            row_format = RowFormat(classes.template)
        if row_format is None:
            raise ValueError(
                "the prompt file does not store the template of its rows; give it: "
                "load_prompt(path, template='{soft}{document}\\nSummary: {target}')"
            )
        number = None if task is None else names.index(task)
        return TaskView(self.backbone, row_format, classes, number)


def _only_row(batches: Sequence[Batch], decoding: Decoding) -> Batch:
    """Returns the batch of the only row to stream.

    Raises:
        ValueError: If there is not exactly one row, or the answer is known only at the end.
    """
    num_rows = sum(map(len, batches))
    if num_rows != 1:
        raise ValueError(f"stream=True generates the answer of one row, got {num_rows}; call generate for each row")
    if decoding.num_beams > 1:
        raise ValueError(f"stream=True does not support beam search, got num_beams={decoding.num_beams}")
    return batches[0]


class TaskView:
    """One task of a prompt: how its rows become batches, and how their classes are predicted.

    Args:
        backbone: The backbone.
        row_format: How rows are written.
        classes: The classes, if there are any.
        number: The number of the task, if there are several.
    """

    def __init__(self, backbone: Backbone, row_format: RowFormat, classes: Classes | None, number: int | None) -> None:
        self.backbone, self.format, self.classes, self.number = backbone, row_format, classes, number

    @cached_property
    def evaluation(self) -> Evaluation | None:
        """Predicts classes; None where answers are generated."""
        if self.classes is None:
            return None
        if self.format.options is not None:
            return OptionEvaluation()
        is_tagging = self.format.words is not None
        return TaggingEvaluation(self.classes.names) if is_tagging else ClassificationEvaluation(self.classes.names)

    def batches(self, rows: Rows, batch_size: int) -> Iterator[Batch]:
        """Batches of rows. All rows are checked before the first batch.

        Raises:
            ValueError: Naming the row that cannot be used.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        listed = [rows] if isinstance(rows, str | Mapping) else list(rows)
        encoded = [self._encode_at(number, row) for number, row in enumerate(listed)]
        starts = range(0, len(encoded), batch_size)
        return (self._collate(encoded[start : start + batch_size]) for start in starts)

    def _encode_at(self, number: int, row: Row) -> tuple[int, Example, Encoded]:
        try:
            if self.format.chat is not None:
                dialogue = self.format.chat.example(row, labelled=False)
                encoder = self.format.dialogue_encoder(self.backbone.codec, self.format.chat)
                return number, dialogue, encoder.encode(dialogue.turns, "")
            example = self._example(row)
            return number, example, self._encode(example)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error

    def _example(self, row: Row) -> Example:
        if self.format.options is not None and isinstance(row, Mapping):
            options = read_options(row, self.format.options)
            fields = self.format.fields({**row, LISTING: list_options(options)})
            return OptionExample(fields, options[0], options=options)
        fields = self.format.fields(row)
        column = self.format.words
        if column is None:
            return Example(fields, self._any_word)
        words = fields[column].split() if isinstance(fields[column], str) else list(fields[column])
        if not words or not all(isinstance(word, str) and word for word in words):
            raise ValueError(f"column {column!r} must hold words, got {fields[column]!r}")
        return Example({**fields, column: " ".join(words)}, "", words={column: spans(words)})

    @property
    def _any_word(self) -> str:
        """A word of a class at the place of the answer, which readouts replace; nothing where there are no classes."""
        words = [] if self.classes is None else [word for spoken in self.classes.words.values() for word in spoken]
        return words[0].removeprefix(self.format.parsed.glue) if words else ""

    def _encode(self, example: Example) -> Encoded:
        words: Mapping[str, Spans] = example.words
        return self.format.encode(self.backbone.codec, example.fields, example.target, words)

    def _collate(self, part: Sequence[tuple[int, Example, Encoded]]) -> Batch:
        numbers, examples, rows = zip(*part, strict=True)
        tasks = None if self.number is None else torch.full((len(rows),), self.number)
        batch = self.backbone.codec.collate(rows, task_ids=tasks, row_ids=numbers, examples=examples)
        return batch.to(self.backbone.word_embeddings.device)


def _read_formats(rows: Mapping[str, Any], path: Path) -> dict[str, RowFormat]:
    """The formats that a file stores, with all values checked.

    Raises:
        ValueError: Naming the file and the value.
    """
    formats: dict[str, RowFormat] = {}
    try:
        for task, values in rows.items():
            if not isinstance(values, Mapping):
                raise ValueError(f"rows.{task}: expected a mapping, got {type(values).__name__}")
            current = dict(values)
            if "cut" in current:  # the name of the field in older files
                current["truncation_side"] = current.pop("cut")
            row_format = cast(RowFormat, build(read_arguments(RowFormat, current, f"rows.{task}")))
            row_format.parsed  # noqa: B018 (checks the template)
            formats[task] = row_format
    except ValueError as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error
    return formats
