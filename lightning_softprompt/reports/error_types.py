"""Classifies the answers of a question-answering test by their records. This module does not import torch.

A passage is relevant if it belongs to a gold document or contains a correct answer word by word, so that data sets
without gold documents can be analyzed too.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, final

from lightning_softprompt.evaluation.metrics.answers import (
    answer_words,
    contain_answer,
    content_words,
    grounded_fraction,
)
from lightning_softprompt.evaluation.metrics.retrieval import unique_documents

HALF = 0.5
MIXED = 0.2  # minimum share of an answer's words from relevant passages alone, and from other passages alone
REQUIRED_FIELDS = ("row", "prediction", "scores", "question", "references", "passages", "found", "gold")
RANK_RANGES = ((1, "1"), (2, "2"), (3, "3"), (5, "4-5"), (10, "6-10"))  # last rank and name
LAST_RANGE = "11+"
OTHER = "other"
UNKNOWN, NOT_FOUND, NOT_SHOWN, ADDED = "not known", "not found", "not shown", "added"
QUESTION_WORDS = {
    "who": "who whom whose quem",
    "what": "what que",
    "which": "which qual quais",
    "when": "when quando",
    "where": "where onde aonde",
    "why": "why porque",
    "how": "how como",
    "how many": "quanto quanta quantos quantas",
}
TYPE_OF_WORD = {word: kind for kind, words in QUESTION_WORDS.items() for word in words.split()}
TYPE_OF_WORD_PAIR = {("how", "many"): "how many", ("how", "much"): "how many", ("por", "que"): "why"}


def question_type(question: str | None) -> str:
    """Returns the English name of the first question word, which may be English or Portuguese.

    >>> [question_type(q) for q in ("In which year?", "How much is it?", "Por quê?", "Há quantos anos?", "Is it?")]
    ['which', 'how many', 'why', 'how many', 'other']
    """
    letters = unicodedata.normalize("NFD", (question or "").casefold())
    without_accents = "".join(letter for letter in letters if not unicodedata.combining(letter))
    words = re.findall(r"\w+", without_accents)
    for pair in pairwise([*words, ""]):
        kind = TYPE_OF_WORD_PAIR.get(pair) or TYPE_OF_WORD.get(pair[0])
        if kind:
            return kind
    return OTHER


def rank_name(rank: int) -> str:
    """Returns the name of a rank, which starts at 1, or of its range of ranks.

    >>> rank_name(2), rank_name(7), rank_name(30)
    ('2', '6-10', '11+')
    """
    return next((name for last, name in RANK_RANGES if rank <= last), LAST_RANGE)


@final
class AnsweredRow:
    """A row of a question-answering test and the classification of its answer.

    Args:
        record: The prediction of a test by `QaEvaluation` or `ChoiceEvaluation`.
        correct_f1: Minimum F1 of a correct answer. An exact match is always correct.
        more_groups: Groups of the row for further properties.
    """

    def __init__(
        self, record: Mapping[str, Any], correct_f1: float = 1.0, more_groups: Mapping[str, str] | None = None
    ) -> None:
        self.record, self.correct_f1 = record, correct_f1
        self.more_groups = dict(more_groups or {})
        self.number, self.answer = int(record["row"]), str(record["prediction"])
        self.references: Sequence[str] = record["references"]
        self.gold: Sequence[str] = record["gold"]
        self.found = unique_documents(record["found"])
        self.passages: Sequence[Mapping[str, Any]] = record["passages"]
        self.is_choice = "f1" not in record["scores"]  # a multiple-choice question has the scores of its choices
        if self.is_choice:
            self.exact_match = self.f1 = float(self.answer in self.references)
        else:
            self.exact_match, self.f1 = self._score("exact_match"), self._score("f1")

    def _score(self, name: str) -> float:
        return float(self.record["scores"].get(name) or 0)

    @cached_property
    def passage_is_relevant(self) -> list[bool]:
        """Whether each passage in the prompt is relevant."""
        # a passage that contains the word "no" does not answer a yes/no question
        references = () if self.is_choice else self.references
        return [
            passage["document"] in self.gold or contain_answer([passage["text"]], references)
            for passage in self.passages
        ]

    @property
    def retrieval(self) -> Literal["shown", "found", "missed"] | None:
        """Whether a relevant passage is in the prompt, only its document was retrieved, or neither.

        None if nothing was retrieved, or if it is unknown which passages are relevant.
        """
        if any(self.passage_is_relevant):
            return "shown"
        if not set(self.gold).isdisjoint(self.found):
            return "found"
        is_relevance_known = bool(self.gold) or not self.is_choice
        was_searched = bool(self.passages or self.found)
        return "missed" if is_relevance_known and was_searched else None

    @cached_property
    def support(self) -> dict[bool, float]:
        """The largest fraction of answer words in one passage: of the relevant passages (True) and of the others."""
        support = {True: 0.0, False: 0.0}
        if content_words(self.answer):
            for is_relevant, passage in zip(self.passage_is_relevant, self.passages, strict=True):
                fraction = grounded_fraction(self.answer, [passage["text"]])
                support[is_relevant] = max(support[is_relevant], fraction)
        return support

    @cached_property
    def sources(self) -> dict[bool, float]:
        """The share of answer words that only the relevant passages contain (True), or only the others (False).

        Words of the question are not counted.
        """
        words: dict[bool, set[str]] = {True: set(), False: set()}
        for is_relevant, passage in zip(self.passage_is_relevant, self.passages, strict=True):
            words[is_relevant].update(answer_words(passage["text"]))
        asked = set(answer_words(self.record["question"] or ""))
        answer = [word for word in content_words(self.answer) if word not in asked]
        shares = {}
        for is_relevant in (True, False):
            only_here = words[is_relevant] - words[not is_relevant]
            shares[is_relevant] = sum(word in only_here for word in answer) / max(1, len(answer))
        return shares

    @property
    def is_mixed(self) -> bool:
        """Whether the answer mixes a relevant passage with another one: words of both that the other one lacks."""
        return min(self.sources.values()) >= MIXED

    @property
    def is_correct(self) -> bool:
        """Whether the answer is correct."""
        return self.exact_match == 1 or self.f1 >= self.correct_f1

    @property
    def has_wrong_format(self) -> bool:
        """Whether the answer is empty, or contains a correct answer among a larger number of other words."""
        if self.is_choice:
            return False
        is_empty = not content_words(self.answer)
        return is_empty or (self._score("contains") == 1 and self._score("precision") < HALF)

    @property
    def has_abstained(self) -> bool:
        """Whether the answer states that there is no answer."""
        return self._score("abstained") == 1

    @property
    def is_wrong_span(self) -> bool:
        """Whether the answer shares words with a correct answer, or is another part of a relevant passage."""
        return self.f1 > 0 or self.support[True] >= max(HALF, self.support[False])

    @cached_property
    def kind(self) -> str:
        """The first kind that matches."""
        return next(name for name, (_, matches) in KINDS.items() if matches(self))

    @property
    def groups(self) -> dict[str, str]:
        """The group of the row for each property of its question and passages."""
        task = {"task": str(self.record["task"])} if "task" in self.record else {}
        return {
            **task,
            "question": question_type(self.record["question"]),
            "gold rank": self.gold_rank,
            "passage position": self._passage_position,
            "gold documents": self._gold_documents,
            "correct answer": self._answer_location,
            **self.more_groups,
        }

    @property
    def gold_rank(self) -> str:
        """The rank of the first gold document among the retrieved documents."""
        if not self.gold:
            return UNKNOWN
        for rank, document in enumerate(self.found, start=1):
            if document in self.gold:
                return rank_name(rank)
        was_added = any(passage["document"] in self.gold for passage in self.passages)
        return ADDED if was_added else NOT_FOUND

    @property
    def _passage_position(self) -> str:
        """The position of the first relevant passage in the prompt."""
        if not self.passages:
            return UNKNOWN
        if not any(self.passage_is_relevant):
            return NOT_SHOWN
        return rank_name(1 + self.passage_is_relevant.index(True))

    @property
    def _gold_documents(self) -> str:
        """The number of gold documents, and whether their passages are in the prompt."""
        gold = set(self.gold)
        if len(gold) < 2:
            return "one" if gold else UNKNOWN
        shown = {passage["document"] for passage in self.passages}
        if gold <= shown:
            return "several, all shown"
        return "several, none shown" if gold.isdisjoint(shown) else "several, some shown"

    @property
    def _answer_location(self) -> str:
        """Whether a passage in the prompt contains a correct answer."""
        if not self.passages or not self.references or self.is_choice:
            return UNKNOWN
        texts = [passage["text"] for passage in self.passages]
        return "in a passage" if contain_answer(texts, self.references) else NOT_SHOWN


Kind = tuple[str, Callable[[AnsweredRow], bool]]  # a description, and whether a row is of this kind
# the first kind that matches is the kind of the row, so the order matters
KINDS: dict[str, Kind] = {
    "correct": ("an exact match, or F1 of at least the required value", lambda row: row.is_correct),
    "answered anyway": ("an answer to a question that has none", lambda row: not row.references),
    "abstained": ("states that there is no answer, but there is one", lambda row: row.has_abstained),
    "format": ("empty, or a correct answer among a larger number of other words", lambda row: row.has_wrong_format),
    "retrieval miss": ("no relevant passage was retrieved", lambda row: row.retrieval == "missed"),
    "found, not shown": (
        "a gold document was retrieved, but the prompt contains no relevant passage",
        lambda row: row.retrieval == "found",
    ),
    "wrong choice": ("a wrong choice, and no relevant passage is known to be missing", lambda row: row.is_choice),
    "mixed": (
        f"at least {MIXED:.0%} of its words are from relevant passages alone, and as many from other passages alone",
        lambda row: row.is_mixed,
    ),
    "wrong span": ("shares words with a correct answer, or is from a relevant passage", lambda row: row.is_wrong_span),
    "not used": (
        "the prompt contains a relevant passage, but the answer is from another passage",
        lambda row: row.support[False] >= HALF,
    ),
    "ungrounded": ("most of its words are in no passage of the prompt", lambda row: True),
}
