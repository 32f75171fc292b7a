"""Which texts contain a term that an extended tokenizer adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_softprompt.backbones.tokenization.added_rows import read_vocabulary
from lightning_softprompt.vocabulary.word_counts import split_words


class AddedTerms:
    """The terms of an extended tokenizer: words that became one token.

    Tokens that are parts of words do not count as terms where they are a part.

    Args:
        folder: A folder that `softprompt vocabulary extend` wrote.

    Raises:
        ValueError: If the folder has no such tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self._tokens = {row.token for row in read_vocabulary(folder).rows}
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def occur_in(self, text: str) -> bool:
        """Whether a word of a text is a term."""
        words = split_words(self._tokenizer, f"a {text}")[1:]  # also the first word follows a space, as in a prompt
        return not self._tokens.isdisjoint(words)
