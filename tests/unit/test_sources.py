import io
import json
import subprocess
import sys

import pytest

from lightning_softprompt.data.sources import DataError, read_rows

ROWS = [{"text": "naïve", "label": "0"}, {"text": "fun", "label": "1"}]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pipe(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def save_parquet(path):
    pa = pytest.importorskip("pyarrow")
    pa.parquet = pytest.importorskip("pyarrow.parquet")
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), path)


CONTENTS = {
    "a.jsonl": json_lines(ROWS),
    "a.ndjson": json_lines(ROWS),
    "lines.json": json_lines(ROWS),
    "list.json": json.dumps(ROWS, indent=1, ensure_ascii=False),
    "a.csv": "text,label\nnaïve,0\nfun,1\n",
    "a.tsv": "text\tlabel\nnaïve\t0\nfun\t1\n",
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_files_give_their_rows_with_any_line_end_and_byte_order_mark(tmp_path, name, bom, end):
    path = write(tmp_path / name, bom + CONTENTS[name].replace("\n", end).encode())
    assert list(read_rows(path)) == ROWS


def test_parquet_gives_its_rows_and_counts_them_from_zero(tmp_path):
    save_parquet(tmp_path / "a.parquet")
    rows = read_rows(str(tmp_path / "a.parquet"))
    assert list(rows) == ROWS
    assert rows.where(1) == f"row 1 of {tmp_path / 'a.parquet'}"


def test_rows_in_memory_are_taken_as_they_are():
    rows = read_rows(ROWS)
    assert rows[1] is ROWS[1]
    assert (len(rows), rows.where(1)) == (2, "row 1 of the given rows")
    with pytest.raises(DataError, match=r"row 1 of the given rows: wanted columns and their values, got str 'text'"):
        read_rows([ROWS[0], "text"])


def test_where_names_the_line_although_blank_and_bad_lines_came_before(tmp_path):
    path = write(tmp_path / "a.jsonl", '\n{"text": "a"}\nbroken\n\n{"text": "b"}\n')
    rows = read_rows(path, on_bad_row="skip")
    assert [rows.where(i) for i in range(len(rows))] == [f"{path}:2", f"{path}:5"]
    assert [reason.partition(": ")[0] for reason in rows.skipped] == [f"{path}:3"]


def test_where_names_the_first_line_of_a_cell_that_holds_line_breaks(tmp_path):
    path = write(tmp_path / "a.csv", 'text,label\n"one\ntwo",0\nfun,1\n')
    rows = read_rows(path)
    assert rows[0] == {"text": "one\ntwo", "label": "0"}
    assert [rows.where(0), rows.where(1)] == [f"{path}:2", f"{path}:4"]


BAD_ROWS = {
    "broken JSON": ("a.jsonl", b'{"text": "a"}\n{"text": \n{"text": "b"}\n', 2),
    "wanted a JSON object, got list": ("a.jsonl", b'{"text": "a"}\n[1]\n{"text": "b"}\n', 2),
    "not UTF-8": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n{"text": "b"}\n', 2),
    "surrogates not allowed": ("a.jsonl", b'{"text": "a"}\n{"text": "\\uD800"}\n{"text": "b"}\n', 2),
    r"wanted 1 cells.*got 2": ("a.csv", b"text\na\nx,y\nb\n", 3),
    r"wanted 2 cells.*got 1": ("a.tsv", b"text\tlabel\na\t0\nx\nb\t1\n", 3),
    "broken quoting": ("a.csv", b'text\na\n"x"y\nb\n', 3),
    r"not UTF-8 ": ("a.csv", b"text\na\n\xff\nb\n", 3),
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_bad_row_is_an_error_with_place_and_remedy_or_is_skipped_and_told(tmp_path, reason):
    name, content, line = BAD_ROWS[reason]
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=rf"{name}:{line}: .*{reason}.*on_bad_row='skip'"):
        read_rows(path)
    rows = read_rows(path, on_bad_row="skip")
    assert [row["text"] for row in rows] == ["a", "b"]
    assert len(rows.skipped) == 1
    assert rows.skipped[0].startswith(f"{path}:{line}: ")


ENCODINGS = {"latin-1": "position", "utf-16": "position 0", "cp1252": "position"}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["a.jsonl", "list.json", "a.csv", "a.tsv"])
def test_a_file_in_another_encoding_says_so_and_what_to_do(tmp_path, name, encoding):
    path = write(tmp_path / name, CONTENTS[name].encode(encoding))
    with pytest.raises(DataError, match=rf"{name}.*{ENCODINGS[encoding]}.*[Ss]ave (the file|it) as UTF-8"):
        read_rows(path)


def test_half_a_surrogate_pair_in_a_list_is_a_bad_row_and_a_whole_one_is_not(tmp_path):
    path = write(tmp_path / "a.json", '[{"text": "\\ud83d\\ude00"}, {"text": "\\ud83d"}, {"text": "b"}, 1]')
    with pytest.raises(DataError, match=r"row 1 of .*a\.json: not UTF-8"):
        read_rows(path)
    rows = read_rows(path, on_bad_row="skip")
    assert [row["text"] for row in rows] == ["\U0001f600", "b"]
    assert [reason.rpartition("a.json: ")[2][:8] for reason in rows.skipped] == ["not UTF-", "wanted c"]


def test_a_quote_that_never_ends_is_told_where_it_begins(tmp_path):
    path = write(tmp_path / "a.csv", 'text\na\n"x\nb\n')
    with pytest.raises(DataError, match=r"a.csv:3: broken quoting"):
        read_rows(path)


def test_cells_of_tsv_may_hold_a_lone_quotation_mark(tmp_path):
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"wow\t1\nfun\t0\n')
    assert [row["text"] for row in read_rows(path)] == ['"wow', "fun"]


def test_cells_of_csv_may_be_long_documents(tmp_path):
    assert len(read_rows(write(tmp_path / "a.csv", f"text\n{'x' * 200_000}\n"))[0]["text"]) == 200_000


@pytest.mark.parametrize("name", [*CONTENTS, "b.csv"])
def test_an_empty_file_is_an_error(tmp_path, name):
    path = write(tmp_path / name, {"list.json": "[]", "b.csv": "text,label\n"}.get(name, ""))
    with pytest.raises(DataError, match=rf"{name} has no rows"):
        read_rows(path, on_bad_row="skip")


def test_a_file_of_bad_rows_only_is_an_error_although_they_may_be_skipped(tmp_path):
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
        ("a.xlsx", "PK", r"a.xlsx is of no known kind; wanted one of .jsonl"),
    ],
)
def test_a_file_that_is_wrong_as_a_whole_is_an_error(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read_rows(write(tmp_path / name, content), on_bad_row="skip")


def test_a_missing_file_is_told_with_its_close_matches(tmp_path):
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"trian.jsonl does not exist. Did you mean train.jsonl\?"):
        read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"nor does the folder .*nowhere"):
        read_rows(tmp_path / "nowhere" / "train.jsonl")
    with pytest.raises(DataError, match=r"missing.csv does not exist"):
        read_rows("missing.csv")


def test_a_misspelt_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "data" / "reviews").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"data/review does not exist. Did you mean reviews\?"):
        read_rows("data/review", "train")


def test_an_unknown_way_with_bad_rows_is_refused_before_anything_is_read():
    with pytest.raises(ValueError, match=r"'raise' or 'skip', got 'ignore'"):
        read_rows("missing.csv", on_bad_row="ignore")


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_a_folder_finds_validation_by_its_usual_names(tmp_path, name):
    write(tmp_path / "train.jsonl", '{"text": "train"}')
    path = write(tmp_path / f"{name}.csv", "text\nval\n")
    assert list(read_rows(tmp_path, "validation")) == [{"text": "val"}]
    assert read_rows(tmp_path, "train").where(0) == f"{tmp_path / 'train.jsonl'}:1"
    assert read_rows(tmp_path, "validation").where(0) == f"{path}:2"


def test_a_folder_prefers_the_exact_name_and_refuses_to_guess(tmp_path):
    write(tmp_path / "val.jsonl", '{"text": "val"}')
    assert len(read_rows(tmp_path)) == 1
    write(tmp_path / "validation.jsonl", '{"text": "validation"}')
    assert read_rows(tmp_path, "validation")[0]["text"] == "validation"
    assert read_rows(tmp_path, "val")[0]["text"] == "val"
    with pytest.raises(DataError, match=r"splits \['val', 'validation'\], wanted 'test'"):
        read_rows(tmp_path, "test")
    with pytest.raises(DataError, match=r"wanted 'one of them'"):
        read_rows(tmp_path)
    write(tmp_path / "val.csv", "text\nval\n")
    with pytest.raises(DataError, match=r"\['val.csv', 'val.jsonl'\] for the same split"):
        read_rows(tmp_path, "val")


def test_a_folder_saved_by_datasets_gives_its_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "dev": table.select([1])}).save_to_disk(tmp_path / "many")
    assert list(read_rows(tmp_path / "one", "train")) == ROWS
    rows = read_rows(tmp_path / "many", "validation")
    assert list(rows) == ROWS[1:]
    assert rows.where(0) == f"row 0 of {tmp_path / 'many'}[dev]"


def test_a_hub_name_is_loaded_with_its_config(monkeypatch):
    datasets = pytest.importorskip("datasets")
    table, seen = datasets.Dataset.from_list(ROWS), []
    hub = datasets.DatasetDict({"train": table, "validation": table})
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: seen.append(names) or hub)
    assert read_rows("nyu-mll/glue:sst2", "train")[1] == ROWS[1]
    assert read_rows("imdb", "val").where(1) == "row 1 of imdb[validation]"
    assert seen == [("nyu-mll/glue", "sst2"), ("imdb", None)]


def test_an_unreachable_hub_is_one_clear_error(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*names):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"glue could not be loaded.*Couldn't reach the Hub.*check name and network"):
        read_rows("glue", "train")


def test_standard_input_takes_json_lines_and_plain_text(monkeypatch):
    pipe(monkeypatch, b'{"text": "a", "n": 1}\r\nplain words\n\n{soft} words\n[1]\n')
    rows = read_rows("-")
    assert list(rows) == [{"text": "a", "n": 1}, {"text": "plain words"}, {"text": "{soft} words"}, {"text": "[1]"}]
    assert rows.where(2) == "standard input:4"


def test_broken_json_on_standard_input_is_not_taken_for_text(monkeypatch):
    pipe(monkeypatch, b'words\n{"text": "a"\n')
    with pytest.raises(DataError, match=r"standard input:2: broken JSON"):
        read_rows("-")


def test_reading_needs_neither_torch_nor_datasets(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}')
    code = (
        "import sys; from lightning_softprompt.data.sources import read_rows; "
        f"read_rows({str(path)!r}); assert not {{'torch', 'datasets', 'pyarrow'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
