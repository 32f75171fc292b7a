"""Cloze questions about rare terms of a corpus: drawn from held-out windows, or read from a file."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.types import WindowExample
from lightning_softprompt.data.readers.rows import DataError
from lightning_softprompt.data.readers.sources import read_rows
from lightning_softprompt.evaluation.words.cloze import SPACE, ClozeQuestion
from lightning_softprompt.evaluation.words.word_counts import frequency_of

MIN_COUNT, MAX_COUNT = 5, 50  # occurrences of a rare term in the training documents
MIN_LETTERS, MIN_TOKENS = 4, 2
MIN_LEFT_WORDS = 3
MAX_PER_TERM = 2  # questions
NUM_DISTRACTORS = 9
TERM = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")
TERM_IN_TEXT = re.compile(rf"(?<= ){TERM.pattern}(?![\w-])")
COLUMNS = ("left", "term", "right", "distractors")
Kind = tuple[int, int]  # class of frequency, and number of tokens


def draw_questions(
    windows: Sequence[WindowExample],
    counts: Mapping[str, int],
    general: Mapping[str, int],
    codec: Codec,
    count: int,
    seed: int,
) -> list[ClozeQuestion]:
    """Draws questions about rare terms.

    A term is a word in lower case that occurs 5 to 50 times in the training documents and never in general text, and
    has at least two tokens. A window contains it once. Its distractors are equally frequent and have as many tokens.

    Args:
        windows: The windows from which terms are removed.
        counts: Occurrences of each word in the training documents, where upper case is different from lower case.
        general: Occurrences of each word of general text in lower case.
        codec: The codec of the backbone.
        count: Maximum number of questions.
        seed: Seed of the selection.

    Raises:
        DataError: If no term is found.
    """
    kinds = select_terms(counts, general, codec)
    members = group_terms(kinds)
    eligible = {term for term, kind in kinds.items() if len(members[kind]) > NUM_DISTRACTORS}
    occurrences = list(find_terms(windows, eligible))
    if not occurrences:
        raise DataError(
            f"data.cloze: the held-out documents have no rare term, out of {len(eligible)} words that occur "
            f"{MIN_COUNT} to {MAX_COUNT} times in the training documents, have {MIN_TOKENS} tokens or more, and have "
            f"{NUM_DISTRACTORS} others of the same kind; use more documents, or set data.cloze to a file of questions"
        )
    rng = np.random.default_rng(seed)
    num_drawn: dict[str, int] = defaultdict(int)
    questions: list[ClozeQuestion] = []
    for number in rng.permutation(len(occurrences)).tolist():
        window, start, end = occurrences[number]
        term = window.target[start:end]
        if num_drawn[term] == MAX_PER_TERM:
            continue
        num_drawn[term] += 1
        others = [other for other in members[kinds[term]] if other != term]
        distractors = tuple(rng.choice(others, NUM_DISTRACTORS, replace=False).tolist())
        left, right = window.target[: start - len(SPACE)], window.target[end:]
        questions.append(ClozeQuestion(left, term, right, distractors, window.document))
        if len(questions) == count:
            break
    return questions


def select_terms(counts: Mapping[str, int], general: Mapping[str, int], codec: Codec) -> dict[str, Kind]:
    """Returns the rare terms of a corpus, with their class of frequency and their number of tokens."""
    unknown = codec.tokenizer.unk_token_id
    kinds: dict[str, Kind] = {}
    for word, count in sorted(counts.items()):
        is_rare = MIN_COUNT <= count <= MAX_COUNT and word not in general
        is_term = len(word) >= MIN_LETTERS and word == word.casefold() and TERM.fullmatch(word)
        if not is_rare or not is_term:
            continue
        ids = codec.ids(SPACE + word)
        if len(ids) >= MIN_TOKENS and unknown not in ids:
            kinds[word] = frequency_of(count), len(ids)
    return kinds


def group_terms(kinds: Mapping[str, Kind]) -> dict[Kind, list[str]]:
    """Returns the terms of each kind."""
    groups: dict[Kind, list[str]] = defaultdict(list)
    for term, kind in kinds.items():
        groups[kind].append(term)
    return groups


def find_terms(windows: Sequence[WindowExample], terms: set[str]) -> Iterator[tuple[WindowExample, int, int]]:
    """Yields the terms that occur once in a window, after some words, with start and end."""
    for window in windows:
        text = window.target.casefold()
        for match in TERM_IN_TEXT.finditer(window.target):
            has_context = len(window.target[: match.start()].split()) >= MIN_LEFT_WORDS
            if has_context and match[0] in terms and text.count(match[0]) == 1:
                yield window, match.start(), match.end()


def read_questions(path: str) -> list[ClozeQuestion]:
    """Reads a file of questions.

    Raises:
        DataError: If a row is not a question.
    """
    rows = read_rows(path, columns=COLUMNS)
    questions = []
    for number, row in enumerate(rows):
        try:
            questions.append(parse_question(row))
        except (ValueError, TypeError) as error:
            raise DataError(f"{rows.where(number)}: {error}") from None
    return questions


def parse_question(row: Mapping[str, Any]) -> ClozeQuestion:
    """Returns the question of a row.

    Raises:
        ValueError: If a column is missing or is not what it must be.
    """
    if missing := [column for column in COLUMNS if column not in row]:
        raise ValueError(f"a cloze question requires the columns {list(COLUMNS)}, and {missing} are missing")
    distractors = row["distractors"]
    texts = [row["left"], row["term"], row["right"], *(distractors if isinstance(distractors, list) else [None])]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("left, term and right must be texts, and distractors a list of texts")
    if not row["term"] or not distractors or row["term"] in distractors:
        raise ValueError("term must not be empty, and distractors must be other terms")
    document = row.get("document", 0)
    return ClozeQuestion(row["left"], row["term"], row["right"], tuple(distractors), int(document))


def to_row(question: ClozeQuestion) -> dict[str, Any]:
    """Returns the row of a question, as `read_questions` reads it."""
    return {**asdict(question), "distractors": list(question.distractors)}
