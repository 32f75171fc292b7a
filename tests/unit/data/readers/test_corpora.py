"""Documents from rows and from files of text; what is wrong is named with its place."""

import gzip
import json

import pytest

from lightning_softprompt.data.readers.corpora import Columns, read_documents
from lightning_softprompt.data.readers.sources import DataError
from lightning_softprompt.data.readers.text_files import read_text_file
from lightning_softprompt.retrieval.passages.documents import Document

ROWS = [{"id": "a", "title": "Film", "text": "a warm film"}, {"id": 7, "title": None, "text": "a dog"}]


def written(path, rows=ROWS):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_rows_are_documents_that_know_their_place(tmp_path):
    path = written(tmp_path / "corpus.jsonl")
    assert list(read_documents(path)) == [
        Document("a", "Film", "a warm film", f"{path}:1"),
        Document("7", "", "a dog", f"{path}:2"),
    ]


def test_columns_may_have_other_names_and_ids_may_be_missing(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("heading,body,url\nOne,a dog,there\nTwo,a film,here\n")
    found = list(read_documents(path, Columns(text="body", title="heading", source="url")))
    assert found == [Document("0", "One", "a dog", "there"), Document("1", "Two", "a film", "here")]


def test_parquet_is_read(tmp_path):
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist([{"id": "x", "text": "a dog"}]), tmp_path / "rows.parquet")
    assert [document.id for document in read_documents(tmp_path / "rows.parquet")] == ["x"]


def test_of_a_folder_of_splits_the_corpus_is_taken(tmp_path):
    written(tmp_path / "corpus.jsonl")
    written(tmp_path / "train.jsonl", [{"question": "who?"}])
    (tmp_path / "README.md").write_text("# what it is")
    assert [document.id for document in read_documents(tmp_path)] == ["a", "7"]
    with pytest.raises(
        DataError, match=r"train\.jsonl:1: no text in column 'text', got NoneType; it has \['question'\]"
    ):
        list(read_documents(tmp_path, split="train"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": ""}, "the text in column 'text' is empty"),
        ({"text": 3}, "no text in column 'text', got int"),
        ({"body": "a dog"}, r"no text in column 'text', got NoneType; it has \['body'\]"),
    ],
)
def test_a_bad_row_is_named_or_skipped(tmp_path, row, said, caplog):
    path = written(tmp_path / "corpus.jsonl", [*ROWS, row])
    with pytest.raises(DataError, match=rf"corpus\.jsonl:3: {said}.*on_bad_row='skip'"):
        list(read_documents(path))
    assert len(list(read_documents(path, on_bad_row="skip"))) == 2
    assert "corpus.jsonl:3" in caplog.text


def test_broken_json_is_named_with_its_line(tmp_path, caplog):
    path = written(tmp_path / "corpus.jsonl")
    path.write_text(path.read_text() + '{"id": "half')
    with pytest.raises(DataError, match=r"corpus\.jsonl:3: broken JSON"):
        list(read_documents(path))
    assert len(list(read_documents(path, on_bad_row="skip"))) == 2
    assert "corpus.jsonl:3" in caplog.text


PAGE = """<html><head><title>On
 dogs</title><style>p {color: red}</style></head><body><nav>Home</nav><h1>Dogs</h1>
<!-- a comment --><p>A dog
 is <b>warm</b>.</p><script>alert()</script><ul><li>One</li><li>Two</li></ul></body></html>"""


def test_files_of_text_are_documents(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "one.txt").write_bytes(b"\xef\xbb\xbfa warm film")
    (tmp_path / "two.md").write_text("intro\n\n## A dog ##\n\nis sad")
    (tmp_path / "three.HTML").write_text(PAGE)
    (tmp_path / ".hidden.txt").write_text("not this")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    found = {document.id: document for document in read_documents(tmp_path)}
    assert sorted(found) == ["notes/one.txt", "three.HTML", "two.md"]
    assert found["notes/one.txt"] == Document(
        "notes/one.txt", "one", "a warm film", str(tmp_path / "notes" / "one.txt")
    )
    assert (found["two.md"].title, found["two.md"].text) == ("A dog", "intro\n\n## A dog ##\n\nis sad")
    assert (found["three.HTML"].title, found["three.HTML"].text) == ("On dogs", "Dogs\n\nA dog is warm.\n\nOne\n\nTwo")
    assert list(read_documents(tmp_path / "two.md")) == [found["two.md"]]


def pdf(text):
    """A file of one page, by hand: the objects, and where each stands."""
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 9 9] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        b"<< /Title (On dogs) >>",
    ]
    content, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer << /Size 7 /Root 1 0 R /Info 6 0 R >>\nstartxref\n%d\n%%%%EOF" % len(content)
    return content + b"xref\n0 7\n0000000000 65535 f \n" + table + end


def test_pdf_is_read_by_its_pages(tmp_path):
    (tmp_path / "dogs.pdf").write_bytes(pdf("A dog is warm."))
    assert [(d.title, d.text.strip()) for d in read_documents(tmp_path)] == [("On dogs", "A dog is warm.")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8"),
        ("a.md", b" \n", r"a\.md has no text"),
        ("a.html", b"<p> </p>", r"a\.html has no text"),
        ("a.pdf", b"no pdf", r"a\.pdf cannot be read as PDF"),
        ("a.pdf", pdf(""), r"a\.pdf has no text; a scanned page wants OCR first"),
    ],
)
def test_a_bad_file_is_named_or_skipped(tmp_path, name, content, said, caplog):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "b.txt").write_text("a dog")
    with pytest.raises(DataError, match=said):
        list(read_documents(tmp_path))
    assert [document.id for document in read_documents(tmp_path, on_bad_row="skip")] == ["b.txt"]
    assert name in caplog.text


@pytest.mark.parametrize(("module", "name"), [("pypdf", "a.pdf"), ("bs4", "a.html")])
def test_a_missing_extractor_is_told(tmp_path, monkeypatch, module, name):
    import sys

    (tmp_path / name).write_text("a dog")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ValueError, match=rf"wants the package {module}; pip install 'lightning-softprompt\[documents\]'"
    ):
        list(read_documents(tmp_path, on_bad_row="skip"))


def test_a_folder_of_nothing_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"has no files of rows, nor of text; expected one of \.txt"):
        list(read_documents(tmp_path))


@pytest.mark.parametrize("name", ["_id", "doc_id", "ID", "docno", "Doc Id", "docId", "chunk_id", "pmid"])
def test_a_column_that_looks_like_ids_is_not_passed_over(tmp_path, name):
    path = written(tmp_path / "corpus.jsonl", [{name: "doc0", "text": "a dog"}])
    with pytest.raises(DataError, match=rf"corpus\.jsonl:1: no column 'id', but '{name}' looks like ids.*--id-column"):
        list(read_documents(path))
    assert [document.id for document in read_documents(path, Columns(id=name))] == ["doc0"]
    assert [document.id for document in read_documents(path, Columns(id=""))] == ["0"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([ROWS[0], {"text": "a dog"}], r"jsonl:2: no id in column 'id', though earlier rows have one"),
        ([{"text": "a dog"}, ROWS[0]], r"jsonl:2: an id in column 'id', though earlier rows have none"),
        ([{"id": " ", "text": "a dog"}], r"jsonl:1: the id in column 'id' is empty"),
        ([{"id": ["a"], "text": "a dog"}], r"jsonl:1: column 'id' must hold a text or a whole number, got \['a'\]"),
        ([{"id": True, "text": "a dog"}], r"jsonl:1: column 'id' must hold a text or a whole number, got True"),
    ],
)
def test_a_row_without_a_usable_id_is_named(tmp_path, rows, said):
    with pytest.raises(DataError, match=said):
        list(read_documents(written(tmp_path / "corpus.jsonl", rows)))


def test_whole_numbers_are_the_same_ids_as_floats(tmp_path):
    path = written(tmp_path / "corpus.jsonl", [{"id": 7.0, "text": "a dog"}])
    assert [document.id for document in read_documents(path)] == ["7"]


def test_a_folder_of_texts_and_tables_is_refused_unless_one_is_the_corpus(tmp_path, caplog):
    (tmp_path / "doc0.txt").write_text("a dog")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "doc1.txt").write_text("a film")
    written(tmp_path / "meta.jsonl")
    with pytest.raises(DataError, match=r"holds the tables \['meta.jsonl'\] and 2 files of text such as 'doc0.txt'"):
        list(read_documents(tmp_path))
    (tmp_path / "meta.jsonl").rename(tmp_path / "corpus.jsonl")
    assert [document.id for document in read_documents(tmp_path)] == ["a", "7"]
    assert "2 files of text" in caplog.text


def test_files_that_are_not_read_are_reported(tmp_path, caplog):
    (tmp_path / "doc0.txt").write_text("a dog")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "more.docx").write_bytes(b"PK")
    assert [document.id for document in read_documents(tmp_path)] == ["doc0.txt"]
    assert "1 files" in caplog.text
    assert "more.docx" in caplog.text


def test_deep_and_long_pages_keep_their_texts_in_order(tmp_path):
    (tmp_path / "a.html").write_text(f"<div>{'<div>' * 5000}a<b>b</b>{'</div>' * 5000}<!-- c -->{'<br>d' * 3}</div>")
    assert read_text_file(tmp_path / "a.html") == ("a", "ab\n\nd\n\nd\n\nd")


def test_a_page_with_very_many_open_comments_is_refused(tmp_path):
    (tmp_path / "a.html").write_text("<!--" * 2000)
    with pytest.raises(DataError, match=r"a\.html cannot be read as HTML: 2,000 of its tags or comments"):
        read_text_file(tmp_path / "a.html")


def test_a_compressed_table_beside_texts_is_a_table(tmp_path):
    (tmp_path / "a.txt").write_text("Snow falls.")
    (tmp_path / "meta.csv.gz").write_bytes(gzip.compress(b"text\nIt rains.\n"))
    with pytest.raises(DataError, match=r"holds the tables \['meta.csv.gz'\] and 1 files of text"):
        list(read_documents(tmp_path))


@pytest.mark.parametrize("folder", ["data", "corpus", "train"])
def test_tables_of_a_corpus_may_lie_below_as_on_the_hub(tmp_path, folder):
    (tmp_path / "README.md").write_text("# A corpus")
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "train-00000-of-00001.jsonl").write_text('{"id": "a", "text": "It rains."}\n')
    assert [document.id for document in read_documents(tmp_path)] == ["a"]
    (tmp_path / "a.txt").write_text("Snow falls.")
    assert "a.txt" in [document.id for document in read_documents(tmp_path)]
