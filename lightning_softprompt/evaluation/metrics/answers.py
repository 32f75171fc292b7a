"""How an answer stands beside the right ones, and beside what was shown. Nothing here needs torch."""

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
NEEDED = re.compile(
    r"(?<=\d)(?![,'\u2019\u066c\uff0c](?:\d{2,3},)*\d{3}(?!\d))[^\w\s](?=\d)"  # between digits, not of thousands
    rf"|(?<![\w)\]{DASHES}])[{DASHES}](?=[$€£¥₹]?\.?\d)"  # the minus of a number
    r"|(?<![\w.])\.(?=\d)"  # a decimal point without a digit before it
    r"|(?<=[^\W_])[+#]+(?!\w)"  # C++, F#, A+
    r"|(?<=\b[^\W\d_])-(?![\w-])"  # the blood group O-
)
ARTICLES = frozenset(("a", "an", "the"))
OF_ANSWERS = ("exact_match", "precision", "recall", "f1", "contains")


def answer_words(text: str, articles: bool = False) -> list[str]:
    """The words of an answer, as SQuAD compares them (Rajpurkar et al. 2016, 1606.05250): lower case, no articles.

    Punctuation and symbols of every script are removed, accents are kept, however they are encoded. Each character of
    a script without spaces between words is a word. SQuAD's rule is changed where it makes different answers equal:

    * A mark between two digits is kept, as in `1.5`, `10:30` and `3/4`, unless it groups thousands, as in `1,500`. A
      minus or a decimal point before a number is kept, and `+` or `#` after a name, as in `C++`.
    * Articles are kept if a text has no other words, as the answer `A` of a multiple-choice question. A text of
      punctuation alone is kept as it is.

    Args:
        text: The answer.
        articles: Whether articles are kept in any case.

    >>> answer_words("The U.S.  «Île-d'Orléans», a $5 ferry")
    ['us', 'îledorléans', '5', 'ferry']
    >>> answer_words("-1.5 to 1,500"), answer_words("A."), answer_words("北京。")
    (['-1.5', 'to', '1500'], ['a'], ['北', '京'])
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    words = [word for part in _without_marks(folded).split() for word in split_unspaced(part)] or folded.split()
    without = [word for word in words if articles or word not in ARTICLES]
    return without or words


def _without_marks(text: str) -> str:
    """A text without punctuation, symbols and invisible characters, but with the marks that numbers and names need."""
    needed = {match.start() + i for match in NEEDED.finditer(text) for i in range(len(match.group()))}
    return "".join(
        "-" if i in needed and letter in DASHES else letter
        for i, letter in enumerate(text)
        if i in needed or letter.isalnum() or not _is_mark(letter)
    )


def _is_mark(letter: str) -> bool:
    category = unicodedata.category(letter)
    return category[0] in "PS" or category == "Cf"


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
    compared = [_compared(answer, reference) for reference in references]
    precision, recall, f1 = max((overlap(*pair) for pair in compared), key=lambda measured: measured[2])
    exact = any(said == right for said, right in compared)
    contains = any(holds(said, right) for said, right in compared)
    return dict(zip(OF_ANSWERS, (float(exact), precision, recall, f1, float(contains)), strict=True))


def _compared(answer: str, reference: str) -> tuple[list[str], list[str]]:
    """The words of both, with articles if the right answer is nothing else."""
    right = answer_words(reference)
    return answer_words(answer, articles=ARTICLES.issuperset(right)), right


def same_answer(one: str, other: str) -> bool:
    """Whether two answers have the same words."""
    return answer_words(one) == answer_words(other)


def content_words(text: str) -> list[str]:
    """The words of an answer that have a letter or digit and are no articles.

    >>> content_words("The ?!"), content_words("The C++")
    ([], ['c++'])
    """
    return [word for word in answer_words(text) if word not in ARTICLES and any(map(str.isalnum, word))]


def grounded(answer: str, passages: Sequence[str]) -> float:
    """The share of an answer's words that occur in passages; not a number if there are no words, or no passages."""
    said, shown = content_words(answer), {word for passage in passages for word in answer_words(passage)}
    return sum(word in shown for word in said) / len(said) if said and passages else math.nan


def holds_answer(passages: Sequence[str], references: Sequence[str]) -> bool:
    """Whether a passage contains a right answer, word by word."""
    right = [answer_words(reference) for reference in references]
    return any(holds(words, of) for words in map(answer_words, passages) for of in right)
