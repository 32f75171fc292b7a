"""Prompts that ask for verifiable constraints: questions of a data set, each with every kind of constraint."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_softprompt.constraints.base import KIND, read_constraint
from lightning_softprompt.core.word_boundaries import split_words

LONGEST_QUESTION = 40  # words
SHORTEST_KEYWORD = 5  # letters
ENDINGS = (
    "I hope this helps.",
    "That is all.",
    "Is there anything else I can help with?",
    "Thank you for the question.",
)


@dataclass(frozen=True)
class Question:
    """A question with its reference answer.

    Args:
        text: The question.
        answer: The reference answer.
        source: Where it comes from, such as a file and line.
    """

    text: str
    answer: str
    source: str


Arguments = dict[str, Any]


def _word_count(question: Question, generator: random.Random) -> Arguments:
    low = generator.choice([10, 20, 30])
    return {"low": low, "high": 2 * low}


def _sentence_count(question: Question, generator: random.Random) -> Arguments:
    count = generator.choice([1, 2, 3])
    return {"low": count, "high": count}


def _bullet_count(question: Question, generator: random.Random) -> Arguments:
    return {"count": generator.choice([2, 3, 4])}


def _keywords(question: Question, generator: random.Random) -> Arguments:
    """Requires two words of the reference answer, and forbids one of the question that the answer does not need."""
    candidates = keyword_candidates(question)
    return {"contains": sorted(generator.sample(candidates, 2)), "forbids": ["important"]}


def _ends_with(question: Question, generator: random.Random) -> Arguments:
    return {"phrase": generator.choice(ENDINGS)}


def _repeats_question(question: Question, generator: random.Random) -> Arguments:
    return {"question": question.text}


def _no_arguments(question: Question, generator: random.Random) -> Arguments:
    return {}


ARGUMENTS: Mapping[str, Callable[[Question, random.Random], Arguments]] = {
    "word_count": _word_count,
    "sentence_count": _sentence_count,
    "bullet_count": _bullet_count,
    "lower_case": _no_arguments,
    "no_commas": _no_arguments,
    "keywords": _keywords,
    "ends_with": _ends_with,
    "json_format": _no_arguments,
    "two_answers": _no_arguments,
    "repeats_question": _repeats_question,
}


def keyword_candidates(question: Question) -> list[str]:
    """Returns the long words of the reference answer that are not in the question, in alphabetical order."""
    asked = set(split_words(question.text.lower()))
    words = set(split_words(question.answer.lower())) - asked - {"important"}
    return sorted(word for word in words if len(word) >= SHORTEST_KEYWORD and word.isalpha())


def is_suitable(question: Question) -> bool:
    """Returns whether a question is short, in one line, and its answer has two words to ask for."""
    words = split_words(question.text)
    is_short = 3 <= len(words) <= LONGEST_QUESTION and "\n" not in question.text.strip()
    return is_short and len(keyword_candidates(question)) >= 2


def make_prompts(questions: Sequence[Question], count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yields one row for each of `count` random suitable questions and each kind of constraint.

    Args:
        questions: Questions to choose from.
        count: Number of questions.
        seed: Seed of the choice and of the arguments of constraints.

    Raises:
        ValueError: If there are too few suitable questions.
    """
    suitable = [question for question in questions if is_suitable(question)]
    if not 1 <= count <= len(suitable):
        raise ValueError(
            f"{count} questions requested, but {len(suitable)} of {len(questions)} are suitable: one line of 3 to "
            f"{LONGEST_QUESTION} words, with a reference answer that has two longer words of its own"
        )
    generator = random.Random(seed)
    for question in generator.sample(suitable, count):
        for kind, make_arguments in ARGUMENTS.items():
            value = {KIND: kind, **make_arguments(question, generator)}
            instruction = read_constraint(value).instruction
            yield {
                "prompt": f"{question.text.strip()} {instruction}",
                "answer": question.answer,
                "constraints": [value],
                "question": question.text,
                "source": question.source,
            }
