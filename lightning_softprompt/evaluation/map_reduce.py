"""Documents longer than the window: their parts are summarised, then the summaries are, until one is left."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import final

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Batch, Encoded, Example
from lightning_softprompt.evaluation.metrics.sentences import END


@final
class MapReduce:
    """Summarises a document in parts that fit, as the template writes them, and its summaries likewise.

    Parts are as long as can be. They end with a sentence where that leaves them more than half as long, else with a
    word, and within a word only where it alone does not fit.

    Args:
        codec: The backbone's.
        template: How a row is written.
        column: The document's.
        max_tokens: Most tokens of a row without the soft ones.
        decoding: How summaries are generated.

    Raises:
        ValueError: If the template lacks the column, or summaries of two parts might not fit a row together.
    """

    def __init__(self, codec: Codec, template: Template, column: str, max_tokens: int, decoding: Decoding) -> None:
        if column not in template.columns:
            raise ValueError(f"documents are to be cut in column {column!r}, but the template has {template.columns}")
        if max_tokens <= 2 * decoding.most:
            raise ValueError(
                f"summaries of two parts must fit a row of max_tokens={max_tokens} together, but each may take "
                f"max_new_tokens={decoding.most}; lower that, or raise max_tokens"
            )
        self.codec, self.column, self.max_tokens, self.decoding = codec, column, max_tokens, decoding
        self.template = Template(template.text, template.columns)  # what does not fit is seen by what would be cut

    def fits(self, fields: Mapping[str, str]) -> bool:
        """Whether a row needs no cut."""
        return not self._encoded(fields).num_truncated

    def parts(self, fields: Mapping[str, str]) -> list[str]:
        """The document in parts that fit.

        Raises:
            ValueError: If the row's other columns leave no room for any.
        """
        rest, found = fields[self.column].strip(), []
        while (longest := self._longest(fields, rest)) < len(rest):
            ends = [*_good_ends(rest, longest), longest]
            end = next((end for end in ends if self._fits(fields, rest[:end])), longest)
            found.append(rest[:end].strip())
            rest = rest[end:].strip()
        return [*found, rest]

    def _fits(self, fields: Mapping[str, str], text: str) -> bool:
        return self.fits({**fields, self.column: text.strip()})

    def _longest(self, fields: Mapping[str, str], text: str) -> int:
        """How many letters of a text fit. No more of it is looked at than that takes: it may be a book."""
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
        """The summary of a row's document.

        Args:
            lm: Summarises.
            batch: Has the row; as many parts as it has rows run together.
            row: Its place in the batch.

        Raises:
            ValueError: If the summaries of parts are too long to be summarised together.
        """
        assert batch.examples is not None, "rows without their texts"
        fields = batch.examples[row].fields
        parts = self.parts(fields)
        while len(parts) > 1:
            joined = " ".join(self._said(lm, batch, row, parts))
            shorter = self.parts({**fields, self.column: joined})
            if len(shorter) >= len(parts):
                raise ValueError(
                    f"{len(parts)} parts of a document have summaries that make {len(shorter)} parts again; lower "
                    f"max_new_tokens={self.decoding.most}, or raise max_tokens={self.max_tokens}"
                )
            parts = shorter
        return self._said(lm, batch, row, parts)[0]

    def _said(self, lm: PromptedLM, batch: Batch, row: int, parts: Sequence[str]) -> list[str]:
        """Summaries of parts."""
        said: list[str] = []
        for start in range(0, len(parts), len(batch)):
            asked = self._asked(batch, row, parts[start : start + len(batch)])
            said += self.decoding.texts(self.codec, lm.generate(asked, **self.decoding.options))
        return said

    def _asked(self, batch: Batch, row: int, parts: Sequence[str]) -> Batch:
        """A batch of a row's parts, of the row's task."""
        assert batch.examples is not None
        fields = batch.examples[row].fields
        examples = [Example({**fields, self.column: part}, "") for part in parts]
        task = None if batch.task_ids is None else batch.task_ids[row].expand(len(parts))
        rows = [self._encoded(example.fields) for example in examples]
        made = self.codec.collate(rows, row_ids=[batch.row_ids[row]] * len(parts), examples=examples)
        return replace(made.to(batch.input_ids.device), task_ids=task)

    def _encoded(self, fields: Mapping[str, str]) -> Encoded:
        return self.codec.encode(self.template.pieces(fields), "", self.max_tokens)


def _good_ends(text: str, longest: int) -> list[int]:
    """The last end of a sentence, if in the second half of what fits, and that of a word."""
    sentence = [mark.end() for mark in END.finditer(text, 0, longest + 1) if longest < 2 * mark.end() <= 2 * longest]
    word = [space.start() for space in re.finditer(r"\s+", text[: longest + 1])]
    return [*sentence[-1:], *word[-1:]]
