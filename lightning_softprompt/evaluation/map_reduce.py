"""Summarization of long documents: summarizes parts, then the summaries, until one summary is left."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import final

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.sentences import END
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Batch, Encoded, Example


@final
class MapReduce:
    """Summarizes a document in parts that fit into a row, and then its summaries in the same way.

    Parts are as long as possible. A part ends with a sentence if that keeps more than half of the length, otherwise
    with a word. Only words that do not fit into a row are split.

    Args:
        codec: Codec of the backbone.
        template: Text of a row.
        column: Column of the document.
        max_tokens: Maximum tokens per row, excluding soft tokens.
        decoding: How summaries are generated.

    Raises:
        ValueError: If the template lacks the column, or the summaries of two parts may not fit into one row.
    """

    def __init__(self, codec: Codec, template: Template, column: str, max_tokens: int, decoding: Decoding) -> None:
        if column not in template.columns:
            raise ValueError(f"the template has no column {column!r} for documents, only {template.columns}")
        if max_tokens <= 2 * decoding.most:
            raise ValueError(
                f"summaries of two parts must fit into one row of max_tokens={max_tokens}, but each may have "
                f"max_new_tokens={decoding.most} tokens; decrease max_new_tokens or increase max_tokens"
            )
        self.codec, self.column, self.max_tokens, self.decoding = codec, column, max_tokens, decoding
        self.template = Template(template.text, template.columns)  # all columns truncatable: shows what does not fit

    def fits(self, fields: Mapping[str, str]) -> bool:
        """Returns whether a row fits without truncation."""
        return not self._encode(fields).num_truncated

    def parts(self, fields: Mapping[str, str]) -> list[str]:
        """Splits the document into parts that fit.

        Raises:
            ValueError: If the other columns leave no room for the document.
        """
        rest, parts = fields[self.column].strip(), []
        while (longest := self._max_length(fields, rest)) < len(rest):
            ends = [*_preferred_ends(rest, longest), longest]
            end = next((end for end in ends if self._fits(fields, rest[:end])), longest)
            parts.append(rest[:end].strip())
            rest = rest[end:].strip()
        return [*parts, rest]

    def _fits(self, fields: Mapping[str, str], text: str) -> bool:
        return self.fits({**fields, self.column: text.strip()})

    def _max_length(self, fields: Mapping[str, str], text: str) -> int:
        """Returns how many characters of a text fit, without tokenizing all of a long text."""
        fitting, too_long = 0, 8 * self.max_tokens
        while too_long < len(text) and self._fits(fields, text[:too_long]):
            fitting, too_long = too_long, 2 * too_long
        if too_long >= len(text):
            if self._fits(fields, text):
                return len(text)
            too_long = len(text)
        while too_long - fitting > 1:
            middle = (fitting + too_long) // 2
            fitting, too_long = (middle, too_long) if self._fits(fields, text[:middle]) else (fitting, middle)
        if not fitting:
            raise ValueError(
                f"the template and its other columns leave no room for {self.column!r} in max_tokens={self.max_tokens}"
            )
        return fitting

    def __call__(self, lm: PromptedLM, batch: Batch, row: int) -> str:
        """Returns the summary of a document.

        Args:
            lm: The language model.
            batch: The batch of the document. Its size is the batch size for the parts.
            row: Position of the document in the batch.

        Raises:
            ValueError: If the summaries of the parts do not get shorter.
        """
        assert batch.examples is not None, "the batch has no texts"
        fields = batch.examples[row].fields
        parts = self.parts(fields)
        while len(parts) > 1:
            joined = " ".join(self._summarize(lm, batch, row, parts))
            shorter = self.parts({**fields, self.column: joined})
            if len(shorter) >= len(parts):
                raise ValueError(
                    f"the summaries of {len(parts)} parts of a document have {len(shorter)} parts; decrease "
                    f"max_new_tokens={self.decoding.most} or increase max_tokens={self.max_tokens}"
                )
            parts = shorter
        return self._summarize(lm, batch, row, parts)[0]

    def _summarize(self, lm: PromptedLM, batch: Batch, row: int, parts: Sequence[str]) -> list[str]:
        """Returns the summary of each part."""
        summaries: list[str] = []
        for start in range(0, len(parts), len(batch)):
            part_batch = self._part_batch(batch, row, parts[start : start + len(batch)])
            ids = lm.generate(part_batch, **self.decoding.options)
            summaries += self.decoding.texts(self.codec, ids)
        return summaries

    def _part_batch(self, batch: Batch, row: int, parts: Sequence[str]) -> Batch:
        """Returns a batch of the parts of a row, with the task of the row."""
        assert batch.examples is not None
        fields = batch.examples[row].fields
        examples = [Example({**fields, self.column: part}, "") for part in parts]
        task = None if batch.task_ids is None else batch.task_ids[row].expand(len(parts))
        rows = [self._encode(example.fields) for example in examples]
        collated = self.codec.collate(rows, row_ids=[batch.row_ids[row]] * len(parts), examples=examples)
        return replace(collated.to(batch.input_ids.device), task_ids=task)

    def _encode(self, fields: Mapping[str, str]) -> Encoded:
        return self.codec.encode(self.template.pieces(fields), "", self.max_tokens)


def _preferred_ends(text: str, longest: int) -> list[int]:
    """Returns the last end of a sentence in the second half of the first `longest` characters, and of a word."""
    sentence_ends = [mark.end() for mark in END.finditer(text, 0, longest + 1)]
    late_ends = [end for end in sentence_ends if longest < 2 * end <= 2 * longest]
    word_ends = [space.start() for space in re.finditer(r"\s+", text[: longest + 1])]
    return [*late_ends[-1:], *word_ends[-1:]]
