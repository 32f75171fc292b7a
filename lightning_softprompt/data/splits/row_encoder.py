"""`RowEncoder`: tokenizes the rows of a split, and caches them on disk."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_softprompt.backbones.tokenization.codec import Codec, TruncationSide
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import NO_TOKEN, Encoded, Example
from lightning_softprompt.data.readers.sources import DataError, Origin
from lightning_softprompt.data.token_cache import content_key, load_or_encode

log = logging.getLogger(__name__)


class NumberSharing:
    """Replaces equal numbers of rows by one object, which about halves the memory of the tokens of a split."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}

    def __call__(self, row: Encoded) -> Encoded:
        """Returns the same row."""
        share = self.numbers.setdefault
        ids, targets = tuple(map(share, row.ids, row.ids)), tuple(map(share, row.targets, row.targets))
        return row._replace(ids=ids, targets=targets)


@dataclass(frozen=True)
class RowEncoder:
    """Converts rows from text to tokens.

    Args:
        codec: The codec of the backbone.
        template: The template of the rows, with the columns that may be truncated.
        max_tokens: Maximum tokens per row.
        truncation_side: Which part of a column to remove.
        append_eos: Whether targets end with the token that stops generation.
        max_target_tokens: Tokens of each row that are reserved for its target.
    """

    codec: Codec
    template: Template
    max_tokens: int
    truncation_side: TruncationSide
    append_eos: bool
    max_target_tokens: int | None

    def encode(self, example: Example) -> Encoded:
        """Encodes a row.

        Raises:
            ValueError: If the row does not fit into max_tokens.
        """
        pieces = self.template.pieces(example.fields, example.words, example.template_spans)
        return self.codec.encode(
            pieces,
            example.target,
            self.max_tokens,
            self.append_eos or example.ends_text,
            self.truncation_side,
            self.max_target_tokens,
        )

    def encode_split(
        self, name: str, examples: Sequence[Example], origins: Sequence[Origin], use_cache: bool
    ) -> list[Encoded]:
        """Encodes all rows of a split, and logs how many were truncated.

        Args:
            name: The split, for the log.
            examples: The rows.
            origins: Where each row comes from.
            use_cache: Whether to read the tokens from the cache on disk, and to write them there.

        Raises:
            DataError: If a row does not fit; the message names its file and line.
        """

        def encode_rows() -> list[Encoded]:
            share_numbers = NumberSharing()
            pairs = zip(examples, origins, strict=True)
            return [share_numbers(self._encode_at(example, origin)) for example, origin in pairs]

        encoded = load_or_encode(self._cache_key(examples), encode_rows) if use_cache else encode_rows()
        num_truncated = sum(row.num_truncated > 0 for row in encoded)
        if num_truncated:
            log.info("Truncated %d of %d %s rows to max_tokens=%d", num_truncated, len(encoded), name, self.max_tokens)
        num_lost = sum(row.words.count(NO_TOKEN) for row in encoded)
        if num_lost:
            log.info("%d words of the %s rows have no token after truncation and are not scored", num_lost, name)
        return encoded

    def _encode_at(self, example: Example, origin: Origin) -> Encoded:
        try:
            return self.encode(example)
        except ValueError as error:
            raise DataError(f"{origin.where}: {error}") from None

    def _cache_key(self, examples: Sequence[Example]) -> str:
        """Hashes everything that determines the tokens of the rows."""
        texts = [
            (
                tuple(example.fields.items()),
                example.target,
                tuple(example.words.items()),
                tuple(example.template_spans.items()),
            )
            for example in examples
        ]
        truncate = sorted(self.template.truncate)
        settings = [truncate, self.truncation_side, self.max_tokens, self.append_eos, self.max_target_tokens]
        ends = [number for number, example in enumerate(examples) if example.ends_text]
        return content_key([self.codec.fingerprint, self.template.text, settings, texts, *ends])
