"""`SoftPromptDataModule`: what all kinds of task share, from files to batches."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol, Self, cast, final

import numpy as np
from lightning import LightningDataModule

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.backbones.loading import load_codec
from lightning_softprompt.backbones.tokenization.codec import Codec, TruncationSide
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import NO_TOKEN, Batch, Classes, Encoded, Example, Text
from lightning_softprompt.data.labels import as_text
from lightning_softprompt.data.readers.sources import (
    DataError,
    NoSplitError,
    Origin,
    Rows,
    first_columns,
    is_pattern,
    read_rows,
)
from lightning_softprompt.data.sampling.bucketing import BucketBatchSampler, Order, ResumableLoader
from lightning_softprompt.data.token_cache import cached, content_key, rows_digest
from lightning_softprompt.evaluation.base import Evaluation

log = logging.getLogger(__name__)
Source = str | list[str] | list[dict[str, Any]]
Split = Literal["train", "validation", "test", "predict"]


@dataclass(frozen=True)
class Prepared:
    """A split in tokens; its items are what a batch is collated from.

    Args:
        examples: The rows as text.
        encoded: The rows as tokens.
        origins: Where each row comes from.
    """

    examples: list[Example]
    encoded: list[Encoded]
    origins: list[Origin]

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> tuple[int, Encoded, Example]:
        return index, self.encoded[index], self.examples[index]

    @property
    def where(self) -> list[str]:
        """File and line of each row."""
        return [origin.where for origin in self.origins]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, input and target."""
        return [len(row.ids) + len(row.targets) for row in self.encoded]


class Drawing(Protocol):
    """Batches of which the first can be made an even draw."""

    drawn: list[list[int]] | None

    @property
    def most_batches(self) -> int:
        """Batches of the process that has most of them."""

    def draw(self, batches: int) -> None:
        """Makes so many batches, the first, an even draw."""


def batches_of(limit: float, count: int) -> int:
    """How many of the batches run under one of the Trainer's limits: a number of batches, or a share of them.

    >>> batches_of(3, 10), batches_of(0.5, 10), batches_of(20, 10)
    (3, 5, 10)
    """
    return min(limit, count) if isinstance(limit, int) else int(limit * count)


def drawn_of(name: str, option: str, limit: float, drawn: Sequence[Sequence[int]], count: int) -> str:
    """The line that says which rows a limited pass scores."""
    rows = sum(map(len, drawn))
    empty = [str(task) for task, own in enumerate(drawn) if not own]
    without = f"; it leaves the tasks number {', '.join(empty)} without rows" if empty else ""
    return f"{option}={limit}: {name} scores {rows} of {count} rows, an even draw, the same in each pass{without}"


@dataclass(frozen=True)
class Collate:
    """Makes the items of a `Prepared` one batch; picklable, for data workers."""

    codec: Codec

    def __call__(self, items: Sequence[tuple[int, Encoded, Example]]) -> Batch:
        """The batch."""
        numbers, rows, examples = zip(*items, strict=True)
        labels = [example.label for example in examples]
        known = None if all(label is None for label in labels) else labels
        return self.codec.collate(rows, labels=known, row_ids=numbers, examples=examples)


class SoftPromptDataModule(LightningDataModule, ABC):
    """Rows of a task as batches. It knows columns, template and how answers are scored, and no method.

    A source is a file (JSON lines, JSON, CSV, TSV, Parquet, plain text), a pattern or list of files, a folder with
    files for each split, `-` for standard input, or the name of a `datasets` hub set. In Python, `train`, `validation`,
    `test` and `predict` also accept the rows themselves: a list of mappings or a `datasets.Dataset`.

    Args:
        backbone: The frozen language model, of which only the tokenizer is used.
        path: Where all splits are; the four arguments below name them one by one instead.
        train: Source of the training rows.
        validation: Source of the validation rows; without one, a share of the training rows is held out.
        test: Source of the test rows.
        predict: Source of rows to be predicted, which need no answers. Standard input is read to its end before the
            first answer is written.
        template: How a row is written: `{column}`, `{soft}` where soft tokens stand, `{target}` where the answer does.
        truncate: Columns that give way when a row is longer than max_tokens; None lets all give way, the last first.
        cut: Where they are cut: at the row's end, its start, or in the middle of what may be cut.
        max_tokens: Most tokens of a row without the soft ones.
        batch_size: Rows of a training batch, on each device.
        eval_batch_size: Rows of a batch elsewhere; None takes batch_size.
        batch_tokens: Most tokens of any batch, soft ones not counted, instead of the two numbers of rows; at least
            three times those of the longest row.
        validation_share: Share of the training rows held out where there are no validation rows, above 0 and below 1.
        seed: Of the order of training rows and of the held-out share.
        num_workers: Processes that make batches.
        on_bad_row: Whether a row that cannot be used stops the run, or is skipped and reported.
        cache: Whether tokenized rows are kept on disk.
        rename_columns: New names of columns by their names in the source, such as `{Review Text: text}`.
    """

    classes_option: ClassVar[str | None] = None  # the argument that names the classes, if they can be inferred
    append_eos = False  # whether answers end with the token that stops generation
    max_target_tokens: int | None = None  # tokens of a row that are set aside for its answer
    decoding: Decoding | None = None  # how answers are generated, where they are
    defaults: Mapping[str, str] = MappingProxyType({})  # values of columns that a row may omit

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Refuses: a checkpoint of this package holds no data module.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a checkpoint holds no data module; build it from the config.yaml of the run's folder")

    def __init__(
        self,
        template: str,
        backbone: BackboneSpec | None = None,
        path: str | None = None,
        train: Source | None = None,
        validation: Source | None = None,
        test: Source | None = None,
        predict: Source | None = None,
        truncate: list[str] | None = None,
        cut: TruncationSide = "end",
        max_tokens: int = 512,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        batch_tokens: int | None = None,
        validation_share: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        on_bad_row: Literal["raise", "skip"] = "raise",
        cache: bool = True,
        rename_columns: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.spec = backbone or BackboneSpec()
        self.template = Template(template, Template(template).columns if truncate is None else truncate)
        if path is not None and not isinstance(path, str | Path):
            raise ValueError(
                f"path must name a folder of splits or a data set on the hub, got {type(path).__name__}; give rows by "
                "split, as in train=rows, validation=rows, test=rows"
            )
        if path is not None and (Path(path).expanduser().is_file() or is_pattern(path)):
            raise ValueError(
                f"data.path is a folder of splits or a hub name, but {path} names files: set data.train, data.test or "
                "data.predict to it instead"
            )
        if not 0 < validation_share < 1:
            raise ValueError(
                f"validation_share must lie between 0 and 1, got {validation_share}: the best prompt is chosen by "
                "validation rows"
            )
        if found := re.search(r"\\[nt]", template):
            log.warning(
                "the template has a backslash and a letter, %s, where a line break or tab may be meant. In bash write "
                "$'...' around it, in YAML double quotes: %r", found[0], template,
            )  # fmt: skip
        if min(batch_size, eval_batch_size or batch_size, max_tokens) < 1 or num_workers < 0:
            raise ValueError("batch_size, eval_batch_size and max_tokens must be at least 1, num_workers at least 0")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.path = path
        self.sources: dict[str, Source | None] = {
            "train": train, "validation": validation, "test": test, "predict": predict,
        }  # fmt: skip
        self.cut = cut
        self.max_tokens = max_tokens
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.batch_tokens = batch_tokens
        self.validation_share = validation_share
        self.seed = seed
        self.num_workers = num_workers
        self.on_bad_row = on_bad_row
        self.cache = cache
        self.rename_columns = {
            as_text(old, "rename_columns"): as_text(new, "rename_columns")
            for old, new in (rename_columns or {}).items()
        }
        self._check_new_names()
        self._rows: dict[str, Rows] = {}
        self._prepared: dict[str, Prepared] = {}
        self._undivided: tuple[list[Example], list[Origin]] | None = None

    def _check_new_names(self) -> None:
        new = list(self.rename_columns.values())
        if twice := sorted({name for name in new if new.count(name) > 1}):
            old = [name for name, given in self.rename_columns.items() if given == twice[0]]
            raise ValueError(f"rename_columns gives the columns {old} the same name {twice[0]!r}; name each its own")

    @abstractmethod
    def example(self, row: Mapping[str, Any], labelled: bool) -> Example:
        """A row made text. Rows to be predicted are not labelled.

        Raises:
            ValueError: Saying what is wrong with the row; file and line are added.
        """

    @property
    @abstractmethod
    def evaluation(self) -> Evaluation:
        """How answers are scored."""

    @property
    def classes(self) -> Classes | None:
        """How classes are spoken, where there are any."""
        return None

    @property
    def classes_by_task(self) -> Mapping[str, Classes | None] | None:
        """Where there are several tasks, their names in the order of their numbers, each with its classes, if any."""
        return None

    @property
    def row_formats(self) -> Mapping[str, RowFormat]:
        """How rows are written, by task, which is stored with a prompt; a single task has the name ""."""
        return {
            "": RowFormat(
                self.template.text,
                tuple(sorted(self.template.truncate)),
                self.max_tokens,
                self.cut,
                self.max_target_tokens,
                self.decoding,
                dict(self.defaults),
            )
        }

    @property
    def redraws(self) -> bool:
        """Whether training rows are another draw in each epoch."""
        return False

    def chosen(self, examples: Sequence[Example]) -> Sequence[int]:
        """Which training rows are used."""
        return range(len(examples))

    def weights(self, examples: Sequence[Example]) -> list[float] | None:
        """How often training rows are drawn; None takes each once an epoch."""
        return None

    @cached_property
    def codec(self) -> Codec:
        """The backbone's, which must be able to end an answer where answers are to end.

        Raises:
            ValueError: If it is not.
        """
        codec = load_codec(self.spec)
        if self.append_eos and not codec.stop:
            raise ValueError(f"{self.spec.name} fills masks and generates no text; take a decoder or encoder-decoder")
        if codec.remark is not None:
            log.info(codec.remark)
        return codec

    @final
    def split(self, name: Split) -> Prepared:
        """A split in tokens, prepared when first asked for.

        Raises:
            ValueError: If the split has no source, or a row cannot be used.
        """
        if name not in self._prepared:
            self._prepared[name] = self._prepare(name)
        return self._prepared[name]

    def shown(self, name: Split, row: int) -> dict[str, Any]:
        """A row as a person reads it, with `row`, its index in its source, where rows that were skipped count.

        Returns:
            `input` is the row without soft tokens and answer, `target` the answer, None where it is not known, `file`
            the row's file, where there are several.
        """
        data = self.split(name)
        example, origin = data.examples[row], data.origins[row]
        file = {} if origin.file is None else {"file": origin.file}
        text = "".join(p.text for p in self.template.pieces(example.fields) if isinstance(p, Text))
        return {"row": origin.index, **file, "input": text, "target": None if name == "predict" else example.target}

    def identity(self, name: Split) -> str:
        """A hash of a split's rows, as text and in tokens, of where they are, and of the classes they may be given."""
        data = self.split(name)
        places = enumerate((origin.index, origin.file) for origin in data.origins)
        unusual = [place for position, place in places if place != (position, None)]
        return content_key([self.classes, *data.examples, *data.encoded, *unusual])

    def where(self, name: Split, row: int) -> str:
        """File and line of a row."""
        return self.split(name).origins[row].where

    def source_rows(self, name: Split) -> list[int]:
        """The index of each row of a split in its source, where rows that were skipped count."""
        return [origin.index for origin in self.split(name).origins]

    def rows_digest(self, name: Split) -> str:
        """How many rows a split has, and a digest of their texts, labels and tokens in their order."""
        data = self.split(name)
        return rows_digest(data.examples, data.encoded)

    def rows(self, name: Split) -> Rows:
        """The rows of a source as they were read.

        Raises:
            ValueError: If there is no such source.
        """
        if name not in self._rows:
            source = self.sources[name] if self.sources[name] is not None else self.path
            if source is None:
                raise ValueError(f"no source of {name} rows was given; set data.{name} or data.path")
            try:
                rows = read_rows(source, name, self.on_bad_row, self._source_columns)
                self._rows[name] = rows.renamed(self.rename_columns)
            except NoSplitError as error:
                raise NoSplitError(f"{error}, or set data.{name}") from None
        return self._rows[name]

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """The columns that each row must have, so that a table or plain text on standard input is recognised."""
        return self.template.columns

    @property
    def _source_columns(self) -> list[str]:
        """The same, under their names in the source."""
        former = {new: old for old, new in self.rename_columns.items()}
        return [former.get(name, name) for name in self.needed_columns]

    def take(self, name: Split, rows: Rows) -> None:
        """Gives a split rows that were read elsewhere, in place of its source."""
        self._rows[name] = rows.renamed(self.rename_columns)
        self._prepared.pop(name, None)
        self._undivided = None

    def _prepare(self, name: Split) -> Prepared:
        if name in ("train", "validation") and not self._has_validation:
            examples, origins = self._held_out(name)
        else:
            examples, origins = self._examples(name)
        if name == "train":
            chosen = self.chosen(examples)
            examples, origins = [examples[i] for i in chosen], [origins[i] for i in chosen]
        if not examples:
            raise ValueError(self._nothing_left(name))
        return Prepared(examples, self._encoded(examples, origins, name), origins)

    def _nothing_left(self, name: Split) -> str:
        if self._undivided is None or not (count := len(self._undivided[0])):
            return f"no {name} rows are left to use"
        return (
            f"no {name} rows are left to use: {self.validation_share} of the {count} training rows, at least one, are "
            "held out for validation. Give validation rows by data.validation, or more training rows"
        )

    @cached_property
    def _has_validation(self) -> bool:
        if self.sources["validation"] is not None:
            return True
        if self.path is None:
            return False
        try:
            self.rows("validation")
        except NoSplitError as error:
            share = 100 * self.validation_share
            log.info("%.0f %% of the training rows are held out for validation, since %s", share, error)
            return False
        return True

    def _held_out(self, name: Split) -> tuple[list[Example], list[Origin]]:
        if self._undivided is None:  # training and validation rows are read, and what is skipped reported, once
            self._undivided = self._examples("train")
        examples, origins = self._undivided
        order = np.random.default_rng(self.seed).permutation(len(examples))
        count = max(1, round(self.validation_share * len(order)))
        part = sorted(order[:count] if name == "validation" else order[count:])
        return [examples[i] for i in part], [origins[i] for i in part]

    def _examples(self, name: Split) -> tuple[list[Example], list[Origin]]:
        rows = self.rows(name)
        examples, origins, bad = [], [], list(rows.skipped)
        for i, row in enumerate(rows):
            try:
                example = self.example(row, labelled=name != "predict")
                if self.on_bad_row == "skip":
                    self._encode(example)
                examples.append(example)
                origins.append(rows.origin(i))
            except ValueError as error:
                if self.on_bad_row == "raise":
                    raise DataError(f"{rows.where(i)}: {error}") from None
                bad.append(f"{rows.where(i)}: {error}")
        if bad and not examples:
            raise DataError(f"no {name} rows are left to use: all {len(bad)} were skipped, the first: {bad[0]}")
        if bad:
            log.warning("%d of the %s rows were skipped, the first: %s", len(bad), name, bad[0])
        return examples, origins

    def text(self, row: Mapping[str, Any], filled: Mapping[str, str] | None = None) -> dict[str, str]:
        """The columns that the template names.

        Args:
            row: The row.
            filled: Columns that rows do not have, since they are filled later.

        Raises:
            ValueError: If one is missing or is no text, or there is nothing in them that text could be made of.
        """
        needed = [column for column in self.template.columns if column not in (filled or {})]
        for column in needed:
            if column not in row:
                raise ValueError(f"no column {column!r}; the row has {first_columns(row)}")
            if not isinstance(row[column], str):
                raise ValueError(f"column {column!r} must be text, got {row[column]!r} ({type(row[column]).__name__})")
        if self.append_eos and not any(row[column].strip() for column in needed):
            raise ValueError(" and ".join(f"column {column!r} is empty" for column in needed))
        values = {**row, **(filled or {})}
        return {column: values[column] for column in self.template.columns}

    def _encoded(self, examples: Sequence[Example], origins: Sequence[Origin], name: str) -> list[Encoded]:
        def make() -> list[Encoded]:
            return [self._encode_at(example, origin) for example, origin in zip(examples, origins, strict=True)]

        said = [
            (tuple(e.fields.items()), e.target, tuple(e.words.items()), tuple(e.template_spans.items()))
            for e in examples
        ]
        truncate = sorted(self.template.truncate)
        how = [truncate, self.cut, self.max_tokens, self.append_eos, self.max_target_tokens]
        key = content_key([self.codec.fingerprint, self.template.text, how, said])
        encoded = cached(key, make) if self.cache and name != "predict" else make()
        if cut := sum(row.num_truncated > 0 for row in encoded):
            log.info("%d of %d %s rows were cut to max_tokens=%d", cut, len(encoded), name, self.max_tokens)
        if lost := sum(row.words.count(NO_TOKEN) for row in encoded):
            log.info("%d words of the %s rows have no token and are not scored", lost, name)
        return encoded

    def _encode(self, example: Example) -> Encoded:
        pieces = self.template.pieces(example.fields, example.words, example.template_spans)
        how = (self.max_tokens, self.append_eos, self.cut, self.max_target_tokens)
        return self.codec.encode(pieces, example.target, *how)

    def _encode_at(self, example: Example, origin: Origin) -> Encoded:
        try:
            return self._encode(example)
        except ValueError as error:
            raise DataError(f"{origin.where}: {error}") from None

    @final
    def setup(self, stage: str) -> None:
        """Prepares the splits of a stage, so that a bad row is found before anything is trained."""
        needed: dict[str, tuple[Split, ...]] = {
            "fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",),
        }  # fmt: skip
        for name in needed[stage]:
            self.split(name)

    @final
    def train_dataloader(self) -> ResumableLoader:
        """Batches of rows of like length, in an order that the seed and the epoch decide.

        With `overfit_batches`, each epoch has the batches of the first one.
        """
        loader = self._loader("train", "shuffled")
        loader.batch_sampler.repeats = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        if loader.batch_sampler.repeats:
            self._announce("overfit_batches: each epoch trains on the batches of the first one")
        return loader

    @final
    def val_dataloader(self) -> ResumableLoader:
        """Each validation row once; with `limit_val_batches`, an even draw of them."""
        return self._evaluated("validation", "limit_val_batches")

    @final
    def test_dataloader(self) -> ResumableLoader:
        """Each test row once; with `limit_test_batches`, an even draw of them."""
        return self._evaluated("test", "limit_test_batches")

    def _evaluated(self, name: Split, option: str) -> ResumableLoader:
        """The rows that a pass scores, the longest first."""
        loader = self._loader(name, "longest_first")
        sampler = cast(Drawing, loader.batch_sampler)
        limit = 1.0 if self.trainer is None else getattr(self.trainer, option)
        batches = batches_of(limit, sampler.most_batches)
        if 0 < batches < sampler.most_batches:
            sampler.draw(batches)
            self._announce(drawn_of(name, option, limit, sampler.drawn or [], len(self.split(name))))
        return loader

    def _announce(self, line: str) -> None:
        if self.ranks[0] == 0:
            log.info(line)

    @final
    def predict_dataloader(self) -> ResumableLoader:
        """Each row once, in the order of the file; with `limit_predict_batches`, the first rows."""
        loader = self._loader("predict", "given")
        limit = 1.0 if self.trainer is None else self.trainer.limit_predict_batches
        if batches_of(limit, len(loader)) < len(loader):
            self._announce(f"limit_predict_batches={limit}: only the first rows of the source are predicted")
        return loader

    def _loader(self, name: Split, order: Order) -> ResumableLoader:
        sampler = self.sampler(name, order, self.ranks)
        return ResumableLoader(self.split(name), sampler, Collate(self.codec), num_workers=self.num_workers)

    @property
    def ranks(self) -> tuple[int, int]:
        """This process's number, and how many there are."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    @final
    def sampler(self, name: Split, order: Order, ranks: tuple[int, int]) -> BucketBatchSampler:
        """Which rows of a split make a batch; training rows are shuffled."""
        data, training = self.split(name), order == "shuffled"
        return BucketBatchSampler(
            data.lengths,
            self.batch_size if training else self.eval_batch_size,
            order=order,
            seed=self.seed,
            rank=ranks[0],
            world_size=ranks[1],
            weights=self.weights(data.examples) if training else None,
            max_tokens=self.batch_tokens,
        )
