"""The notes of the retrieval quickstart: each answer is in its note, and no note is in two splits."""

import re

import pytest
from row_files import read_rows

from lightning_softprompt.data.samples.notes import notes

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def rows_by_file():
    return {path.stem: read_rows(path) for path in notes().iterdir()}


def normalize(text):
    return " ".join(re.findall(r"\w+", text.lower()))


def test_each_answer_is_in_its_note(rows_by_file):
    texts = {note["id"]: normalize(note["text"]) for note in rows_by_file["corpus"]}
    assert len(texts) == len(rows_by_file["corpus"]) > 30
    rows = [row for split in SPLITS for row in rows_by_file[split]]
    for row in rows:
        assert normalize(row["answers"][0]) in texts[row["positive_ids"][0]]
    assert len({row["question"] for row in rows}) == len(rows) > 100


def test_no_note_is_in_two_splits(rows_by_file):
    ids_by_split = [{row["positive_ids"][0] for row in rows_by_file[split]} for split in SPLITS]
    assert sum(map(len, ids_by_split)) == len(set.union(*ids_by_split)) == len(rows_by_file["corpus"])
