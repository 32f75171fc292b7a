"""Rows of files, their lines and numbers, and rows that cannot be read."""

import subprocess
import sys

import pytest
from source_files import CONTENTS, ROWS, places_of, texts_of, write, write_named_files

from lightning_softprompt.data.readers.sources import DataError, read_rows


def save_parquet(path):
    pa = pytest.importorskip("pyarrow")
    pa.parquet = pytest.importorskip("pyarrow.parquet")
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_files_with_any_line_end_and_byte_order_mark_have_the_same_rows(tmp_path, name, bom, end):
    path = write(tmp_path / name, bom + CONTENTS[name].replace("\n", end).encode())
    assert list(read_rows(path)) == ROWS


def test_rows_of_parquet_are_numbered_from_zero(tmp_path):
    save_parquet(tmp_path / "a.parquet")
    rows = read_rows(str(tmp_path / "a.parquet"))
    assert list(rows) == ROWS
    assert rows.where(1) == f"row 1 of {tmp_path / 'a.parquet'}"


def test_rows_in_memory_are_not_copied():
    rows = read_rows(ROWS)
    assert rows[1] is ROWS[1]
    assert len(rows) == 2
    assert rows.where(1) == "row 1 of the given rows"
    with pytest.raises(DataError, match=r"row 1 of the given rows: expected columns and their values, got str 'text'"):
        read_rows([ROWS[0], "text"])


def test_the_line_of_a_row_counts_blank_and_bad_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", '\n{"text": "a"}\nbroken\n\n{"text": "b"}\n')
    rows = read_rows(path, on_bad_row="skip")
    assert places_of(rows) == [f"{path}:2", f"{path}:5"]
    assert [reason.partition(": ")[0] for reason in rows.skipped] == [f"{path}:3"]


def test_the_line_of_a_row_is_its_first_if_a_cell_contains_line_breaks(tmp_path):
    path = write(tmp_path / "a.csv", 'text,label\n"one\ntwo",0\nfun,1\n')
    rows = read_rows(path)
    assert rows[0] == {"text": "one\ntwo", "label": "0"}
    assert places_of(rows) == [f"{path}:2", f"{path}:4"]


BAD_ROWS = {
    "broken JSON": ("a.jsonl", b'{"text": "a"}\n{"text": \n{"text": "b"}\n', 2),
    "expected a JSON object, got list": ("a.jsonl", b'{"text": "a"}\n[1]\n{"text": "b"}\n', 2),
    "not UTF-8": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n{"text": "b"}\n', 2),
    "surrogates not allowed": ("a.jsonl", b'{"text": "a"}\n{"text": "\\uD800"}\n{"text": "b"}\n', 2),
    r"expected 1 cells.*got 2": ("a.csv", b"text\na\nx,y\nb\n", 3),
    r"expected 2 cells.*got 1": ("a.tsv", b"text\tlabel\na\t0\nx\nb\t1\n", 3),
    "broken quoting": ("a.csv", b'text\na\n"x"y\nb\n', 3),
    r"not UTF-8 ": ("a.csv", b"text\na\n\xff\nb\n", 3),
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_bad_row_is_reported_with_its_line_and_a_remedy_or_skipped(tmp_path, reason):
    name, content, line = BAD_ROWS[reason]
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=rf"{name}:{line}: .*{reason}.*on_bad_row='skip'"):
        read_rows(path)
    rows = read_rows(path, on_bad_row="skip")
    assert [row["text"] for row in rows] == ["a", "b"]
    assert len(rows.skipped) == 1
    assert rows.skipped[0].startswith(f"{path}:{line}: ")


def test_an_incomplete_surrogate_pair_in_a_list_is_a_bad_row(tmp_path):
    path = write(tmp_path / "a.json", '[{"text": "\\ud83d\\ude00"}, {"text": "\\ud83d"}, {"text": "b"}, 1]')
    with pytest.raises(DataError, match=r"row 1 of .*a\.json: not UTF-8"):
        read_rows(path)
    rows = read_rows(path, on_bad_row="skip")
    assert [row["text"] for row in rows] == ["\U0001f600", "b"]
    assert [reason.rpartition("a.json: ")[2][:8] for reason in rows.skipped] == ["not UTF-", "expected"]


@pytest.mark.parametrize("name", [*CONTENTS, "b.csv"])
def test_an_empty_file_is_rejected(tmp_path, name):
    path = write(tmp_path / name, {"list.json": "[]", "b.csv": "text,label\n"}.get(name, ""))
    with pytest.raises(DataError, match=rf"{name} has no rows"):
        read_rows(path, on_bad_row="skip")


def test_a_file_of_bad_rows_only_is_rejected_even_if_bad_rows_are_skipped(tmp_path):
    path = write(tmp_path / "a.jsonl", "x\ny\n")
    with pytest.raises(DataError, match=r"no row that can be read; the first of 2: .*a.jsonl:1"):
        read_rows(path, on_bad_row="skip")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,text\na,b\n", r"a.csv:1: the columns \['text'\] are named more than once"),
        ("a.csv", b"te\xfft\na\n", r"a.csv:1: not UTF-8"),
        ("a.json", '[\n{"text": "a"},\n{"text": \n]', r"a.json:4: broken JSON"),
        ("a.parquet", "PAR1 no", r"a.parquet is no Parquet file"),
        ("a.xlsx", "PK", r"a.xlsx is of no known kind; expected one of .jsonl"),
    ],
)
def test_an_invalid_file_is_rejected_even_if_bad_rows_are_skipped(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read_rows(write(tmp_path / name, content), on_bad_row="skip")


def test_a_missing_file_is_reported_with_similar_names(tmp_path):
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"trian.jsonl does not exist. Did you mean train.jsonl\?"):
        read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"nor does the folder .*nowhere"):
        read_rows(tmp_path / "nowhere" / "train.jsonl")
    with pytest.raises(DataError, match=r"missing.csv does not exist"):
        read_rows("missing.csv")


def test_an_unknown_value_of_on_bad_row_is_rejected_before_reading():
    with pytest.raises(ValueError, match=r"'raise' or 'skip', got 'ignore'"):
        read_rows("missing.csv", on_bad_row="ignore")


READ_WITHOUT_HEAVY_PACKAGES = """
import sys
from lightning_softprompt.data.readers.sources import read_rows
read_rows(sys.argv[1])
assert not {"torch", "datasets", "pyarrow"} & set(sys.modules)
"""


def test_reading_a_text_file_imports_neither_torch_nor_datasets(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}')
    subprocess.run([sys.executable, "-c", READ_WITHOUT_HEAVY_PACKAGES, path], check=True)


# Several files


def test_several_files_are_read_in_order(tmp_path):
    first = write(tmp_path / "a.jsonl", '{"text": "a"}\nbroken\n{"text": "b"}\n')
    second = write(tmp_path / "b.csv", "text\nc\n")
    names, pattern, mixed = [str(first), str(second)], str(tmp_path / "*.*"), [str(tmp_path / "a*"), second]
    for source in (names, pattern, mixed):
        rows = read_rows(source, on_bad_row="skip")
        assert texts_of(rows) == ["a", "b", "c"]
        assert places_of(rows) == [f"{first}:1", f"{first}:3", f"{second}:2"]
        origins = [rows.origin(i) for i in range(3)]
        assert [origin.file for origin in origins] == [str(first), str(first), str(second)]
        assert [origin.index for origin in origins] == [0, 2, 0]
        assert rows.only([2]).where(0) == f"{second}:2"
        assert len(rows.skipped) == 1


def test_a_pattern_or_list_without_files_is_rejected(tmp_path):
    with pytest.raises(DataError, match=r"no file matches .*/\*.jsonl"):
        read_rows(str(tmp_path / "*.jsonl"))
    write_named_files(tmp_path, "train.jsonl")
    with pytest.raises(DataError, match=r"trian.jsonl does not exist. Did you mean train.jsonl"):
        read_rows([str(tmp_path / "train.jsonl"), str(tmp_path / "trian.jsonl")])
    with pytest.raises(DataError, match=r"is a folder; name its files"):
        read_rows([str(tmp_path)])


def test_a_file_whose_name_looks_like_a_pattern_is_read(tmp_path):
    write_named_files(tmp_path, "a[1].jsonl")
    assert texts_of(read_rows(str(tmp_path / "a[1].jsonl"))) == ["a[1].jsonl"]


def test_the_index_of_a_row_counts_skipped_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n\nbroken\n{"text": "b"}\n')
    rows = read_rows(path, on_bad_row="skip")
    assert [rows.origin(i).index for i in range(2)] == [0, 2]
    second = rows.only([1])
    assert second.origin(0).index == 2
    assert second.where(0) == f"{path}:4"
    assert read_rows(ROWS).origin(1).index == 1


def test_columns_can_be_renamed(tmp_path):
    rows = read_rows(write(tmp_path / "a.csv", "Review Text,text,target\na,b,c\n"))
    renamed = rows.rename_columns({"Review Text": "text", "target": "label"})
    assert list(renamed) == [{"text": "a", "label": "c"}]
    assert read_rows([{"text": "b"}]).rename_columns({"review": "text"})[0] == {"text": "b"}
    swapped = read_rows([{"a": 1, "b": 2}]).rename_columns({"a": "b", "b": "a"})
    assert swapped[0] == {"b": 1, "a": 2}
