"""`SoftPromptDataModule`: reads, tokenizes and batches the rows of a task; the base class of all data modules."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from inspect import currentframe
from types import MappingProxyType
from typing import Any, ClassVar, Literal, final

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.backbones.loading import load_codec
from lightning_softprompt.backbones.tokenization.codec import Codec, TruncationSide
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.constructor import constructor_arguments
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Classes, Example, Text
from lightning_softprompt.data.argument_checks import (
    check_new_names,
    check_path,
    check_shares,
    check_sizes,
    check_template_escapes,
)
from lightning_softprompt.data.augmentation.base import Augmentation, RowText
from lightning_softprompt.data.augmentation.rows import AugmentedRows
from lightning_softprompt.data.augmentation.template_text import TemplateText
from lightning_softprompt.data.curricula.base import Curriculum, RowPlan
from lightning_softprompt.data.difficulty.row_losses import RowLosses
from lightning_softprompt.data.labels import as_text
from lightning_softprompt.data.prepared import Collate, PreparedRows, Split
from lightning_softprompt.data.readers.column_texts import extract_texts
from lightning_softprompt.data.sampling.bucketing import BucketBatchSampler, Order, ResumableLoader
from lightning_softprompt.data.sampling.epoch_indexed import EpochIndexedSampler
from lightning_softprompt.data.splits.row_encoder import RowEncoder
from lightning_softprompt.data.splits.row_source import RowSource, Source, convert_frame
from lightning_softprompt.data.splits.split_hooks import SplitHooks
from lightning_softprompt.data.token_cache import content_key, rows_digest
from lightning_softprompt.evaluation.base import Evaluation

log = logging.getLogger(__name__)
TEST_SEED = 0  # of the rows that a limited test scores; the default of `seed`


class SoftPromptDataModule(SplitHooks):
    """Loads the rows of a task and returns them as batches.

    A data module defines the columns, the template and the evaluation of a task. It does not depend on the method.

    A source of rows is a file (JSON lines, JSON, CSV, TSV, Parquet, plain text), a glob pattern or list of files, a
    folder with one or more files per split, `-` for standard input, or the name of a data set on the Hugging Face hub.
    In Python, `train`, `validation`, `test` and `predict` also accept the rows: a list of mappings, a
    `datasets.Dataset` or a `pandas.DataFrame`.

    Args:
        backbone: The frozen language model. The data module uses only its tokenizer.
        path: Source of all splits. The rows of a single file are divided into training, validation and test rows, see
            validation_share and test_share. Use `train`, `validation`, `test` and `predict` to set splits one by one.
        train: Source of the training rows.
        validation: Source of the validation rows (default: a random part of the training rows, see validation_share).
        test: Source of the test rows.
        predict: Source of the rows to predict, which need no answers. Standard input is read completely before the
            first prediction is written.
        template: Text of a row: `{column}` inserts a column, `{soft}` marks soft tokens, `{target}` marks the answer.
        truncate: Columns to truncate when a row exceeds max_tokens (default: all columns, the last one first).
        truncation_side: Which part of a column to remove: the end, the start, or the middle.
        max_tokens: Maximum tokens per row, excluding soft tokens.
        batch_size: Training rows per batch, on each device.
        eval_batch_size: Batch size for validation, test and predict (default: batch_size).
        batch_tokens: Maximum tokens per batch, excluding soft tokens; replaces batch_size and eval_batch_size. Must be
            at least three times the length of the longest row.
        validation_share: Fraction of the training rows to hold out if there are no validation rows, between 0 and 1.
        test_share: Fraction of the rows to hold out for the test if `path` is a file; 0 for none.
        seed: Seed of the order of training rows and of the held-out rows, but not of the rows of a limited test.
        num_workers: Number of processes that prepare batches.
        on_bad_row: Whether to stop at a row that cannot be used, or to skip and report it.
        cache: Whether to cache tokenized rows on disk.
        rename_columns: New column names by their names in the source, such as `{Review Text: text}`.
        curriculum: Which training rows are used at which step, or how often, such as `Competence` (default: each row
            once per epoch, in random order). It requires batch_size.
        augment: Random changes of the text of training rows, drawn again in each epoch, such as `Noise`; one or a list,
            which are applied in order. Validation and test rows are not changed. It requires batch_size.
    """

    fixed_options: ClassVar[Sequence[str]] = ()  # the arguments of this class that a subclass sets itself
    classes_option: ClassVar[str | None] = None  # the argument that names the classes, if they can be inferred
    compares_answers = False  # whether an item of a split is a question with several answers
    append_eos = False  # whether targets end with the token that stops generation
    max_target_tokens: int | None = None  # tokens of each row that are reserved for its target
    decoding: Decoding | None = None  # how targets are generated, if they are
    can_augment: ClassVar[bool] = True  # whether training rows can be changed by `augment`
    defaults: Mapping[str, str] = MappingProxyType({})  # values of columns that a row may omit

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
        truncation_side: TruncationSide = "end",
        max_tokens: int = 512,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        batch_tokens: int | None = None,
        validation_share: float = 0.1,
        test_share: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        on_bad_row: Literal["raise", "skip"] = "raise",
        cache: bool = True,
        rename_columns: dict[str, str] | None = None,
        curriculum: Curriculum | None = None,
        augment: Augmentation | list[Augmentation] | None = None,
    ) -> None:
        check_path(path, train)
        check_template_escapes(template)
        check_shares(validation_share, test_share)
        check_sizes(batch_size, eval_batch_size, max_tokens, num_workers, seed)
        self.rename_columns = {
            as_text(old, "rename_columns"): as_text(new, "rename_columns")
            for old, new in (rename_columns or {}).items()
        }
        check_new_names(self.rename_columns)
        if curriculum is not None and batch_tokens is not None:
            raise ValueError("curriculum requires batch_size, because its epochs have other rows; remove batch_tokens")
        self.sources: dict[str, Source | None] = {
            "train": convert_frame(train),
            "validation": convert_frame(validation),
            "test": convert_frame(test),
            "predict": convert_frame(predict),
        }
        row_source = RowSource(path, self.sources, self.rename_columns, on_bad_row, validation_share, test_share, seed)
        super().__init__(row_source, cache)
        self.arguments = constructor_arguments(currentframe())
        self.spec = backbone or BackboneSpec()
        self.template = Template(template, Template(template).columns if truncate is None else truncate)
        self.path = path
        self.truncation_side = truncation_side
        self.max_tokens = max_tokens
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.batch_tokens = batch_tokens
        self.validation_share = validation_share
        self.test_share = test_share
        self.seed = seed
        self.num_workers = num_workers
        self.on_bad_row = on_bad_row
        self.curriculum = curriculum
        self.augmentations = [augment] if isinstance(augment, Augmentation) else list(augment or [])
        if self.augmentations and batch_tokens is not None:
            raise ValueError("augment requires batch_size, because it changes lengths of rows; remove batch_tokens")
        if self.augmentations and not self.can_augment:
            raise ValueError(f"{type(self).__name__} cannot change its training rows; remove augment")

    def reserve_target_tokens(self, max_target_tokens: int, decoding: Decoding) -> None:
        """Reserves tokens of each row for a generated target.

        Args:
            max_target_tokens: Number of tokens.
            decoding: How targets are generated, by default with at most this number of tokens.

        Raises:
            ValueError: If the number is not between 0 and max_tokens.
        """
        if not 0 < max_target_tokens < self.max_tokens:
            raise ValueError(
                f"max_target_tokens must be between 0 and max_tokens={self.max_tokens}, got {max_target_tokens}"
            )
        self.max_target_tokens = max_target_tokens
        self.decoding = replace(decoding, max_new_tokens=decoding.max_new_tokens or max_target_tokens)

    @property
    @abstractmethod
    def evaluation(self) -> Evaluation:
        """How predictions are scored."""

    @property
    def classes(self) -> Classes | None:
        """The classes with their label words; None for tasks without classes."""
        return None

    @property
    def classes_by_task(self) -> Mapping[str, Classes | None] | None:
        """The classes of each task, in the order of the task ids; None if there is only one task."""
        return None

    @property
    def row_formats(self) -> Mapping[str, RowFormat]:
        """The format of the rows of each task, which is stored with a prompt; a single task has the name ""."""
        return {
            "": RowFormat(
                self.template.text,
                tuple(sorted(self.template.truncate)),
                self.max_tokens,
                self.truncation_side,
                self.max_target_tokens,
                self.decoding,
                dict(self.defaults),
            )
        }

    @property
    def resamples(self) -> bool:
        """Whether training rows change from epoch to epoch."""
        return bool(self.augmentations)

    @property
    def row_text(self) -> RowText:
        """How augmentations read and write the text of a row."""
        return TemplateText(self._encoder, has_classes=self.classes is not None)

    def weights(self, examples: Sequence[Example]) -> list[float] | None:
        """Returns the sampling weight of each training row; None to use each row once per epoch."""
        return None

    @cached_property
    def codec(self) -> Codec:
        """The codec of the backbone.

        Raises:
            ValueError: If targets end with a stop token, but the backbone cannot generate text.
        """
        codec = load_codec(self.spec)
        if self.append_eos and not codec.stop:
            raise ValueError(f"{self.spec.name} fills masks and generates no text; use a decoder or encoder-decoder")
        if codec.remark is not None:
            log.info(codec.remark)
        return codec

    def describe_row(self, name: Split, row: int) -> dict[str, Any]:
        """Describes a row for tables and pages.

        Returns:
            `row`: index in its source, in which skipped rows count; `file`: its file, if there are several; `input`:
            the text without soft tokens and target; `target`: the target, or None if it is unknown.
        """
        data = self.split(name)
        example, origin = data.examples[row], data.origins[row]
        file = {} if origin.file is None else {"file": origin.file}
        pieces = self.template.pieces(example.fields)
        text = "".join(piece.text for piece in pieces if isinstance(piece, Text))
        return {"row": origin.index, **file, "input": text, "target": None if name == "predict" else example.target}

    def row_image(self, name: Split, row: int) -> Any:
        """Returns the image of a row for tables, as an image of Pillow; None if rows have no images."""
        return None

    def identity(self, name: Split) -> str:
        """Returns a hash of the texts, tokens and origins of a split's rows, and of the classes."""
        data = self.split(name)
        places = enumerate((origin.index, origin.file) for origin in data.origins)
        moved = [place for position, place in places if place != (position, None)]
        return content_key([self.classes, *data.examples, *data.encoded, *moved])

    def where(self, name: Split, row: int) -> str:
        """Returns file and line of a row."""
        return self.split(name).origins[row].where

    def source_rows(self, name: Split) -> list[int]:
        """Returns the index of each row of a split in its source, in which skipped rows count."""
        return [origin.index for origin in self.split(name).origins]

    def rows_digest(self, name: Split) -> str:
        """Returns the number of rows of a split, with a digest of their texts, labels and tokens in order."""
        data = self.split(name)
        return rows_digest(data.examples, data.encoded)

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """The columns that each row must have. They identify tables and plain text on standard input."""
        return self.template.columns

    def text(self, row: Mapping[str, Any], filled: Mapping[str, str] | None = None) -> dict[str, str]:
        """Returns the text of each column of the template.

        Args:
            row: The row.
            filled: Values of columns that the source does not have because they are computed later.

        Raises:
            ValueError: If a column is missing or not text, or if all of them are empty and a text must be generated.
        """
        return extract_texts(self.template, row, filled or {}, requires_text=self.append_eos)

    @property
    def _encoder(self) -> RowEncoder:
        return RowEncoder(
            self.codec,
            self.template,
            self.max_tokens,
            self.truncation_side,
            self.append_eos,
            self.max_target_tokens,
        )

    def build_loader(self, name: Split, order: Order) -> ResumableLoader:
        """Returns the loader of a split. Override it if rows change from epoch to epoch, or for another sampler.

        Args:
            name: The split.
            order: The order of its rows.
        """
        sampler = self.sampler(name, order, self.ranks)
        if order == "shuffled" and self.augmentations:
            text = self.row_text
            for augmentation in self.augmentations:
                augmentation.check(text)
            rows = AugmentedRows(self.split(name), self.seed, text, tuple(self.augmentations))
            indexed = EpochIndexedSampler(sampler, len(rows))
            return ResumableLoader(rows, indexed, self.collate, num_workers=self.num_workers)
        return ResumableLoader(self.split(name), sampler, self.collate, num_workers=self.num_workers)

    @property
    def collate(self) -> Collate:
        """Collates items of a split into a `Batch`; the `collate_fn` of a `DataLoader` over `split`."""
        return Collate(self.codec)

    @final
    def sampler(self, name: Split, order: Order, ranks: tuple[int, int]) -> BucketBatchSampler:
        """Returns the sampler that groups the rows of a split into batches."""
        return self.sampler_of_rows(self.split(name), name, order, ranks)

    @final
    def sampler_of_rows(
        self, data: PreparedRows, name: Split, order: Order, ranks: tuple[int, int]
    ) -> BucketBatchSampler:
        """Returns the sampler of rows, which are all rows of a split or a part of them."""
        training = order == "shuffled"
        # a limited test scores the same rows for every data.seed, so that repetitions can be compared row by row
        seed = TEST_SEED if name == "test" else self.seed
        plan = self._plan_rows(data) if training else RowPlan()
        return BucketBatchSampler(
            data.lengths,
            self.batch_size if training else self.eval_batch_size,
            order=order,
            seed=seed,
            rank=ranks[0],
            world_size=ranks[1],
            weights=plan.weights,
            max_tokens=self.batch_tokens,
            row_order=plan.order,
        )

    def _plan_rows(self, data: PreparedRows) -> RowPlan:
        """Returns how training rows are drawn.

        Raises:
            ValueError: If the curriculum and another option both set weights of rows.
        """
        weights = self.weights(data.examples)
        if self.curriculum is None:
            return RowPlan(weights=weights)
        if weights is not None:
            raise ValueError("curriculum and balanced both decide how often a row is used; remove one of them")
        losses = RowLosses(self.trainer, self.spec, self._encoder, self.eval_batch_size, self.cache)
        return self.curriculum.plan(data, losses)
