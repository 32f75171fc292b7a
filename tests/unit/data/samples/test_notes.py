"""The notes that the quickstart asks about: each answer stands in its note, and what is tested was not trained on."""

import json
import re

import pytest

from lightning_softprompt.data.samples.notes import notes


@pytest.fixture(scope="module")
def read():
    return {path.stem: list(map(json.loads, path.read_text().splitlines())) for path in notes().iterdir()}


def words(text):
    return " ".join(re.findall(r"\w+", text.lower()))


def test_each_answer_stands_in_its_note(read):
    texts = {note["id"]: words(note["text"]) for note in read["corpus"]}
    assert len(texts) == len(read["corpus"]) > 30
    rows = [row for split in ("train", "validation", "test") for row in read[split]]
    assert all(words(row["answers"][0]) in texts[row["positive_ids"][0]] for row in rows)
    assert len({row["question"] for row in rows}) == len(rows) > 100


def test_no_note_is_in_two_splits(read):
    asked = [{row["positive_ids"][0] for row in read[split]} for split in ("train", "validation", "test")]
    assert sum(map(len, asked)) == len(set.union(*asked)) == len(read["corpus"])
