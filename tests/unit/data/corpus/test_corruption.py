"""Corruption of text: which tokens are predicted, and the format of the rows of each family."""

import numpy as np
import pytest

from lightning_softprompt.core.types import Encoded
from lightning_softprompt.data.corpus.corruption import (
    CorruptionIds,
    CorruptSpans,
    MaskTokens,
    SplitPrefix,
    number_words,
)

MASK, STOP, SPECIAL = 1, 2, 5  # ids below SPECIAL are special tokens
SENTINELS = (104, 103, 102, 101, 100)
TEXT = tuple(range(10, 60))
WORDS = [number // 2 for number in range(50)]  # two tokens for each word


def ids_of(sentinels=SENTINELS, stop=()):
    return CorruptionIds(MASK, sentinels, np.arange(SPECIAL, 100), stop, num_after=1)


def masked_row(text=TEXT):
    answers = tuple(range(1, 1 + len(text)))
    return Encoded((3, *[MASK] * len(text), 4), answers, text, (1,))


def seq2seq_row(text=TEXT, stop=(STOP,)):
    return Encoded((3, 4), (), (*text, *stop), (1,))


def rng(seed=0):
    return np.random.default_rng(seed)


def test_the_shares_of_masked_random_and_unchanged_tokens():
    counts = dict.fromkeys(("mask", "same", "random"), 0)
    for seed in range(400):
        row = MaskTokens()(masked_row(), WORDS, ids_of(), rng(seed))
        assert len(row.answers) == len(row.targets) == round(0.15 * 50)
        assert (row.ids[0], row.ids[-1], row.slots) == (3, 4, (1,))
        hidden = dict(zip(row.answers, row.targets, strict=True))
        for position, token in enumerate(row.ids[1:-1], start=1):
            original = TEXT[position - 1]
            if position not in hidden:
                assert token == original
                continue
            assert hidden[position] == original
            kind = "mask" if token == MASK else "same" if token == original else "random"
            counts[kind] += 1
            assert token == MASK or token >= SPECIAL
    total = sum(counts.values())
    shares = {kind: count / total for kind, count in counts.items()}
    assert shares == pytest.approx({"mask": 0.8, "same": 0.1, "random": 0.1}, abs=0.03)


def test_each_token_is_selected_equally_often():
    counts = np.zeros(50)
    for seed in range(1000):
        row = MaskTokens()(masked_row(), WORDS, ids_of(), rng(seed))
        counts[np.array(row.answers) - 1] += 1
    assert counts / 1000 == pytest.approx(np.full(50, 8 / 50), abs=0.06)


def test_words_are_masked_as_a_whole():
    for seed in range(50):
        row = MaskTokens(whole_words=True, mask=1.0, random=0.0)(masked_row(), WORDS, ids_of(), rng(seed))
        selected = {position - 1 for position in row.answers}
        assert all((position ^ 1) in selected for position in selected)
        assert len(selected) == 8
    singles = MaskTokens(mask=1.0, random=0.0)(masked_row(), WORDS, ids_of(), rng())
    assert any((position - 1) ^ 1 not in {p - 1 for p in singles.answers} for position in singles.answers)


def test_a_short_text_has_a_target_and_special_tokens_are_not_selected():
    assert len(MaskTokens()(masked_row((10,)), [0], ids_of(), rng()).targets) == 1
    for seed in range(20):
        row = MaskTokens()(masked_row((0, 10, 0)), [0, 1, 2], ids_of(), rng(seed))
        assert row.targets == (10,)
    assert MaskTokens()(masked_row((0,)), [0], ids_of(), rng()).targets == (0,)


def restore(row, sentinels=SENTINELS):
    """Returns the text of a row whose spans were replaced by sentinels."""
    source, target = list(row.ids[1:-1]), list(row.targets)
    assert target.pop() == STOP
    spans = {}
    for token in target:
        if token in sentinels:
            spans[token] = current = []
        else:
            current.append(token)
    return [token for marker in source for token in spans.get(marker, [marker])], spans


@pytest.mark.parametrize("length", [1, 2, 3, 7, 50])
def test_sentinels_with_their_spans_restore_the_text(length):
    text = TEXT[:length]
    for seed in range(30):
        row = CorruptSpans()(seq2seq_row(text), [], ids_of(stop=(STOP,)), rng(seed))
        restored, spans = restore(row)
        assert restored == list(text)
        assert list(spans) == list(SENTINELS[: len(spans)])
        assert sum(map(len, spans.values())) == max(1, round(0.15 * length))
        assert (row.ids[0], row.ids[-1]) == (3, 4)


def test_each_token_is_removed_about_equally_often():
    counts = np.zeros(50)
    for seed in range(1000):
        row = CorruptSpans()(seq2seq_row(), [], ids_of(stop=(STOP,)), rng(seed))
        removed = [token for token in row.targets if token in TEXT]
        counts[np.array(removed) - 10] += 1
    assert 0.05 < counts.min() / 1000 < counts.max() / 1000 < 0.3


def test_the_mean_length_of_spans():
    lengths = []
    for seed in range(200):
        row = CorruptSpans(rate=0.3, mean_length=3.0)(seq2seq_row(), [], ids_of(stop=(STOP,)), rng(seed))
        lengths += [len(span) for span in restore(row)[1].values()]
    assert np.mean(lengths) == pytest.approx(3.0, abs=0.1)
    assert min(lengths) == 1 < max(lengths)


def test_no_more_spans_than_sentinels():
    row = CorruptSpans(rate=0.5, mean_length=1.0)(seq2seq_row(), [], ids_of(SENTINELS[:2], (STOP,)), rng())
    restored, spans = restore(row)
    assert restored == list(TEXT)
    assert len(spans) == 2


def test_without_sentinels_masks_replace_spans_and_the_text_is_predicted():
    row = CorruptSpans()(seq2seq_row(), [], ids_of((), (STOP,)), rng())
    assert row.targets == (*TEXT, STOP)
    assert row.ids.count(MASK) == 3  # 8 tokens in spans of 3
    assert [token for token in row.ids[1:-1] if token != MASK] == [token for token in TEXT if token in row.ids]


def test_a_prefix_is_the_input_and_the_rest_is_predicted():
    positions = set()
    for seed in range(100):
        row = SplitPrefix()(seq2seq_row(), [], ids_of(stop=(STOP,)), rng(seed))
        assert (*row.ids[1:-1], *row.targets) == (*TEXT, STOP)
        positions.add(len(row.targets) - 1)
    assert min(positions) >= 1
    assert len(positions) > 30
    assert SplitPrefix()(seq2seq_row((10,)), [], ids_of(stop=(STOP,)), rng()).targets == (10, STOP)


def test_words_are_stretches_of_letters_and_digits():
    spans = [(0, 4), (4, 10), (10, 11), (11, 14)]
    assert number_words("film about-dog", spans) == [0, 1, 2, 3]
    assert number_words("unfilmed dog", [(0, 2), (2, 6), (6, 8), (8, 12)]) == [0, 0, 0, 1]
    assert number_words("", []) == []


def test_wrong_shares_are_refused():
    for wrong in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="rate must be between 0 and 1"):
            MaskTokens(rate=wrong)
    with pytest.raises(ValueError, match="sum is at most 1"):
        MaskTokens(mask=0.9, random=0.2)
    with pytest.raises(ValueError, match="at least 1"):
        CorruptSpans(mean_length=0.5)
