"""Costs of words, and savings of the first new tokens, for each type of tokenizer."""

import pytest
from small_tokenizers import byte_pairs, unigram, word_pieces
from transformers import T5TokenizerFast

from lightning_softprompt.vocabulary.base import Selection
from lightning_softprompt.vocabulary.corpus_texts import Piece
from lightning_softprompt.vocabulary.extension import create_extension
from lightning_softprompt.vocabulary.measurement import measure_tokenizer
from lightning_softprompt.vocabulary.savings import draw_savings, measure_savings
from lightning_softprompt.vocabulary.token_vectors import tokenize_pieces
from lightning_softprompt.vocabulary.word_costs import WordCost, measure_words
from lightning_softprompt.vocabulary.word_counts import count_words

ENGLISH = ["the cat sat on the mat", "a cat that sat with a dog"] * 5
CORPUS = ["cardiology wing coração", "cardio wing coração cardiology", "wing ação"] * 2


def read():
    return [Piece(number, text) for number, text in enumerate(CORPUS)]


@pytest.mark.parametrize("kind", ["merges", "pieces", "unigram"])
def test_savings_equal_those_of_a_tokenizer_that_is_extended_by_fewer_tokens(kind):
    tokenizer = {
        "merges": lambda: byte_pairs(ENGLISH, 290),
        "pieces": word_pieces,
        "unigram": lambda: unigram(ENGLISH, T5TokenizerFast),
    }[kind]()
    counts = count_words(read(), tokenizer)
    extended = {}
    for rows in range(1, 4):
        extension = create_extension(tokenizer)
        extension.select(counts, None, Selection(rows, 1, 1))
        extended[rows] = extension
    full = extended[max(extended)]
    savings = list(measure_savings(read, full.extended(), full.rows, points=len(full.rows)))
    assert [saving.rows for saving in savings] == list(range(len(full.rows) + 1))
    for rows, tokens in savings:
        reference = extended[rows].extended() if rows else tokenizer
        encodings = [reference(text, add_special_tokens=False).input_ids for text in CORPUS]
        assert tokens == sum(map(len, encodings))
    assert savings[-1].tokens < savings[0].tokens
    [line] = draw_savings(savings).axes[0].lines
    assert line.get_ydata()[-1] == pytest.approx(100 * (1 - savings[-1].tokens / savings[0].tokens))


def test_costs_of_words():
    tokenizer = word_pieces()
    costs = measure_words(count_words(read(), tokenizer), tokenizer)
    assert costs.by_tokens == {1: 6 + 4 + 2 + 2, 2: 4}
    assert costs.words[0] == WordCost("cardiology", count=4, tokens=2, is_unknown=False)
    assert costs.words[0].extra_tokens == 4
    assert [(word.text, word.is_unknown) for word in costs.words[1:]] == [("coração", True), ("ação", True)]


def test_padding_and_truncation_of_a_tokenizer_are_not_measured():
    tokenizer = word_pieces()
    expected = measure_tokenizer(read(), tokenizer).tokens
    tokenizer.backend_tokenizer.enable_padding(length=16)
    tokenizer.backend_tokenizer.enable_truncation(1)
    assert measure_tokenizer(read(), tokenizer).tokens == expected
    assert sum(map(len, tokenize_pieces(read(), tokenizer))) == expected
