"""Rows of CSV and TSV."""

import csv
import time

import pytest
from source_files import texts_of, write

from lightning_softprompt.data.readers.sources import DataError, read_rows


def test_an_unclosed_quotation_mark_is_reported_with_its_line(tmp_path):
    path = write(tmp_path / "a.csv", 'text\na\n"x\nb\n')
    with pytest.raises(DataError, match=r"a.csv:3: broken quoting"):
        read_rows(path)


def test_cells_of_tsv_can_contain_a_single_quotation_mark(tmp_path):
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"wow\t1\nfun\t0\n')
    assert [row["text"] for row in read_rows(path)] == ['"wow', "fun"]


def test_cells_of_csv_can_be_long_documents(tmp_path):
    document = "x" * 200_000
    (row,) = read_rows(write(tmp_path / "a.csv", f"text\n{document}\n"))
    assert row["text"] == document


def csv_lines(count):
    return [f"film {number},{'positive' if number % 2 else 'negative'}" for number in range(count)]


STRAY = '"he left it,negative'  # a line with an unclosed quotation mark
QUOTED = '"a, b",positive'
TWO_LINES = '"two\nlines, both",positive'
QUOTED_WORD = 'an "odd" one,negative'
DOUBLY_QUOTED_WORD = 'an ""odd"" one,negative'
QUOTED_WORD_IN_QUOTED_CELL = '"a ""b"", c",negative'


@pytest.mark.parametrize(
    ("lines", "num_read", "num_skipped"),
    [
        (csv_lines(40), 40, 1),
        ([*csv_lines(20), QUOTED, *csv_lines(20)], 41, 1),
        ([*csv_lines(20), TWO_LINES, *csv_lines(20)], 41, 1),
        ([*csv_lines(3), QUOTED_WORD, QUOTED], 5, 1),
        ([*csv_lines(3), DOUBLY_QUOTED_WORD, QUOTED], 4, 2),
        ([*csv_lines(3), QUOTED_WORD_IN_QUOTED_CELL, QUOTED, STRAY, *csv_lines(2)], 7, 2),
    ],
    ids=["to the end", "to a quoted cell", "to a cell of two lines", "marks within", "doubled", "twice"],
)
def test_an_unclosed_quotation_mark_makes_only_its_line_a_bad_row(tmp_path, lines, num_read, num_skipped):
    path = write(tmp_path / "a.csv", "\n".join(["text,label", *csv_lines(2), STRAY, *lines]) + "\n")
    with pytest.raises(DataError, match=r"a.csv:4: broken quoting: .*the cell runs on to line \d+"):
        read_rows(path)
    rows = read_rows(path, on_bad_row="skip")
    assert len(rows) == 2 + num_read
    assert len(rows.skipped) == num_skipped
    assert {row["label"] for row in rows} == {"positive", "negative"}
    lines_of_file = path.read_text().split("\n")
    for i, row in enumerate(rows):
        line_number = int(rows.where(i).rpartition(":")[2])
        first_word = row["text"].split()[0].strip('"')
        assert first_word in lines_of_file[line_number - 1]


def test_the_rest_of_a_broken_cell_of_several_lines_is_not_read_as_a_row(tmp_path):
    path = write(tmp_path / "a.csv", 'text,label\n"one\ntwo three" four,positive\nfun,negative\n')
    rows = read_rows(path, on_bad_row="skip")
    assert texts_of(rows) == ["fun"]
    assert [reason.split(": ")[0] for reason in rows.skipped] == [f"{path}:2", f"{path}:3"]


def test_rows_inside_a_quoted_cell_cause_a_warning(tmp_path, caplog):
    """An unclosed mark that a later mark happens to close looks like a cell with line breaks."""
    lines = ["text,label", STRAY, *csv_lines(5), 'so he left",positive', '"a\nb\nc\nd\ne",negative', ""]
    rows = read_rows(write(tmp_path / "a.csv", "\n".join(lines)))
    assert len(rows) == 2
    (record,) = caplog.records
    assert "a.csv:2: one row takes lines 2 to 8" in record.getMessage()


def test_a_header_with_a_stray_quotation_mark_is_rejected(tmp_path):
    with pytest.raises(DataError, match=r"a.csv:1: broken quoting.*Fix the first line"):
        read_rows(write(tmp_path / "a.csv", 'text,"la"bel\na,b\n'), on_bad_row="skip")


def test_a_table_of_many_columns_is_read_in_linear_time(tmp_path):
    names = [f"c{number}" for number in range(200_000)]
    started = time.perf_counter()
    (row,) = read_rows(write(tmp_path / "a.csv", f"{','.join(names)}\n{','.join(names)}\n"))
    assert len(row) == 200_000
    with pytest.raises(DataError, match=r"a.csv:2: expected 200000 cells.* and 199980 more, got 1") as error:
        read_rows(write(tmp_path / "a.csv", f"{','.join(names)}\nx\n"))
    assert len(str(error.value)) < 1000
    assert time.perf_counter() - started < 30  # quadratic time would take hours


@pytest.mark.parametrize("text", ['He said "hi"', '"hi"', "a\ttab", "two\nlines", '"', 'ends with "'])
def test_cells_of_tsv_from_a_csv_writer_are_read_unchanged(tmp_path, text):
    path = tmp_path / "a.tsv"
    with path.open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerows([["text", "label"], [text, "positive"], ["plain", "negative"]])
    assert texts_of(read_rows(path)) == [text, "plain"]


@pytest.mark.parametrize("line", ['"wow"\t1', '"wow\t1', '"a "b" c"\t1', '"a ""b"" c\t1', 'say ""what""\t1'])
def test_quotation_marks_of_unquoted_tsv_are_text(tmp_path, line):
    path = write(tmp_path / "a.tsv", f"text\tlabel\n{line}\nfun\t0\n")
    assert texts_of(read_rows(path)) == [line.split("\t")[0], "fun"]


def test_tsv_with_quoted_column_names_has_quoted_cells(tmp_path):
    path = write(tmp_path / "a.tsv", '\ufeff"text"\t"label"\r\n"a"\t"x"\r\n')
    assert list(read_rows(path)) == [{"text": "a", "label": "x"}]
    path = write(tmp_path / "b.tsv", '"text"\t"label"\n"never closed\t"x"\n')
    assert read_rows(path)[0]['"text"'] == '"never closed'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text;label\na, b;x\n", r"a.csv:1: one column was found, 'text;label': .* use ';'. Save it with ','"),
        ("a.csv", '"text"|"label"\n"a"|"x"\n', "a.csv:1: broken quoting"),
        ("a.csv", "Text\tlabel\na\tx\n", r"use '\\t'. Save it with ',', or as .tsv"),
        ("a.tsv", "text,label\na,x\n", r"a.tsv:1: one column was found, 'text,label': .* use ','"),
    ],
)
def test_a_table_with_another_delimiter_is_reported(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read_rows(write(tmp_path / name, content))


def test_the_column_of_a_table_of_one_column_can_have_any_name(tmp_path):
    assert list(read_rows(write(tmp_path / "a.csv", "a; b\nx;y\n"))) == [{"a; b": "x;y"}]
