"""Passages are cut exactly: nothing is lost, nothing is too long, and the overlap is what was asked for."""

import random
from itertools import pairwise

import pytest

from lightning_softprompt.retrieval.passages.chunking import Chunking, find_words
from lightning_softprompt.retrieval.search.encoder import load_token_units

POEM = "One. Two three four. Five six seven? Eight nine.\n\nTen eleven! Twelve thirteen fourteen fifteen. Sixteen"


def random_text(rng):
    marks = ["", "", "", ".", "!", "?", ",", ".\n\n", "\n", ".  "]
    words = ["".join(rng.choices("abcÀé語", k=rng.randint(1, 6))) for _ in range(rng.randint(1, 60))]
    return rng.choice(["", " ", "\n\n"]) + "".join(word.title() + rng.choice(marks) + " " for word in words)


@pytest.mark.parametrize("whole", ["sentences", "paragraphs", "nothing"])
@pytest.mark.parametrize(("size", "overlap"), [(1, 0), (5, 0), (5, 2), (8, 7), (100, 10)])
def test_passages_cover_the_text_get_on_and_are_short_enough(whole, size, overlap):
    rng = random.Random(0)
    cutting = Chunking(size, overlap, whole)
    for _ in range(100):
        text = random_text(rng)
        spans = cutting.spans(text)
        assert spans[0][0] == 0
        assert spans[-1][1] == len(text)
        for (start, end), (next_start, next_end) in pairwise(spans):
            assert start < next_start <= end < next_end
            assert len(find_words(text[next_start:end])) <= overlap
        assert all(1 <= len(find_words(text[start:end])) <= size for start, end in spans)


def test_without_sentences_the_overlap_is_exact():
    words = [f"w{number}" for number in range(20)]
    found = [" ".join(words)[start:end].split() for start, end in Chunking(8, 3, "nothing").spans(" ".join(words))]
    assert found == [words[0:8], words[5:13], words[10:18], words[15:20]]


def test_passages_end_where_sentences_do_and_begin_with_whole_ones():
    spans = Chunking(size=6, overlap=3).spans(POEM)
    assert [POEM[start:end].strip() for start, end in spans] == [
        "One. Two three four.",
        "Two three four. Five six seven?",
        "Five six seven? Eight nine.",
        "Eight nine.\n\nTen eleven!",
        "Ten eleven! Twelve thirteen fourteen fifteen.",
        "Sixteen",
    ]


def test_a_paragraph_is_kept_whole_before_sentences_are():
    spans = Chunking(size=11, overlap=0, whole="paragraphs").spans(POEM)
    assert [len(find_words(POEM[start:end])) for start, end in spans] == [9, 7]
    assert Chunking(size=11, overlap=0).spans(POEM)[0][1] == POEM.index("Twelve")


def test_a_sentence_that_is_too_long_is_cut_between_words_with_overlap():
    text = "Short. " + " ".join("abcdefghij")
    assert [text[start:end].split() for start, end in Chunking(4, 1).spans(text)] == [
        ["Short."],
        ["a", "b", "c", "d"],
        ["d", "e", "f", "g"],
        ["g", "h", "i", "j"],
    ]


@pytest.mark.parametrize("text", ["", "  \n "])
def test_a_text_without_words_has_no_passages(text):
    assert Chunking().spans(text) == []


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (5, 5), (5, -1)])
def test_passages_that_would_not_get_on_are_refused(size, overlap):
    with pytest.raises(ValueError, match="0 <= overlap < size"):
        Chunking(size, overlap)


def test_tokens_are_counted_by_a_models_tokenizer(tiny_folder):
    text = "a warm, funny film.  it never ends!"
    units = load_token_units(str(tiny_folder("bert")))
    assert [text[start:end] for start, end in units(text)] == [
        "a",
        "warm",
        ",",
        "funny",
        "film",
        ".",
        "it",
        "never",
        "ends",
        "!",
    ]
    assert [text[start:end] for start, end in Chunking(4, 1, "nothing", units).spans(text)] == [
        "a warm, funny ",
        "funny film.  it ",
        "it never ends!",
    ]


def test_white_space_that_tokens_hold_is_not_theirs(monkeypatch):
    from lightning_softprompt.retrieval.search import encoder

    spans = [(0, 1), (1, 3), (3, 5), (3, 5), (5, 6), (6, 7)]  # a tokenizer of bytes: an emoji is several tokens
    assert encoder._visible("a b 🦊 c", spans) == [(0, 1), (2, 3), (4, 5), (6, 7)]
