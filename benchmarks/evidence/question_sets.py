"""Sets of questions whose passages are easily confused, or of which two are needed, derived from MedQuAD.

confusable  One question per disease. The corpus has one passage per disease, so the passages that are retrieved with
            the right one answer a similar question about another disease.
two parts   Two questions about one disease in one row, such as its symptoms and its treatment; the right answer has
            both answers, which are in two passages.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning_softprompt.system.atomic_files import write_file

SOURCE = "qa/medquad"
SPLITS = ("train", "validation", "test")
SEED = 0
Row = Mapping[str, Any]


def write_question_sets(data: Path, folder: Path) -> None:
    """Writes both sets to a folder, unless they exist.

    Args:
        data: Folder of all data sets.
        folder: Folder of the sets, with a folder for each.
    """
    source = data / SOURCE
    passages = {passage["id"]: passage for passage in read_rows(source / "corpus.jsonl")}
    documents: list[str] = []
    for split in SPLITS:
        rows = read_rows(source / f"{split}.jsonl")
        confusable = list(one_per_disease(rows))
        documents += [row["positive_ids"][0] for row in confusable]
        write_rows(folder / "confusable" / f"{split}.jsonl", confusable)
        write_rows(folder / "two_parts" / f"{split}.jsonl", list(join_questions(rows)))
    corpus = [passages[document] for document in dict.fromkeys(documents)]
    write_rows(folder / "confusable" / "corpus.jsonl", corpus)
    write_rows(folder / "two_parts" / "corpus.jsonl", list(passages.values()))


def one_per_disease(rows: Sequence[Row]) -> Iterator[Row]:
    """Yields a random question of each disease, with its first passage as the only relevant one."""
    generator = random.Random(SEED)
    for questions in group_by_disease(rows):
        row = generator.choice(questions)
        yield {**row, "positive_ids": row["positive_ids"][:1]}


def join_questions(rows: Sequence[Row]) -> Iterator[Row]:
    """Yields a row for each two successive questions of a disease that ask for different things."""
    for questions in group_by_disease(rows):
        for first, second in pairwise(questions):
            if first["qtype"] == second["qtype"]:
                continue
            yield {
                "id": f"{first['id']}+{second['id']}",
                "question": f"{first['question']} {second['question']}",
                "answers": [f"{first['answers'][0]} {second['answers'][0]}"],
                "positive_ids": [first["positive_ids"][0], second["positive_ids"][0]],
            }


def group_by_disease(rows: Sequence[Row]) -> list[list[Row]]:
    """Groups questions by their disease, in the order of the rows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["focus"].casefold(), []).append(row)
    return list(groups.values())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes JSON lines, unless the file exists."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode())
