"""What kind of answer a row got, judged by its record: the answer, the right ones, what was shown and what was found.

Nothing here needs torch. A right passage is one of a document that is known to hold the answer, or one that contains a
right answer word by word; so rows of data sets that name no documents can be judged too.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, final

from lightning_softprompt.evaluation.metrics.answers import contain_answer, content_words, grounded_fraction
from lightning_softprompt.evaluation.metrics.retrieval import unique_documents

HALF = 0.5
# what a record of an answer has
WANTED = ("row", "prediction", "scores", "question", "references", "passages", "found", "gold")
RANKS = ((1, "1"), (2, "2"), (3, "3"), (5, "4-5"), (10, "6-10"))
OTHER = "other"
NOT_KNOWN, NOT_FOUND, NOT_SHOWN, PUT_IN = "not known", "not found", "not shown", "put in"
FIRST_WORDS = {
    "who": "who whom whose quem",
    "what": "what que",
    "which": "which qual quais",
    "when": "when quando",
    "where": "where onde aonde",
    "why": "why porque",
    "how": "how como",
    "how many": "quanto quanta quantos quantas",
}
TYPES = {word: kind for kind, words in FIRST_WORDS.items() for word in words.split()}
PAIRS = {("how", "many"): "how many", ("how", "much"): "how many", ("por", "que"): "why"}


def question_type(question: str | None) -> str:
    """The first word that asks, of English or Portuguese, by its English name.

    >>> [question_type(q) for q in ("In which year?", "How much is it?", "Por quê?", "Há quantos anos?", "Is it?")]
    ['which', 'how many', 'why', 'how many', 'other']
    """
    letters = unicodedata.normalize("NFD", (question or "").casefold())
    words = re.findall(r"\w+", "".join(letter for letter in letters if not unicodedata.combining(letter)))
    kinds = (PAIRS.get(pair) or TYPES.get(pair[0]) for pair in pairwise([*words, ""]))
    return next((kind for kind in kinds if kind), OTHER)


def rank_name(rank: int) -> str:
    """A rank from 1, or the stretch of ranks that it is one of.

    >>> rank_name(2), rank_name(7), rank_name(30)
    ('2', '6-10', '11+')
    """
    return next((name for last, name in RANKS if rank <= last), "11+")


@final
class AnsweredRow:
    """A row of a test's record, and what can be said of its answer.

    Args:
        record: As `QaEvaluation` or `ChoiceEvaluation` and the predictions of a test have it.
        right_at: The F1 from which an answer is right; an exact match always is.
    """

    def __init__(self, record: Mapping[str, Any], right_at: float = 1.0) -> None:
        self.record, self.right_at = record, right_at
        self.number, self.answer = int(record["row"]), str(record["prediction"])
        self.references: Sequence[str] = record["references"]
        self.gold: Sequence[str] = record["gold"]
        self.found = unique_documents(record["found"])
        self.passages: Sequence[Mapping[str, Any]] = record["passages"]
        self.choice = "f1" not in record["scores"]  # its scores are those of the choices
        self.exact_match, self.f1 = self._judged()

    def _judged(self) -> tuple[float, float]:
        if self.choice:
            return (float(self.answer in self.references),) * 2
        return self._score("exact_match"), self._score("f1")

    def _score(self, name: str) -> float:
        return float(self.record["scores"].get(name) or 0)

    @cached_property
    def right_passages(self) -> list[bool]:
        """Of each passage that was shown, whether it is a right one."""
        right = () if self.choice else self.references  # a text that has "no" in it answers nothing by that
        return [p["document"] in self.gold or contain_answer([p["text"]], right) for p in self.passages]

    @property
    def retrieval(self) -> Literal["shown", "found", "missed"] | None:
        """How far a right passage came; None where nothing was searched, or nothing says which are right."""
        if any(self.right_passages):
            return "shown"
        if set(self.gold) & set(self.found):
            return "found"
        known = bool(self.gold) or not self.choice
        return "missed" if known and (self.passages or self.found) else None

    @cached_property
    def supported(self) -> dict[bool, float]:
        """The greatest share of the answer's words that stands in one passage, of the right ones and of the others."""
        shares = {True: 0.0, False: 0.0}
        if content_words(self.answer):
            for right, passage in zip(self.right_passages, self.passages, strict=True):
                shares[right] = max(shares[right], grounded_fraction(self.answer, [passage["text"]]))
        return shares

    @property
    def right(self) -> bool:
        """Whether the answer is right."""
        return self.exact_match == 1 or self.f1 >= self.right_at

    @property
    def out_of_form(self) -> bool:
        """Whether the answer is empty, or has the right one among more other words."""
        if self.choice:
            return False
        return not content_words(self.answer) or (self._score("contains") == 1 and self._score("precision") < HALF)

    @property
    def abstained(self) -> bool:
        """Whether the answer says that there is none."""
        return self._score("abstained") == 1

    @property
    def near(self) -> bool:
        """Whether the answer shares words with a right one, or is some other stretch of a right passage."""
        return self.f1 > 0 or self.supported[True] >= max(HALF, self.supported[False])

    @cached_property
    def kind(self) -> str:
        """The first of the kinds that it is."""
        return next(name for name, (_, of_it) in KINDS.items() if of_it(self))

    @property
    def groups(self) -> dict[str, str]:
        """What the row counts under, by what is asked of it."""
        task = {"task": str(self.record["task"])} if "task" in self.record else {}
        return {
            **task,
            "question": question_type(self.record["question"]),
            "gold rank": self.gold_rank,
            "place shown": self._place_shown,
            "gold documents": self._gold_documents,
            "right answer": self._answer_shown,
        }

    @property
    def gold_rank(self) -> str:
        """Where the first gold document stands among those that were found."""
        if not self.gold:
            return NOT_KNOWN
        rank = next((rank for rank, document in enumerate(self.found, start=1) if document in self.gold), None)
        if rank is None:
            return PUT_IN if any(p["document"] in self.gold for p in self.passages) else NOT_FOUND
        return rank_name(rank)

    @property
    def _place_shown(self) -> str:
        places = [rank_name(place) for place, right in enumerate(self.right_passages, start=1) if right]
        return places[0] if places else NOT_SHOWN if self.passages else NOT_KNOWN

    @property
    def _gold_documents(self) -> str:
        gold, shown = set(self.gold), {p["document"] for p in self.passages}
        if len(gold) < 2:
            return "one" if gold else NOT_KNOWN
        return (
            "several, all shown" if gold <= shown else "several, some shown" if gold & shown else "several, none shown"
        )

    @property
    def _answer_shown(self) -> str:
        if not self.passages or not self.references or self.choice:
            return NOT_KNOWN
        return (
            "stands in a passage" if contain_answer([p["text"] for p in self.passages], self.references) else NOT_SHOWN
        )


Kind = tuple[str, Callable[[AnsweredRow], bool]]
KINDS: dict[str, Kind] = {  # a row is of the first that fits
    "right": ("an exact match, or the F1 that is asked for", lambda row: row.right),
    "answered anyway": ("an answer where there is none", lambda row: not row.references),
    "abstained": ("says that there is no answer, but there is", lambda row: row.abstained),
    "format": ("empty, or the right answer among more other words", lambda row: row.out_of_form),
    "retrieval miss": ("no right passage was found", lambda row: row.retrieval == "missed"),
    "found, not shown": (
        "a right document was found, but no passage of it shown",
        lambda row: row.retrieval == "found",
    ),
    "wrong choice": ("another of the choices, though nothing is known to be missing", lambda row: row.choice),
    "wrong span": ("shares words with a right answer, or is from a right passage", lambda row: row.near),
    "not used": ("a right passage was shown, the answer is from another", lambda row: row.supported[False] >= HALF),
    "ungrounded": ("most of its words stand in no passage that was shown", lambda row: True),
}
