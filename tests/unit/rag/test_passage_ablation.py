"""Rows without some of their passages, and the names of their tokens."""

from dataclasses import replace

import pytest
from questions import FILM, ROW, TEXTS
from tiny import FAMILIES

from lightning_softprompt.core.types import ShownPassage
from lightning_softprompt.rag.passage_ablation import AblationRow

FAMILIES = tuple(name for name in FAMILIES if name != "bert")  # generates no answers
PASSAGES = [
    {"template": "{heading}{text} ,"},
    {"template": "{soft}{heading}{text} ,"},
    {"template": "[{number}] {text} ,", "count": 3, "order": "reversed"},
]


def words_by_name(row, names, data):
    """Returns the words of each part of a row."""
    words = {}
    for token, name in zip(data.codec.tokenizer.convert_ids_to_tokens(row.ids), names, strict=True):
        words.setdefault(name, []).append(token)
    return {name: " ".join(tokens) for name, tokens in words.items()}


@pytest.mark.parametrize("passages", PASSAGES)
@pytest.mark.parametrize("max_tokens", [48, 18])  # 18: one passage, which is truncated
def test_a_complete_row_is_that_of_the_test(make_qa_data, passages, max_tokens):
    data = make_qa_data([ROW, FILM], passages=passages, max_tokens=max_tokens)
    for index, expected in enumerate(data.split("test").encoded):
        row = AblationRow(data, index)
        encoded, names = row.encode(range(row.num_passages), row.example.target)
        assert encoded == expected
        assert len(names) == len(encoded.ids)


def test_each_token_has_the_name_of_its_part(make_qa_data):
    data = make_qa_data([ROW])
    encoded, names = AblationRow(data, 0).encode([0, 1], "very sad")
    start = data.codec.tokenizer.convert_ids_to_tokens(list(data.codec.start))
    expected = {
        "start": " ".join(start),
        "passage 1": f"{TEXTS['dog']} ,",
        "passage 2": f"{TEXTS['story']} ,",
        "question": ROW["question"],
        "template": ": </s>" if data.codec.end else ":",
        "answer": "very sad </s>" if encoded.answers else "",
    }
    assert words_by_name(encoded, names, data) == {name: words for name, words in expected.items() if words}


@pytest.mark.parametrize("passages", PASSAGES[:2])
def test_a_passage_is_left_out_or_moved(make_qa_data, passages):
    data = make_qa_data([ROW], passages=passages)
    row = AblationRow(data, 0)
    encoded, names = row.encode([None, 1], "sad")
    assert words_by_name(encoded, names, data)["passage 2"] == f"{TEXTS['story']} ,"
    assert "passage 1" not in names
    slots = len(encoded.slots)
    assert slots == len(data.split("test").encoded[0].slots)
    swapped, names = row.encode([1, 0], "sad")
    assert names.index("passage 2") < names.index("passage 1")
    assert sorted(swapped.ids) == sorted(data.split("test").encoded[0].ids)
    empty, names = row.encode([None, None], "sad")
    assert set(names) <= {"start", "question", "template", "answer"}
    assert len(empty.ids) < len(encoded.ids)


def test_a_passage_has_the_number_of_its_position(make_qa_data):
    data = make_qa_data([ROW], passages={"template": "( {number} ) {text} ,"})
    row = AblationRow(data, 0)
    shown = [data.passage.render(n, passage, "") for n, passage in enumerate(row.example.passages, start=1)]
    assert shown[1].startswith("( 2 )")
    pieces = row._pieces([None, 1], "what ?")
    texts = {named.name: getattr(named.piece, "text", "") for named in pieces}
    assert texts["passage 2"] == shown[1]
    assert texts["question"] == "what ?"


def test_answers_of_records_are_targets(make_qa_data):
    row = AblationRow(make_qa_data([ROW]), 0)
    assert row.read_answer({"prediction": "sad", "cited": [2, 1]}) == "sad [2] [1]"
    choices = {"yes": "good", "no": "bad"}
    asked = {**ROW, "answers": "yes"}
    chosen = AblationRow(make_qa_data([asked], answer_form={"choices": choices}), 0)
    assert chosen.read_answer({"prediction": "no"}) == "bad"
    encoded, _ = chosen.encode([0, 1], "bad")
    assert len(encoded.targets) == 1


def test_rows_without_passages_and_other_passages_are_refused(make_qa_data):
    data = make_qa_data([ROW], passages={"mode": "closed_book"})
    with pytest.raises(ValueError, match="no passages"):
        AblationRow(data, 0)
    data = make_qa_data([ROW])
    example = data.split("test").examples[0]
    data.split("test").examples[0] = replace(example, passages=(ShownPassage("dog", "another text", 0),))
    with pytest.raises(ValueError, match="other passages than before"):
        AblationRow(data, 0)
