"""Scores answers against correct answers and passages. This module does not import torch."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from lightning_softprompt.core.word_boundaries import split_unspaced

Words = Sequence[str]
CITED = re.compile(r"(.*?)\s*((?:\[\d{1,4}\]\s*)*)", re.DOTALL)
DASHES = "-\u2010\u2011\u2012\u2013\u2212"
MEANINGFUL_MARK = re.compile(
    r"(?<=\d)(?![,'\u2019\u066c\uff0c](?:\d{2,3},)*\d{3}(?!\d))[^\w\s](?=\d)"  # between digits, not of thousands
    rf"|(?<![\w)\]{DASHES}])[{DASHES}](?=[$€£¥₹]?\.?\d)"  # the minus of a number
    r"|(?<![\w.])\.(?=\d)"  # a decimal point without a digit before it
    r"|(?<=[^\W_])[+#]+(?!\w)"  # C++, F#, A+
    r"|(?<=\b[^\W\d_])-(?![\w-])"  # the blood group O-
)
ARTICLES = frozenset(("a", "an", "the"))
ANSWER_SCORES = ("exact_match", "precision", "recall", "f1", "contains")


def answer_words(text: str, articles: bool = False) -> list[str]:
    """Returns the words of an answer in the normalization of SQuAD (Rajpurkar et al. 2016, 1606.05250).

    Words are lower case, without articles, punctuation and symbols of all scripts; accents are kept in any encoding.
    Each character of a script without spaces between words is a word. Two exceptions to the rules of SQuAD prevent that
    different answers become equal:

    * A mark between two digits is kept, as in `1.5`, `10:30` and `3/4`, unless it groups thousands, as in `1,500`. A
      minus sign or decimal point before a number is kept, and `+` or `#` after a name, as in `C++`.
    * Articles are kept if a text has no other words, as the answer `A` of a multiple-choice question. A text that
      consists of punctuation is not changed.

    Args:
        text: The answer.
        articles: Whether to keep articles.

    >>> answer_words("The U.S.  «Île-d'Orléans», a $5 ferry")
    ['us', 'îledorléans', '5', 'ferry']
    >>> answer_words("-1.5 to 1,500"), answer_words("A."), answer_words("北京。")
    (['-1.5', 'to', '1500'], ['a'], ['北', '京'])
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    words = [word for part in _remove_marks(folded).split() for word in split_unspaced(part)]
    words = words or folded.split()
    if articles:
        return words
    return [word for word in words if word not in ARTICLES] or words


def _remove_marks(text: str) -> str:
    """Removes punctuation, symbols and invisible characters that are not part of a number or name."""
    meaningful: set[int] = set()
    for match in MEANINGFUL_MARK.finditer(text):
        meaningful.update(range(*match.span()))
    kept = []
    for position, letter in enumerate(text):
        if position in meaningful:
            kept.append("-" if letter in DASHES else letter)
        elif letter.isalnum() or not _is_mark(letter):
            kept.append(letter)
    return "".join(kept)


def _is_mark(letter: str) -> bool:
    category = unicodedata.category(letter)
    return category[0] in "PS" or category == "Cf"


def split_citations(text: str) -> tuple[str, list[int]]:
    """Splits an answer into its text and the numbers of the passages that it cites at its end.

    >>> split_citations("in Paris [2] [1]"), split_citations("[2] is read")
    (('in Paris', [2, 1]), ('[2] is read', []))
    """
    answer, cited = CITED.fullmatch(text).groups()  # type: ignore[union-attr]
    return answer, [int(number) for number in re.findall(r"\d+", cited)]


def contains_words(text: Words, part: Words) -> bool:
    """Returns whether a text contains a non-empty sequence of words without gaps.

    >>> contains_words("in new york city".split(), ["new", "york"]), contains_words("new york".split(), ["york", "new"])
    (True, False)
    """
    return bool(part) and f" {' '.join(part)} " in f" {' '.join(text)} "


def overlap(prediction: Words, reference: Words) -> tuple[float, float, float]:
    """Returns precision, recall and F1 of words, counted with repetitions; equality if a text has no words.

    >>> overlap(["in", "paris"], ["paris"])
    (0.5, 1.0, 0.6666666666666666)
    """
    if not prediction or not reference:
        same = float(list(prediction) == list(reference))
        return same, same, same
    shared = (Counter(prediction) & Counter(reference)).total()
    precision, recall = shared / len(prediction), shared / len(reference)
    f1 = 2 * precision * recall / (precision + recall) if shared else 0.0
    return precision, recall, f1


def answer_scores(answer: str, references: Sequence[str]) -> dict[str, float]:
    """Scores an answer against its references.

    Precision and recall belong to the reference with the best F1; `contains` is 1 if the answer contains a reference.

    Args:
        answer: The predicted answer.
        references: The correct answers, at least one.
    """
    pairs = [_word_pair(answer, reference) for reference in references]
    precision, recall, f1 = max((overlap(*pair) for pair in pairs), key=lambda scores: scores[2])
    is_exact = any(words == reference_words for words, reference_words in pairs)
    contains = any(contains_words(*pair) for pair in pairs)
    return dict(zip(ANSWER_SCORES, (float(is_exact), precision, recall, f1, float(contains)), strict=True))


def _word_pair(answer: str, reference: str) -> tuple[list[str], list[str]]:
    """Returns the words of both texts, with articles if the reference consists only of articles."""
    words = answer_words(reference)
    return answer_words(answer, articles=ARTICLES.issuperset(words)), words


def same_answer(one: str, other: str) -> bool:
    """Returns whether two answers have the same words."""
    return answer_words(one) == answer_words(other)


def content_words(text: str) -> list[str]:
    """Returns the words of an answer that contain a letter or digit and are not articles.

    >>> content_words("The ?!"), content_words("The C++")
    ([], ['c++'])
    """
    return [word for word in answer_words(text) if word not in ARTICLES and any(map(str.isalnum, word))]


def grounded_fraction(answer: str, passages: Sequence[str]) -> float:
    """Returns the fraction of an answer's words that occur in passages; NaN without words or passages."""
    words = content_words(answer)
    if not words or not passages:
        return math.nan
    passage_words = {word for passage in passages for word in answer_words(passage)}
    return sum(word in passage_words for word in words) / len(words)


def contain_answer(passages: Sequence[str], references: Sequence[str]) -> bool:
    """Returns whether a passage contains a correct answer, word by word."""
    answers = [answer_words(reference) for reference in references]
    for passage in passages:
        words = answer_words(passage)
        if any(contains_words(words, answer) for answer in answers):
            return True
    return False
