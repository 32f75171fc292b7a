"""Windows of documents."""

import random

import pytest

from lightning_softprompt.data.corpus.windows import cut_windows

TEXTS = (
    "one two three four five six",
    "a\n\nb  c   d\te",
    "word" * 50,
    "größer als die Straße — ü" * 5,
    "日本語の文章には空白がありません。" * 4,
    "😀😀😀 😀😀",
    "x",
    " ",
)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [4, 7, 16, 1000])
def test_windows_join_to_the_text(text, size):
    windows = list(cut_windows(text, size))
    assert "".join(window.text for window in windows) == text
    assert all(window.num_bytes == len(window.text.encode()) <= size for window in windows)
    assert sum(window.num_words for window in windows) == len(text.split())


def test_words_are_not_divided_if_they_fit():
    words = [random.Random(0).choice(["a", "dog", "film", "wonderful"]) for _ in range(300)]
    for window in cut_windows(" ".join(words), 20):
        assert set(window.text.split()) <= set(words)


def test_a_window_uses_the_space_that_it_has():
    assert [window.text for window in cut_windows("aaa bbb ccc", 7)] == ["aaa bbb", " ccc"]
    assert [window.text for window in cut_windows("aaa bbb ccc", 6)] == ["aaa", " bbb", " ccc"]


def test_an_empty_document_has_no_window():
    assert list(cut_windows("", 10)) == []


def test_a_long_line_takes_time_in_proportion_to_its_length():
    text = "word " * 2_000_000  # 10 MB
    assert sum(1 for _ in cut_windows(text, 1024)) == len(text) // 1020 + 1
