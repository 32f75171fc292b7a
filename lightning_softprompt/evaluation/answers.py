"""How an answer stands beside the right ones, and beside what was shown. Nothing here needs torch."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

Words = Sequence[str]
CITED = re.compile(r"(.*?)\s*((?:\[\d{1,4}\]\s*)*)", re.DOTALL)
ARTICLES = frozenset(("a", "an", "the"))
OF_ANSWERS = ("exact_match", "precision", "recall", "f1", "contains")


def answer_words(text: str) -> list[str]:
    """The words of an answer as SQuAD compares them (Rajpurkar et al. 2016, 1606.05250): small, without articles.

    Marks and symbols vanish, those of every script and not of ASCII alone; accents stay, however they are coded.

    >>> answer_words("The U.S.  «Île-d'Orléans», a $5 ferry")
    ['us', 'îledorléans', '5', 'ferry']
    """
    folded = unicodedata.normalize("NFC", text.casefold())
    kept = "".join(letter for letter in folded if letter.isalnum() or unicodedata.category(letter)[0] not in "PS")
    return [word for word in kept.split() if word not in ARTICLES]


def uncited(text: str) -> tuple[str, list[int]]:
    """An answer without the numbers of passages behind it, and these numbers.

    >>> uncited("in Paris [2] [1]"), uncited("[2] is read")
    (('in Paris', [2, 1]), ('[2] is read', []))
    """
    answer, cited = CITED.fullmatch(text).groups()  # type: ignore[union-attr]
    return answer, [int(number) for number in re.findall(r"\d+", cited)]


def holds(text: Words, part: Words) -> bool:
    """Whether words stand in a text, in turn and with none between them; no words stand in none.

    >>> holds("in new york city".split(), "new york".split()), holds("in new york".split(), "york new".split())
    (True, False)
    """
    return bool(part) and f" {' '.join(part)} " in f" {' '.join(text)} "


def overlap(said: Words, right: Words) -> tuple[float, float, float]:
    """Precision, recall and F1 of words, each counted as often as it stands; where one text has none, equality.

    >>> overlap(["in", "paris"], ["paris"])
    (0.5, 1.0, 0.6666666666666666)
    """
    if not said or not right:
        same = float(list(said) == list(right))
        return same, same, same
    shared = (Counter(said) & Counter(right)).total()
    precision, recall = shared / len(said), shared / len(right)
    return precision, recall, 2 * precision * recall / (precision + recall) if shared else 0.0


def answer_measures(answer: str, references: Sequence[str]) -> dict[str, float]:
    """An answer beside all that is right.

    Precision and recall are those of the reference with the best F1; `contains` says whether the answer holds one.

    Args:
        answer: What was said.
        references: What is right, at least one.
    """
    said, right = answer_words(answer), [answer_words(reference) for reference in references]
    precision, recall, f1 = max((overlap(said, of) for of in right), key=lambda measured: measured[2])
    exact, contains = said in right, any(holds(said, of) for of in right)
    return dict(zip(OF_ANSWERS, (float(exact), precision, recall, f1, float(contains)), strict=True))


def same_answer(one: str, other: str) -> bool:
    """Whether two answers have the same words."""
    return answer_words(one) == answer_words(other)


def grounded(answer: str, passages: Sequence[str]) -> float:
    """The share of an answer's words that stand in passages; not a number where there are no words, or no passages."""
    said, shown = answer_words(answer), {word for passage in passages for word in answer_words(passage)}
    return sum(word in shown for word in said) / len(said) if said and passages else math.nan


def holds_answer(passages: Sequence[str], references: Sequence[str]) -> bool:
    """Whether a passage contains a right answer, word by word."""
    right = [answer_words(reference) for reference in references]
    return any(holds(words, of) for words in map(answer_words, passages) for of in right)
