"""Passages contain the whole text, do not exceed the size, and have the requested overlap."""

import random
from itertools import pairwise

import pytest

from lightning_softprompt.retrieval.passages.chunking import Chunking, find_words
from lightning_softprompt.retrieval.search import encoder
from lightning_softprompt.retrieval.search.encoder import load_token_units

POEM = "One. Two three four. Five six seven? Eight nine.\n\nTen eleven! Twelve thirteen fourteen fifteen. Sixteen"


MARKS = ["", "", "", ".", "!", "?", ",", ".\n\n", "\n", ".  "]


def random_text(rng):
    text = rng.choice(["", " ", "\n\n"])
    for _ in range(rng.randint(1, 60)):
        letters = rng.choices("abcÀé語", k=rng.randint(1, 6))
        text += f"{''.join(letters).title()}{rng.choice(MARKS)} "
    return text


def split(text, chunking):
    """Returns the passages of a text."""
    return [text[start:end] for start, end in chunking.spans(text)]


@pytest.mark.parametrize("whole", ["sentences", "paragraphs", "nothing"])
@pytest.mark.parametrize(("size", "overlap"), [(1, 0), (5, 0), (5, 2), (8, 7), (100, 10)])
def test_passages_cover_the_text_and_respect_size_and_overlap(whole, size, overlap):
    rng = random.Random(0)
    chunking = Chunking(size, overlap, whole)
    for _ in range(100):
        text = random_text(rng)
        spans = chunking.spans(text)
        assert spans[0][0] == 0
        assert spans[-1][1] == len(text)
        for (start, end), (next_start, next_end) in pairwise(spans):
            assert start < next_start <= end < next_end
            assert len(find_words(text[next_start:end])) <= overlap
        lengths = [len(find_words(text[start:end])) for start, end in spans]
        assert min(lengths) >= 1
        assert max(lengths) <= size


def test_the_overlap_is_exact_if_sentences_are_ignored():
    words = [f"w{number}" for number in range(20)]
    passages = [passage.split() for passage in split(" ".join(words), Chunking(8, 3, "nothing"))]
    assert passages == [words[0:8], words[5:13], words[10:18], words[15:20]]


def test_passages_start_and_end_with_complete_sentences():
    passages = split(POEM, Chunking(size=6, overlap=3))
    assert [passage.strip() for passage in passages] == [
        "One. Two three four.",
        "Two three four. Five six seven?",
        "Five six seven? Eight nine.",
        "Eight nine.\n\nTen eleven!",
        "Ten eleven! Twelve thirteen fourteen fifteen.",
        "Sixteen",
    ]


def test_passages_can_end_with_paragraphs_instead_of_sentences():
    by_paragraph = split(POEM, Chunking(size=11, overlap=0, whole="paragraphs"))
    assert [len(find_words(passage)) for passage in by_paragraph] == [9, 7]
    by_sentence = Chunking(size=11, overlap=0).spans(POEM)
    assert by_sentence[0][1] == POEM.index("Twelve")


def test_a_sentence_that_is_too_long_is_split_between_words_with_overlap():
    passages = split("Short. a b c d e f g h i j", Chunking(4, 1))
    assert [passage.strip() for passage in passages] == ["Short.", "a b c d", "d e f g", "g h i j"]


@pytest.mark.parametrize("text", ["", "  \n "])
def test_a_text_without_words_has_no_passages(text):
    assert Chunking().spans(text) == []


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (5, 5), (5, -1)])
def test_an_overlap_that_is_negative_or_not_less_than_the_size_is_rejected(size, overlap):
    with pytest.raises(ValueError, match="overlap must be at least 0 and below size"):
        Chunking(size, overlap)


def test_the_size_can_be_measured_in_tokens_of_a_tokenizer(tiny_folder):
    text = "a warm, funny film.  it never ends!"
    units = load_token_units(str(tiny_folder("bert")))
    tokens = [text[start:end] for start, end in units(text)]
    assert tokens == ["a", "warm", ",", "funny", "film", ".", "it", "never", "ends", "!"]
    passages = split(text, Chunking(4, 1, "nothing", units))
    assert passages == ["a warm, funny ", "funny film.  it ", "it never ends!"]


def test_the_spans_of_tokens_exclude_white_space_and_repeated_characters():
    spans = [(0, 1), (1, 3), (3, 5), (3, 5), (5, 6), (6, 7)]  # a tokenizer of bytes: an emoji is several tokens
    assert encoder._visible("a b 🦊 c", spans) == [(0, 1), (2, 3), (4, 5), (6, 7)]
