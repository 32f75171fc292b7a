"""The mean loss of words by how often they occur in the training documents."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, final

from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.types import Text
from lightning_softprompt.evaluation.words.word_counts import FREQUENCIES, frequency_of, normalize_word

PREFIX = "nats_by_frequency"
NATS = tuple(f"nats_of_{name}" for name in FREQUENCIES)  # columns of a window
WORDS = tuple(f"words_of_{name}" for name in FREQUENCIES)
WORD = re.compile(r"\S+")


@final
class WordNats:
    """Adds the losses of the tokens of each word, and groups words by their number of occurrences.

    Args:
        count: Returns the occurrences of each word in the training documents. It is called at the first window.
        glue: Spaces before the text of a row.
    """

    def __init__(self, count: Callable[[], Mapping[str, int]], glue: str = "") -> None:
        self.count, self.glue = count, glue

    def __deepcopy__(self, memo: Any) -> WordNats:
        """Returns the same object, since the evaluations of all stages share the counts."""
        return self

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """Occurrences of each word."""
        return self.count()

    def measure(self, codec: Codec, text: str, losses: Sequence[float]) -> dict[str, float]:
        """Returns nats and number of words of each class of frequency.

        Args:
            codec: The codec of the backbone.
            text: The text of a window.
            losses: Nats of each of its tokens.
        """
        sums = dict.fromkeys((*NATS, *WORDS), 0.0)
        written = self.glue + text
        words = list(WORD.finditer(written))
        classes = [frequency_of(self.counts.get(normalize_word(word[0]), 0)) for word in words]
        for number in classes:
            sums[WORDS[number]] += 1
        starts = [word.start() for word in words]
        _, spans = codec.tokenize([Text(written)])
        for nats, (first, last) in zip(losses, spans, strict=True):
            # The last character of a token belongs to its word, since a token may begin with white space.
            word = max(0, bisect_right(starts, max(first, last - 1)) - 1)
            sums[NATS[classes[word]]] += nats
        return sums


def summarize_words(sums: Mapping[str, float]) -> dict[str, float]:
    """Returns the mean nats of a word of each class of frequency that occurs.

    Args:
        sums: Sums of the columns of all windows.
    """
    return {
        f"{PREFIX}/{name}": sums[nats] / sums[words]
        for name, nats, words in zip(FREQUENCIES, NATS, WORDS, strict=True)
        if sums[words]
    }
