"""Rows of JSON files, standard input and text files."""

import json

import pytest
from source_files import set_standard_input, texts_of, write

from lightning_softprompt.data.readers.sources import DataError, read_rows

# JSON files


QUESTIONS = [
    {"id": "1", "question": "What?", "answers": [{"text": "a", "answer_start": 0}]},
    {"id": "2", "question": "Who?", "answers": [], "is_impossible": True},
]
SQUAD = {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": "c", "qas": QUESTIONS}]}]}


@pytest.mark.parametrize("indent", [None, 1])
def test_the_official_files_of_squad_have_the_rows_of_the_hub(tmp_path, indent):
    rows = read_rows(write(tmp_path / "a.json", json.dumps(SQUAD, indent=indent)))
    passage = {"title": "t", "context": "c"}
    answers = {"answers": {"text": ["a"], "answer_start": [0]}}
    no_answers = {"answers": {"text": [], "answer_start": []}, "is_impossible": True}
    assert list(rows) == [
        {**passage, "id": "1", "question": "What?", **answers},
        {**passage, "id": "2", "question": "Who?", **no_answers},
    ]


@pytest.mark.parametrize(
    "value",
    [SQUAD["data"], {**SQUAD, "meta": {"language": "en"}}, {**SQUAD, "sources": ["wikipedia"]}],
    ids=["list", "mapping", "sources"],
)
def test_articles_of_squad_can_be_a_list_or_have_other_keys(tmp_path, value):
    rows = read_rows(write(tmp_path / "a.json", json.dumps(value)))
    assert [row["question"] for row in rows] == ["What?", "Who?"]
    assert rows[0]["answers"] == {"text": ["a"], "answer_start": [0]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"version": "x", "data": [{"text": "a"}]}', [{"text": "a"}]),
        ('{"text": "a", "data": [1]}', [{"text": "a", "data": [1]}]),
        ('{"text": "a"}', [{"text": "a"}]),
        ('{\n "text": "a"\n}\n{\n "text": "b"\n}\n', [{"text": "a"}, {"text": "b"}]),
        ('{"text":\n "a"} {"text": "b"}', [{"text": "a"}, {"text": "b"}]),
    ],
)
def test_objects_of_a_json_file_can_have_several_lines_or_contain_the_rows(tmp_path, content, expected):
    assert list(read_rows(write(tmp_path / "a.json", content))) == expected


def test_the_line_of_an_object_of_several_lines_is_its_first(tmp_path):
    path = write(tmp_path / "a.json", '{\n "text": "a"\n}\n\n{\n "text": "b"\n}\n')
    assert read_rows(path).where(1) == f"{path}:5"
    with pytest.raises(DataError, match=r"a.json:3: broken JSON: .*Fix the file"):
        read_rows(write(path, '{\n "text": "a",\n}\n'))


# Standard input and text files


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"text":"a warm film"},{"text":"dull"}]', [{"text": "a warm film"}, {"text": "dull"}]),
        ('[\n  {\n    "text": "a"\n  }\n]\n', [{"text": "a"}]),
        ('{\n  "text": "a",\n  "n": 1\n}\n{\n  "text": "b"\n}\n', [{"text": "a", "n": 1}, {"text": "b"}]),
        ('{"text": "a",\n "n": 1}\n', [{"text": "a", "n": 1}]),
        ('["a warm film", "dull"]', [{"text": "a warm film"}, {"text": "dull"}]),
        ("text,label\n\"a, b\",x\nc,y\n", [{"text": "a, b", "label": "x"}, {"text": "c", "label": "y"}]),
        ("label\ttext\nx\ta\n", [{"text": "a", "label": "x"}]),
        ("text\na\nb\n", [{"text": "a"}, {"text": "b"}]),
        ("text;label\na;x\n", [{"text": "a", "label": "x"}]),
        ("label|text\nx|a\n", [{"text": "a", "label": "x"}]),
        ("text\n", [{"text": "text"}]),
        ("text, or not\nb, c\n", [{"text": "text, or not"}, {"text": "b, c"}]),
        ('{"quote"} is a set literal\n', [{"text": '{"quote"} is a set literal'}]),
        ('words\n{"a", "b"} is a set\n', [{"text": "words"}, {"text": '{"a", "b"} is a set'}]),
        ("{} is empty\n", [{"text": "{} is empty"}]),
        ("[1] Knuth\n[2] Lamport\n", [{"text": "[1] Knuth"}, {"text": "[2] Lamport"}]),
        ("[1]\n", [{"text": "[1]"}]),
        ('{"text": "a"}\n\nplain\n', [{"text": "a"}, {"text": "plain"}]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bom", ["", "\ufeff"], ids=["plain", "bom"])
def test_standard_input_and_text_files_can_be_json_a_table_or_text(tmp_path, monkeypatch, content, expected, bom):
    set_standard_input(monkeypatch, (bom + content).encode())
    assert list(read_rows("-", columns=["text"])) == expected
    assert list(read_rows(write(tmp_path / "a.txt", bom + content), columns=["text"])) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n {"text": ]', "standard input:2: broken JSON"),
        ('{\n "text": "a"\n', "standard input:3: broken JSON"),
        ('words\n{"text: "a"}\n', "standard input:2: broken JSON"),
        ('[{"text": "a"}, 1]', "row 1 of standard input: expected columns and their values, got int 1"),
        ('["a", null]', "row 0 of standard input: expected columns and their values, got str 'a'"),
        ('[["a"], ["b"]]', "row 0 of standard input: expected columns and their values, got list"),
        ('{"text": "a"}\n[{"text": "b"}]\n', "standard input:2: expected a JSON object, got list"),
        ("text,label\na\n", "standard input:2: expected 2 cells"),
        ("text,label\n", "standard input has no rows"),
        ("[]", "standard input has no rows"),
        ("{'text': 'a'}\n", "standard input:1: broken JSON: Expecting property name enclosed in double quotes"),
    ],
)
def test_broken_json_and_tables_on_standard_input_are_rejected(monkeypatch, content, message):
    set_standard_input(monkeypatch, content.encode())
    with pytest.raises(DataError, match=message):
        read_rows("-", columns=["text"])


@pytest.mark.parametrize("line", ["a," * 10**5, '"' + "x" * 10**6, "[" * 10**5])
def test_a_long_line_of_text_is_a_row(monkeypatch, line):
    set_standard_input(monkeypatch, line.encode())
    assert texts_of(read_rows("-", columns=["text"])) == [line]


def test_plain_text_becomes_the_column_that_is_required(monkeypatch):
    for columns, name in ((["question"], "question"), (["a", "b"], "text"), ([], "text")):
        set_standard_input(monkeypatch, b"Who?\n")
        assert list(read_rows("-", columns=columns)) == [{name: "Who?"}]


def test_plain_text_that_looks_like_a_table_causes_a_warning(monkeypatch, caplog):
    set_standard_input(monkeypatch, b"review,label\ngood,1\n")
    assert len(read_rows("-", columns=["text"])) == 2
    assert "looks like the columns of a table" in caplog.text


@pytest.mark.parametrize("content", ["text, label\ngood, 1\n", "review|label\ngood|1\n", "Text;label\ngood;1\n"])
def test_tables_with_other_delimiters_or_names_cause_a_warning(monkeypatch, caplog, content):
    set_standard_input(monkeypatch, content.encode())
    assert len(read_rows("-", columns=["text"])) == 2
    assert "looks like the columns of a table" in caplog.text


@pytest.mark.parametrize(
    ("content", "warns"), [('"good"\n"a \\"b\\""\n', True), ('"good"\nbad\n', False), ('"a" b\n', False)]
)
def test_lines_of_json_strings_cause_a_warning(monkeypatch, caplog, content, warns):
    set_standard_input(monkeypatch, content.encode())
    read_rows("-", columns=["text"])
    assert ("jq leaves them out with -r" in caplog.text) == warns


def test_standard_input_can_contain_json_lines_and_plain_text(monkeypatch):
    set_standard_input(monkeypatch, b'{"text": "a", "n": 1}\r\nplain words\n\n{soft} words\n[1]\n')
    rows = read_rows("-")
    assert list(rows) == [{"text": "a", "n": 1}, {"text": "plain words"}, {"text": "{soft} words"}, {"text": "[1]"}]
    assert rows.where(2) == "standard input:4"


def test_broken_json_on_standard_input_is_not_read_as_text(monkeypatch):
    set_standard_input(monkeypatch, b'words\n{"text": "a"\n')
    with pytest.raises(DataError, match=r"standard input:2: broken JSON"):
        read_rows("-")
