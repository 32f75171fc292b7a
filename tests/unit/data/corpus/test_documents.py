"""Documents of text files, folders and tables."""

import gzip

import pytest
from row_files import write_rows

from lightning_softprompt.data.corpus.documents import is_folder_of_texts, read_documents
from lightning_softprompt.data.readers.sources import DataError, NoSplitError

BOOK = b"First line\nof the first.\n\n\n  \nSecond,\r\nof two lines.\r\n\r\nThird"


def texts(*args, **options):
    return [row["text"] for row in read_documents(*args, **options)]


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(BOOK)
    return path


def test_a_blank_line_ends_a_document(book):
    rows = read_documents(str(book))
    assert [row["text"].strip() for row in rows] == ["First line\nof the first.", "Second,\nof two lines.", "Third"]
    assert [rows.where(i) for i in range(3)] == [f"{book}:1", f"{book}:6", f"{book}:9"]


def test_other_boundaries(book):
    assert len(texts(str(book), boundary="line")) == 5
    (document,) = texts(str(book), boundary="file")
    assert document == BOOK.decode().replace("\r\n", "\n")


def test_a_file_of_a_folder_is_a_document(tmp_path, book):
    (tmp_path / "notes.md").write_text("# Title\n\nText")
    assert is_folder_of_texts(str(tmp_path))
    rows = read_documents(str(tmp_path), "train")
    assert [row["text"] for row in rows] == [BOOK.decode().replace("\r\n", "\n"), "# Title\n\nText"]
    assert rows.where(1) == str(tmp_path / "notes.md")
    assert len(texts(str(tmp_path), "train", boundary="blank_line")) == 4


def test_text_files_may_be_named_as_splits(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "one.txt").write_text("one")
    (tmp_path / "train" / "two.txt").write_text("two")
    (tmp_path / "valid.txt").write_text("three")
    assert not is_folder_of_texts(str(tmp_path))
    assert texts(str(tmp_path), "train") == ["one", "two"]
    assert texts(str(tmp_path), "validation") == ["three"]
    with pytest.raises(NoSplitError, match=r"\['train', 'valid'\], expected 'test'"):
        read_documents(str(tmp_path), "test")


def test_patterns_lists_and_compressed_files(tmp_path, book):
    with gzip.open(tmp_path / "more.txt.gz", "wb") as file:
        file.write(BOOK)
    assert len(texts(str(tmp_path / "*.txt*"))) == 6
    assert len(texts([str(book), str(tmp_path / "more.txt.gz")])) == 6
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b"}])
    assert texts(str(rows)) == ["a", "b"]
    with pytest.raises(DataError, match=r"is a text file and .* is not"):
        read_documents([str(book), str(rows)])


def test_rows_in_memory_and_tables_are_rows(tmp_path):
    assert texts([{"text": "a"}, {"text": "b"}]) == ["a", "b"]
    write_rows(tmp_path / "train.jsonl", [{"text": "a"}])
    assert texts(str(tmp_path), "train") == ["a"]


def test_an_empty_file_is_named(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text("\n \n")
    with pytest.raises(DataError, match=r"empty.txt has no rows"):
        read_documents(str(path))


def test_invalid_utf8_is_named_with_its_line_or_skipped(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"good\n\nna\xefve\n\nlast")
    with pytest.raises(DataError, match=r"bad.txt:3: not UTF-8"):
        read_documents(str(path))
    rows = read_documents(str(path), on_bad_row="skip")
    assert [row["text"].strip() for row in rows] == ["good", "last"]
    assert len(rows.skipped) == 1


def test_binary_content_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("text".encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16"):
        read_documents(str(path))
