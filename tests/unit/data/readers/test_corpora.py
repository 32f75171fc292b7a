"""Documents of rows and of text files; errors are reported with their file and line."""

import gzip
import sys

import pytest
from row_files import write_rows, write_splits

from lightning_softprompt.data.readers.corpora import Columns, read_documents
from lightning_softprompt.data.readers.sources import DataError
from lightning_softprompt.data.readers.text_files import read_text_file
from lightning_softprompt.retrieval.passages.documents import Document

ROWS = [{"id": "a", "title": "Film", "text": "a warm film"}, {"id": 7, "title": None, "text": "a dog"}]


def ids_of(documents):
    return [document.id for document in documents]


def test_rows_are_documents_with_their_file_and_line(tmp_path):
    path = write_rows(tmp_path / "corpus.jsonl", ROWS)
    assert list(read_documents(path)) == [
        Document("a", "Film", "a warm film", f"{path}:1"),
        Document("7", "", "a dog", f"{path}:2"),
    ]


def test_columns_can_have_other_names_and_ids_can_be_missing(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("heading,body,url\nOne,a dog,there\nTwo,a film,here\n")
    documents = list(read_documents(path, Columns(text="body", title="heading", source="url")))
    assert documents == [Document("0", "One", "a dog", "there"), Document("1", "Two", "a film", "here")]


def test_parquet_is_read(tmp_path):
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist([{"id": "x", "text": "a dog"}]), tmp_path / "rows.parquet")
    assert ids_of(read_documents(tmp_path / "rows.parquet")) == ["x"]


def test_the_corpus_of_a_folder_of_splits_is_read(tmp_path):
    write_splits(tmp_path, corpus=ROWS, train=[{"question": "who?"}])
    (tmp_path / "README.md").write_text("# About")
    assert ids_of(read_documents(tmp_path)) == ["a", "7"]
    message = r"train\.jsonl:1: no text in column 'text', got NoneType; it has \['question'\]"
    with pytest.raises(DataError, match=message):
        list(read_documents(tmp_path, split="train"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": ""}, "the text in column 'text' is empty"),
        ({"text": 3}, "no text in column 'text', got int"),
        ({"body": "a dog"}, r"no text in column 'text', got NoneType; it has \['body'\]"),
    ],
)
def test_a_bad_row_is_reported_or_skipped(tmp_path, row, message, caplog):
    path = write_rows(tmp_path / "corpus.jsonl", [*ROWS, row])
    with pytest.raises(DataError, match=rf"corpus\.jsonl:3: {message}.*on_bad_row='skip'"):
        list(read_documents(path))
    assert len(list(read_documents(path, on_bad_row="skip"))) == 2
    assert "corpus.jsonl:3" in caplog.text


def test_broken_json_is_reported_with_its_line(tmp_path, caplog):
    path = write_rows(tmp_path / "corpus.jsonl", ROWS)
    path.write_text(path.read_text() + '{"id": "half')
    with pytest.raises(DataError, match=r"corpus\.jsonl:3: broken JSON"):
        list(read_documents(path))
    assert len(list(read_documents(path, on_bad_row="skip"))) == 2
    assert "corpus.jsonl:3" in caplog.text


PAGE = """<html><head><title>On
 dogs</title><style>p {color: red}</style></head><body><nav>Home</nav><h1>Dogs</h1>
<!-- a comment --><p>A dog
 is <b>warm</b>.</p><script>alert()</script><ul><li>One</li><li>Two</li></ul></body></html>"""


def test_text_files_are_documents(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "one.txt").write_bytes(b"\xef\xbb\xbfa warm film")
    (tmp_path / "two.md").write_text("intro\n\n## A dog ##\n\nis sad")
    (tmp_path / "three.HTML").write_text(PAGE)
    (tmp_path / ".hidden.txt").write_text("not this")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    note, page, section = sorted(read_documents(tmp_path), key=lambda document: document.id)
    assert note == Document("notes/one.txt", "one", "a warm film", str(tmp_path / "notes" / "one.txt"))
    page_file, section_file = str(tmp_path / "three.HTML"), str(tmp_path / "two.md")
    assert page == Document("three.HTML", "On dogs", "Dogs\n\nA dog is warm.\n\nOne\n\nTwo", page_file)
    assert section == Document("two.md", "A dog", "intro\n\n## A dog ##\n\nis sad", section_file)
    assert list(read_documents(tmp_path / "two.md")) == [section]


def make_pdf(text):
    """Returns the bytes of a file of one page: its objects, and the table of their offsets."""
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 9 9] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        b"<< /Title (On dogs) >>",
    ]
    content, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    end = b"trailer << /Size 7 /Root 1 0 R /Info 6 0 R >>\nstartxref\n%d\n%%%%EOF" % len(content)
    return content + b"xref\n0 7\n0000000000 65535 f \n" + table + end


def test_the_title_and_the_pages_of_a_pdf_are_read(tmp_path):
    (tmp_path / "dogs.pdf").write_bytes(make_pdf("A dog is warm."))
    (document,) = read_documents(tmp_path)
    assert document.title == "On dogs"
    assert document.text.strip() == "A dog is warm."


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8"),
        ("a.md", b" \n", r"a\.md has no text"),
        ("a.html", b"<p> </p>", r"a\.html has no text"),
        ("a.pdf", b"no pdf", r"a\.pdf cannot be read as PDF"),
        ("a.pdf", make_pdf(""), r"a\.pdf has no text; scanned pages require OCR first"),
    ],
)
def test_a_bad_file_is_reported_or_skipped(tmp_path, name, content, message, caplog):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "b.txt").write_text("a dog")
    with pytest.raises(DataError, match=message):
        list(read_documents(tmp_path))
    assert ids_of(read_documents(tmp_path, on_bad_row="skip")) == ["b.txt"]
    assert name in caplog.text


@pytest.mark.parametrize(("module", "name"), [("pypdf", "a.pdf"), ("bs4", "a.html")])
def test_a_missing_package_is_reported_even_if_bad_files_are_skipped(tmp_path, monkeypatch, module, name):
    (tmp_path / name).write_text("a dog")
    monkeypatch.setitem(sys.modules, module, None)
    message = rf"the package {module}; pip install 'lightning-softprompt\[documents\]'"
    with pytest.raises(ValueError, match=message):
        list(read_documents(tmp_path, on_bad_row="skip"))


def test_an_empty_folder_is_rejected(tmp_path):
    with pytest.raises(DataError, match=r"has no files of rows, nor of text; expected one of \.txt"):
        list(read_documents(tmp_path))


@pytest.mark.parametrize("name", ["_id", "doc_id", "ID", "docno", "Doc Id", "docId", "chunk_id", "pmid"])
def test_an_unused_column_with_a_name_of_ids_is_reported(tmp_path, name):
    path = write_rows(tmp_path / "corpus.jsonl", [{name: "doc0", "text": "a dog"}])
    with pytest.raises(DataError, match=rf"corpus\.jsonl:1: no column 'id', but '{name}' looks like ids.*--id-column"):
        list(read_documents(path))
    assert ids_of(read_documents(path, Columns(id=name))) == ["doc0"]
    assert ids_of(read_documents(path, Columns(id=""))) == ["0"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[0], {"text": "a dog"}], r"jsonl:2: no id in column 'id', though earlier rows have one"),
        ([{"text": "a dog"}, ROWS[0]], r"jsonl:2: an id in column 'id', though earlier rows have none"),
        ([{"id": " ", "text": "a dog"}], r"jsonl:1: the id in column 'id' is empty"),
        ([{"id": ["a"], "text": "a dog"}], r"jsonl:1: column 'id' must hold a text or a whole number, got \['a'\]"),
        ([{"id": True, "text": "a dog"}], r"jsonl:1: column 'id' must hold a text or a whole number, got True"),
    ],
)
def test_a_row_without_a_valid_id_is_reported(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        list(read_documents(write_rows(tmp_path / "corpus.jsonl", rows)))


def test_an_id_that_is_a_float_is_written_as_a_whole_number(tmp_path):
    path = write_rows(tmp_path / "corpus.jsonl", [{"id": 7.0, "text": "a dog"}])
    assert ids_of(read_documents(path)) == ["7"]


def test_a_folder_of_texts_and_tables_is_rejected_unless_a_table_is_named_corpus(tmp_path, caplog):
    (tmp_path / "doc0.txt").write_text("a dog")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "doc1.txt").write_text("a film")
    write_rows(tmp_path / "meta.jsonl", ROWS)
    with pytest.raises(DataError, match=r"holds the tables \['meta.jsonl'\] and 2 files of text such as 'doc0.txt'"):
        list(read_documents(tmp_path))
    (tmp_path / "meta.jsonl").rename(tmp_path / "corpus.jsonl")
    assert ids_of(read_documents(tmp_path)) == ["a", "7"]
    assert "2 files of text" in caplog.text


def test_files_that_are_not_read_are_reported(tmp_path, caplog):
    (tmp_path / "doc0.txt").write_text("a dog")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "more.docx").write_bytes(b"PK")
    assert ids_of(read_documents(tmp_path)) == ["doc0.txt"]
    assert "1 files" in caplog.text
    assert "more.docx" in caplog.text


def test_the_text_of_deeply_nested_pages_is_in_order(tmp_path):
    (tmp_path / "a.html").write_text(f"<div>{'<div>' * 5000}a<b>b</b>{'</div>' * 5000}<!-- c -->{'<br>d' * 3}</div>")
    assert read_text_file(tmp_path / "a.html") == ("a", "ab\n\nd\n\nd\n\nd")


def test_a_page_with_very_many_unclosed_comments_is_rejected(tmp_path):
    (tmp_path / "a.html").write_text("<!--" * 2000)
    with pytest.raises(DataError, match=r"a\.html cannot be read as HTML: 2,000 of its tags or comments"):
        read_text_file(tmp_path / "a.html")


def test_a_compressed_table_in_a_folder_of_texts_is_a_table(tmp_path):
    (tmp_path / "a.txt").write_text("Snow falls.")
    (tmp_path / "meta.csv.gz").write_bytes(gzip.compress(b"text\nIt rains.\n"))
    with pytest.raises(DataError, match=r"holds the tables \['meta.csv.gz'\] and 1 files of text"):
        list(read_documents(tmp_path))


@pytest.mark.parametrize("folder", ["data", "corpus", "train"])
def test_tables_of_a_corpus_can_be_in_the_sub_folders_of_the_hub(tmp_path, folder):
    (tmp_path / "README.md").write_text("# A corpus")
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "train-00000-of-00001.jsonl").write_text('{"id": "a", "text": "It rains."}\n')
    assert ids_of(read_documents(tmp_path)) == ["a"]
    (tmp_path / "a.txt").write_text("Snow falls.")
    assert "a.txt" in ids_of(read_documents(tmp_path))
