"""Corruption of text for language modeling: which tokens of a row are replaced, and which ones are predicted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, pairwise, takewhile
from typing import ClassVar, final

import numpy as np
import numpy.typing as npt

from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.types import Encoded

Rng = np.random.Generator
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CorruptionIds:
    """The token ids that a corruption needs.

    Args:
        mask: The mask token; None if the tokenizer has none.
        sentinels: The tokens that replace spans, in order.
        ordinary: All tokens that are not special.
        stop: The tokens at the end of a target.
        num_after: Number of input tokens after the text.
    """

    mask: int | None
    sentinels: tuple[int, ...]
    ordinary: Integers
    stop: tuple[int, ...]
    num_after: int

    @classmethod
    def of(cls, codec: Codec) -> CorruptionIds:
        """The token ids of a codec."""
        tokenizer = codec.tokenizer
        vocabulary = tokenizer.get_vocab()
        names = takewhile(vocabulary.__contains__, (f"<extra_id_{number}>" for number in count()))
        sentinels = tuple(vocabulary[name] for name in names)
        special = {*tokenizer.all_special_ids, *codec.control_tokens.spellings, *sentinels}
        ordinary = [id for id in range(len(tokenizer)) if id not in special]
        return cls(tokenizer.mask_token_id, sentinels, np.array(ordinary), codec.stop, num_after=len(codec.end))


class Corruption(ABC):
    """Corrupts the text of a row, which is its target, and predicts what was removed."""

    answer_location: ClassVar[str]  # of the codecs that it supports
    families: ClassVar[str]  # their name, for messages
    requires_marker: ClassVar[bool] = False  # whether it requires sentinels or a mask token

    @abstractmethod
    def __call__(self, row: Encoded, words: Sequence[int], ids: CorruptionIds, rng: Rng) -> Encoded:
        """Returns the corrupted row.

        Args:
            row: The row with its whole text as target.
            words: The number of the word of each target token.
            ids: Token ids of the tokenizer.
            rng: Random numbers.
        """


@final
@dataclass(frozen=True)
class MaskTokens(Corruption):
    """Predicts some tokens of a text (Devlin et al. 2019, BERT, arXiv 1810.04805, section 3.1).

    Of the selected tokens, some are replaced by the mask token, some by a random token, and the others are unchanged.
    Only selected tokens have a loss. The number of selected tokens is the rounded rate of the text, and at least one.

    Args:
        rate: Share of the tokens that are selected.
        mask: Share of the selected tokens that are replaced by the mask token.
        random: Share of the selected tokens that are replaced by a random token.
        whole_words: Whether all tokens of a word are selected together.

    Raises:
        ValueError: If a share is not between 0 and 1.
    """

    answer_location = "inside"
    families = "encoders"
    rate: float = 0.15
    mask: float = 0.8
    random: float = 0.1
    whole_words: bool = False

    def __post_init__(self) -> None:
        check_rate(self.rate)
        if min(self.mask, self.random) < 0 or self.mask + self.random > 1:
            raise ValueError(f"mask and random must be shares whose sum is at most 1, got {self.mask}, {self.random}")

    def __call__(self, row: Encoded, words: Sequence[int], ids: CorruptionIds, rng: Rng) -> Encoded:
        """Returns the row with some of its tokens as targets."""
        assert ids.mask is not None
        targets = np.array(row.targets)
        chosen = self._choose(targets, words, ids, rng)
        draws = rng.random(len(chosen))
        replaced = np.where(draws < self.mask, ids.mask, targets[chosen])
        is_random = (draws >= self.mask) & (draws < self.mask + self.random)
        replaced[is_random] = rng.choice(ids.ordinary, int(is_random.sum()))
        visible = targets.copy()
        visible[chosen] = replaced
        tokens = np.array(row.ids)
        tokens[list(row.answers)] = visible
        answers = tuple(row.answers[index] for index in chosen.tolist())
        return row._replace(ids=tuple(tokens.tolist()), answers=answers, targets=tuple(targets[chosen].tolist()))

    def _choose(self, targets: Integers, words: Sequence[int], ids: CorruptionIds, rng: Rng) -> Integers:
        """Sorted positions of the selected tokens. Special tokens are selected only if there are no others."""
        candidates = np.flatnonzero(np.isin(targets, ids.ordinary))
        if not len(candidates):
            candidates = np.arange(len(targets))
        count = max(1, round(self.rate * len(targets)))
        if not self.whole_words:
            return np.sort(rng.permutation(candidates)[:count])
        word_of = np.array(words)[candidates]
        chosen: list[int] = []
        for word in rng.permutation(np.unique(word_of)):
            if len(chosen) >= count:
                break
            chosen += candidates[word_of == word].tolist()
        return np.array(sorted(chosen), np.int64)


@final
@dataclass(frozen=True)
class CorruptSpans(Corruption):
    """Predicts the spans that are removed from the input of an encoder-decoder.

    Each span is replaced by one sentinel, and the target is each sentinel with its span (Raffel et al. 2020, T5, arXiv
    1910.10683, section 3.1.4). If the tokenizer has no sentinels, each span is replaced by one mask token, and the
    target is the whole text (Lewis et al. 2020, BART, arXiv 1910.13461, text infilling).

    Difference from the code of T5: a text may begin with a span, and need not end with one. In T5, it always does.

    Args:
        rate: Share of the tokens that are removed.
        mean_length: Mean number of tokens of a span.

    Raises:
        ValueError: If the share is not between 0 and 1, or a span has less than one token.
    """

    answer_location = "decoder"
    families = "encoder-decoders"
    requires_marker = True
    rate: float = 0.15
    mean_length: float = 3.0

    def __post_init__(self) -> None:
        check_rate(self.rate)
        if self.mean_length < 1:
            raise ValueError(f"mean_length must be at least 1, got {self.mean_length}")

    def __call__(self, row: Encoded, words: Sequence[int], ids: CorruptionIds, rng: Rng) -> Encoded:
        """Returns the row with sentinels in its input."""
        text = [token for token in row.targets if token not in ids.stop]
        is_removed = self._choose(len(text), len(ids.sentinels) or len(text), rng)
        source: list[int] = []
        target: list[int] = []
        span = 0
        for position, token in enumerate(text):
            if not is_removed[position]:
                source.append(token)
                continue
            if position == 0 or not is_removed[position - 1]:
                marker = ids.sentinels[span] if ids.sentinels else ids.mask
                assert marker is not None
                source.append(marker)
                target.append(marker)
                span += 1
            target.append(token)
        return insert_source(row, source, [*(target if ids.sentinels else text), *ids.stop], ids.num_after)

    def _choose(self, count: int, most_spans: int, rng: Rng) -> list[bool]:
        """Whether each token is removed. Random spans alternate with random stretches of the other tokens."""
        if count < 2:
            return [True] * count
        removed = min(max(1, round(self.rate * count)), count - 1)
        remaining = count - removed
        spans = min(max(1, round(removed / self.mean_length)), removed, remaining + 1, most_spans)
        # The first and the last stretch may be empty, so that each token of the text can be removed.
        stretches = divide_randomly(remaining + 2, spans + 1, rng)
        stretches[0] -= 1
        stretches[-1] -= 1
        flags = [False] * stretches[0]
        for span, stretch in zip(divide_randomly(removed, spans, rng), stretches[1:], strict=True):
            flags += [True] * span + [False] * stretch
        return flags


@final
@dataclass(frozen=True)
class SplitPrefix(Corruption):
    """The encoder reads the first part of a text, and the decoder predicts the rest.

    This is prefix language modeling (Raffel et al. 2020, section 3.3.1). The text is divided at a random position.
    """

    answer_location = "decoder"
    families = "encoder-decoders"

    def __call__(self, row: Encoded, words: Sequence[int], ids: CorruptionIds, rng: Rng) -> Encoded:
        """Returns the row with the first part of its text as input."""
        text = [token for token in row.targets if token not in ids.stop]
        position = int(rng.integers(1, len(text))) if len(text) > 1 else 0
        return insert_source(row, text[:position], [*text[position:], *ids.stop], ids.num_after)


DEFAULTS: dict[str, type[Corruption] | None] = {"end": None, "inside": MaskTokens, "decoder": CorruptSpans}


def select_corruption(corruption: Corruption | None, codec: Codec) -> Corruption | None:
    """Returns a corruption after checking it, or the default of the family; None to predict every token.

    Args:
        corruption: The corruption; None for the default.
        codec: The codec of the backbone.

    Raises:
        ValueError: If the family or the tokenizer does not support the corruption.
    """
    default = DEFAULTS[codec.answer_location]
    selected = corruption
    if selected is None:
        if default is None:
            return None
        selected = default()
    if selected.answer_location != codec.answer_location:
        remedy = "predicts every token; remove data.corruption" if default is None else f"uses {default.__name__}"
        raise ValueError(
            f"corruption is {type(selected).__name__}, which is for {selected.families}; this backbone {remedy}"
        )
    ids = CorruptionIds.of(codec)
    if selected.requires_marker and not ids.sentinels and ids.mask is None:
        raise ValueError(
            f"{type(selected).__name__} requires a tokenizer with sentinels such as <extra_id_0> or with a mask token, "
            "and this one has neither; set data.corruption to SplitPrefix"
        )
    return selected


def corrupt(row: Encoded, text: str, corruption: Corruption, codec: Codec, ids: CorruptionIds, rng: Rng) -> Encoded:
    """Corrupts a row whose target is a text.

    Args:
        row: The row. Nothing follows its target except special tokens.
        text: The target.
        corruption: Selects the tokens to predict.
        codec: The codec of the backbone.
        ids: Token ids of the tokenizer.
        rng: Random numbers.
    """
    _, spans = codec.control_tokens.tokenize(text)
    return corruption(row, number_words(text, spans), ids, rng)


def check_rate(rate: float) -> None:
    """Checks the share of tokens to predict.

    Raises:
        ValueError: If it is not between 0 and 1.
    """
    if not 0 < rate < 1:
        raise ValueError(f"rate must be between 0 and 1, got {rate}")


def insert_source(row: Encoded, source: Sequence[int], targets: Sequence[int], num_after: int) -> Encoded:
    """Returns a row of an encoder-decoder with more input before its last tokens, and with other targets."""
    position = len(row.ids) - num_after
    tokens = (*row.ids[:position], *source, *row.ids[position:])
    return row._replace(ids=tokens, targets=tuple(targets))


def divide_randomly(count: int, parts: int, rng: Rng) -> list[int]:
    """Divides a number into parts of at least 1, uniformly among all divisions.

    >>> sum(divide_randomly(10, 3, np.random.default_rng(0)))
    10
    """
    if parts == 1:
        return [count]
    cuts = 1 + rng.choice(count - 1, parts - 1, replace=False)
    ends = [*sorted(cuts.tolist()), count]
    return [end - start for start, end in pairwise([0, *ends])]


def number_words(text: str, spans: Sequence[tuple[int, int]]) -> list[int]:
    """Returns the number of the word of each token. A word is a stretch of letters and digits, or another character.

    Args:
        text: The text.
        spans: The span of each token in the text.

    >>> number_words("masked words.", [(0, 4), (4, 6), (6, 12), (12, 13)])
    [0, 0, 1, 2]
    """
    numbers: list[int] = []
    for start, end in spans:
        first = start
        while first < end and text[first].isspace():
            first += 1
        previous = numbers[-1] if numbers else -1
        is_within = bool(numbers) and 0 < first < len(text)
        continues = is_within and text[first - 1].isalnum() and text[first].isalnum()
        numbers.append(previous if continues else previous + 1)
    return numbers
