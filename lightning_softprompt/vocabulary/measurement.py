"""Measures a tokenizer on a corpus: unknown tokens, tokens per word, byte and document, and its speed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from time import process_time
from typing import Any

from tokenizers import Tokenizer

from lightning_softprompt.vocabulary.corpus_texts import Piece

BATCH = 64  # pieces that are tokenized together


@dataclass(frozen=True)
class Measurement:
    """Counts of a tokenizer on a corpus.

    Args:
        documents: Documents.
        num_bytes: Bytes in UTF-8.
        words: Stretches without white space.
        tokens: Tokens, without special tokens.
        unknown: Unknown tokens.
        added: Tokens with ids that the base tokenizer does not have.
        seconds: CPU seconds of tokenization.
    """

    documents: int = 0
    num_bytes: int = 0
    words: int = 0
    tokens: int = 0
    unknown: int = 0
    added: int = 0
    seconds: float = 0.0

    @property
    def unknown_rate(self) -> float:
        """Share of unknown tokens."""
        return self.unknown / max(1, self.tokens)

    @property
    def fertility(self) -> float:
        """Tokens per word."""
        return self.tokens / max(1, self.words)

    @property
    def bytes_per_token(self) -> float:
        """Bytes per token."""
        return self.num_bytes / max(1, self.tokens)

    @property
    def tokens_per_document(self) -> float:
        """Tokens per document."""
        return self.tokens / max(1, self.documents)

    @property
    def megabytes_per_second(self) -> float:
        """Megabytes of text that are tokenized per CPU second."""
        return self.num_bytes / 1e6 / max(1e-9, self.seconds)


def measure_tokenizer(pieces: Iterable[Piece], tokenizer: Any, first_added: int | None = None) -> Measurement:
    """Measures a tokenizer on a corpus.

    Args:
        pieces: The corpus.
        tokenizer: A fast tokenizer of transformers.
        first_added: The first id that the base tokenizer does not have.
    """
    rules, unknown_id = unlimited_rules(tokenizer), tokenizer.unk_token_id
    documents = num_bytes = words = tokens = unknown = added = 0
    seconds, last = 0.0, None
    for batch in _batches(pieces):
        texts = [piece.text for piece in batch]
        start = process_time()
        encodings = rules.encode_batch(texts, add_special_tokens=False)
        seconds += process_time() - start
        for piece, encoding in zip(batch, encodings, strict=True):
            documents += piece.document != last
            last = piece.document
            num_bytes += len(piece.text.encode())
            words += len(piece.text.split())
            ids = encoding.ids
            tokens += len(ids)
            unknown += ids.count(unknown_id)
            added += 0 if first_added is None else sum(id >= first_added for id in ids)
    return Measurement(documents, num_bytes, words, tokens, unknown, added, seconds)


def unlimited_rules(tokenizer: Any) -> Tokenizer:
    """Returns the rules of a tokenizer without padding and truncation, which some files of tokenizers contain."""
    rules = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    rules.no_padding()
    rules.no_truncation()
    return rules


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    for piece in pieces:
        batch.append(piece)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
