import json
import tracemalloc

import pytest

from lightning_softprompt.data.readers.rows import DataError
from lightning_softprompt.vocabulary.corpus_texts import SIZE, read_pieces, split_text


def texts_of(*sources, **options):
    """Returns the text of each document."""
    documents = {}
    for piece in read_pieces([str(source) for source in sources], **options):
        documents[piece.document] = documents.get(piece.document, "") + piece.text
    return list(documents.values())


def test_documents_of_text_files_and_rows_are_numbered_over_all_sources(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    (tmp_path / "b.jsonl").write_text('{"text": "four"}\n\n{"text": "five"}\n')
    assert texts_of(tmp_path / "a.txt", tmp_path / "b.jsonl") == ["one\ntwo\n", "three\n", "four", "five"]


def test_parts_join_to_the_text():
    text = "word " * 30_000 + "x" * 200_000
    parts = list(split_text(text))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= SIZE


def test_a_huge_line_is_read_in_bounded_memory(tmp_path):
    path = tmp_path / "line.txt"
    with path.open("w") as file:
        for _ in range(200):
            file.write("é" * 50 + " word " * 10_000)
    size = path.stat().st_size
    assert size > 10_000_000
    tracemalloc.start()
    count = sum(len(piece.text.encode()) for piece in read_pieces([str(path)]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == size
    assert peak < 3_000_000


@pytest.mark.parametrize("content", [b"", b"\n \n\n"])
def test_a_file_without_text_is_refused(tmp_path, content):
    (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(DataError, match="has no text"):
        texts_of(tmp_path / "empty.txt")


@pytest.mark.parametrize("content", [b"caf\xe9 au lait\n", b"good\n" * 100_000 + b"\xff\xff", b"cut \xc3"])
def test_text_in_another_encoding_is_refused(tmp_path, content):
    (tmp_path / "latin.txt").write_bytes(content)
    with pytest.raises(DataError, match="UTF-8"):
        texts_of(tmp_path / "latin.txt")


def test_rows_without_the_column_are_refused_with_their_place(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": "text"}))
    with pytest.raises(DataError, match=r"rows.jsonl:1 has no text in the column 'text'.*--column"):
        texts_of(tmp_path / "rows.jsonl")
    assert texts_of(tmp_path / "rows.jsonl", columns=["text", "body"]) == ["text"]


def test_a_broken_row_is_refused_with_its_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match=r"rows.jsonl:2: broken JSON"):
        texts_of(tmp_path / "rows.jsonl")


def test_a_text_that_several_rows_contain_is_read_once(tmp_path):
    rows = [{"context": "one"}, {"context": "two"}, {"context": "one"}, {"text": "three"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert texts_of(tmp_path / "rows.jsonl", columns=["context", "text"]) == ["one", "two", "three"]
