import bz2
import csv
import gzip
import io
import json
import lzma
import subprocess
import sys
import time
import zipfile

import datasets
import pytest

from lightning_softprompt.data.readers.sources import DataError, read_rows

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
    assert [rows.where(i) for i in range(len(rows))] == [f"{path}:2", f"{path}:5"]
    assert [reason.partition(": ")[0] for reason in rows.skipped] == [f"{path}:3"]


def test_the_line_of_a_row_is_its_first_if_a_cell_contains_line_breaks(tmp_path):
    path = write(tmp_path / "a.csv", 'text,label\n"one\ntwo",0\nfun,1\n')
    rows = read_rows(path)
    assert rows[0] == {"text": "one\ntwo", "label": "0"}
    assert [rows.where(0), rows.where(1)] == [f"{path}:2", f"{path}:4"]


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


ENCODINGS = {"latin-1": "position", "cp1252": "position", "utf-16": "UTF-16", "utf-16-le": "UTF-16"}
ENCODINGS |= {"utf-16-be": "UTF-16", "utf-32": "UTF-32"}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["a.jsonl", "list.json", "a.csv", "a.tsv"])
def test_a_file_in_another_encoding_is_reported_with_a_remedy(tmp_path, name, encoding):
    path = write(tmp_path / name, CONTENTS[name].encode(encoding))
    with pytest.raises(DataError, match=rf"{name}.*{ENCODINGS[encoding]}.*[Ss]ave (the file|it) as UTF-8"):
        read_rows(path)


COMPRESSORS = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("kind", COMPRESSORS)
@pytest.mark.parametrize("name", ["a.jsonl", "list.json", "a.csv", "a.tsv", "a.txt"])
@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
def test_a_compressed_file_without_its_suffix_is_reported(tmp_path, name, kind, on_bad_row):
    path = write(tmp_path / name, COMPRESSORS[kind](CONTENTS.get(name, "good\n").encode()))
    with pytest.raises(DataError, match=f"{name} is compressed by {kind}; add .* to its name"):
        read_rows(path, on_bad_row=on_bad_row)


def test_a_spreadsheet_with_the_suffix_csv_is_reported(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.csv", "w") as archive:
        archive.writestr("sheet.xml", "<xml/>")
    with pytest.raises(DataError, match=r"a\.csv is a ZIP archive"):
        read_rows(tmp_path / "a.csv")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_standard_input_in_another_encoding_is_reported(monkeypatch, encoding):
    pipe(monkeypatch, "a warm film\n".encode(encoding))
    with pytest.raises(DataError, match="standard input is UTF-16"):
        read_rows("-")


def test_compressed_standard_input_is_reported(monkeypatch):
    pipe(monkeypatch, gzip.compress(b"a warm film\n"))
    with pytest.raises(DataError, match="standard input is compressed by gzip; decompress it first"):
        read_rows("-")


def test_text_with_a_few_zero_bytes_is_not_read_as_utf16(tmp_path):
    assert [row["text"] for row in read_rows(write(tmp_path / "a.txt", b"good\x00 film\n"))] == ["good\x00 film"]


@pytest.mark.parametrize("columns", [{}, {"text": [], "label": []}])
def test_a_saved_dataset_without_rows_is_rejected(tmp_path, columns):
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns)}).save_to_disk(tmp_path / "splits")
    for folder in ("one", "splits"):
        with pytest.raises(DataError, match=rf"{folder}.* has no rows"):
            read_rows(str(tmp_path / folder), "train")


def test_an_incomplete_surrogate_pair_in_a_list_is_a_bad_row(tmp_path):
    path = write(tmp_path / "a.json", '[{"text": "\\ud83d\\ude00"}, {"text": "\\ud83d"}, {"text": "b"}, 1]')
    with pytest.raises(DataError, match=r"row 1 of .*a\.json: not UTF-8"):
        read_rows(path)
    rows = read_rows(path, on_bad_row="skip")
    assert [row["text"] for row in rows] == ["\U0001f600", "b"]
    assert [reason.rpartition("a.json: ")[2][:8] for reason in rows.skipped] == ["not UTF-", "expected"]


def test_an_unclosed_quotation_mark_is_reported_with_its_line(tmp_path):
    path = write(tmp_path / "a.csv", 'text\na\n"x\nb\n')
    with pytest.raises(DataError, match=r"a.csv:3: broken quoting"):
        read_rows(path)


def test_cells_of_tsv_can_contain_a_single_quotation_mark(tmp_path):
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"wow\t1\nfun\t0\n')
    assert [row["text"] for row in read_rows(path)] == ['"wow', "fun"]


def test_cells_of_csv_can_be_long_documents(tmp_path):
    assert len(read_rows(write(tmp_path / "a.csv", f"text\n{'x' * 200_000}\n"))[0]["text"]) == 200_000


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


def test_a_misspelt_folder_is_not_requested_from_the_hub(tmp_path, monkeypatch):
    (tmp_path / "data" / "reviews").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"data/review does not exist. Did you mean reviews\?"):
        read_rows("data/review", "train")


def test_an_unknown_value_of_on_bad_row_is_rejected_before_reading():
    with pytest.raises(ValueError, match=r"'raise' or 'skip', got 'ignore'"):
        read_rows("missing.csv", on_bad_row="ignore")


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_the_validation_split_of_a_folder_can_have_any_usual_name(tmp_path, name):
    write(tmp_path / "train.jsonl", '{"text": "train"}')
    path = write(tmp_path / f"{name}.csv", "text\nval\n")
    assert list(read_rows(tmp_path, "validation")) == [{"text": "val"}]
    assert read_rows(tmp_path, "train").where(0) == f"{tmp_path / 'train.jsonl'}:1"
    assert read_rows(tmp_path, "validation").where(0) == f"{path}:2"


def test_a_split_of_a_folder_is_chosen_by_its_exact_name_or_rejected_if_ambiguous(tmp_path):
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


def test_datasets_saved_to_disk_are_read(tmp_path):
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
    table, requests = datasets.Dataset.from_list(ROWS), []

    def load_dataset(*names):
        requests.append(names)
        return datasets.DatasetDict({"train": table, "validation": table})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows("nyu-mll/glue:sst2", "train")[1] == ROWS[1]
    assert read_rows("imdb", "val").where(1) == "row 1 of imdb[validation]"
    assert requests == [("nyu-mll/glue", "sst2"), ("imdb", None)]


def test_an_unreachable_hub_causes_one_clear_error(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*names):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"glue could not be loaded.*Couldn't reach the Hub.*check name and network"):
        read_rows("glue", "train")


def test_standard_input_can_contain_json_lines_and_plain_text(monkeypatch):
    pipe(monkeypatch, b'{"text": "a", "n": 1}\r\nplain words\n\n{soft} words\n[1]\n')
    rows = read_rows("-")
    assert list(rows) == [{"text": "a", "n": 1}, {"text": "plain words"}, {"text": "{soft} words"}, {"text": "[1]"}]
    assert rows.where(2) == "standard input:4"


def test_broken_json_on_standard_input_is_not_read_as_text(monkeypatch):
    pipe(monkeypatch, b'words\n{"text": "a"\n')
    with pytest.raises(DataError, match=r"standard input:2: broken JSON"):
        read_rows("-")


READ_WITHOUT_HEAVY_PACKAGES = """
import sys
from lightning_softprompt.data.readers.sources import read_rows
read_rows(sys.argv[1])
assert not {"torch", "datasets", "pyarrow"} & set(sys.modules)
"""


def test_reading_a_text_file_imports_neither_torch_nor_datasets(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}')
    subprocess.run([sys.executable, "-c", READ_WITHOUT_HEAVY_PACKAGES, path], check=True)


# Layouts of folders


def texts_of(rows):
    return [row["text"] for row in rows]


def save(folder, *names):
    """Writes files of one row each, whose text is the name of the file."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json_lines([{"text": name}]).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


LAYOUTS = {
    "shards": ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
    "shards with a hash": ["train-00000-of-00001-0a1b2c3d4e5f6789.jsonl"],
    "in data": ["data/train-00000-of-00001.jsonl"],
    "not sharded in data": ["data/train.jsonl"],
    "a folder for the split": ["train/part-0.jsonl", "train/part-1.jsonl"],
    "shards in a folder for the split": ["train/0-00000-of-00002.jsonl", "train/0-00001-of-00002.jsonl"],
    "a folder for the split in data": ["data/train/a.jsonl"],
    "the folder of a configuration": ["plain_text/train-00000-of-00001.jsonl"],
    "compressed": ["train.jsonl.gz"],
    "capitals": ["Train.jsonl"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_can_have_the_layouts_of_the_hub(tmp_path, layout):
    test_files = [name.replace("rain", "est") for name in LAYOUTS[layout]]
    save(tmp_path, *LAYOUTS[layout], *test_files, "README.jsonl.md", ".cache/train.jsonl")
    assert texts_of(read_rows(tmp_path, "train")) == LAYOUTS[layout]
    with pytest.raises(DataError, match=r"has the splits \[.*\], wanted 'validation'"):
        read_rows(tmp_path, "validation")


def test_files_of_sub_folders_are_not_splits_of_a_folder_with_files_of_splits(tmp_path):
    save(tmp_path, "train.jsonl", "old/validation.jsonl", "data/dev.jsonl")
    with pytest.raises(DataError, match=r"has the splits \['train'\], wanted 'validation'"):
        read_rows(tmp_path, "validation")
    save(tmp_path, "validation/a.jsonl")
    assert texts_of(read_rows(tmp_path, "validation")) == ["validation/a.jsonl"]


def test_a_split_saved_by_datasets_is_not_read_as_json_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(str(tmp_path / "train"))
    save(tmp_path, "test/dataset_info.json", "test/part.jsonl")
    assert texts_of(read_rows(tmp_path, "train")) == ["a"]
    assert texts_of(read_rows(tmp_path, "test")) == ["test/part.jsonl"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train.xlsx", "notes.md"], r"no files of rows for the split 'train': it holds \['notes.md', 'train.xlsx'\]"),
        ([".git/train.jsonl"], r"no files of rows for the split 'train': it is empty"),
        (["sst2_train-1.jsonl", "test.jsonl"], r"If \['sst2_train-1'\] are parts of it, give their files"),
        (["constrain.jsonl", "test.jsonl"], r"wanted 'train'. Name a split it has"),
    ],
)
def test_a_folder_without_the_split_is_reported_with_its_content(tmp_path, names, message):
    save(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path, "train")


def test_a_split_with_a_missing_shard_is_rejected(tmp_path):
    save(tmp_path, "train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl")
    with pytest.raises(DataError, match=r"one of 3 files, but number 1 of them is missing"):
        read_rows(tmp_path, "train")


def test_several_configurations_of_a_dataset_are_rejected(tmp_path):
    save(tmp_path, "cola/train-00000-of-00001.jsonl", "sst2/train-00000-of-00001.jsonl")
    with pytest.raises(DataError, match=r"has the split in the folders \['cola', 'sst2'\]. Name one of them"):
        read_rows(tmp_path, "train")
    assert len(read_rows(tmp_path / "sst2", "train")) == 1


@pytest.mark.parametrize(
    ("suffix", "compress"), {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.items()
)
def test_compressed_files_are_read_and_broken_ones_reported(tmp_path, suffix, compress):
    content = compress(CONTENTS["a.csv"].encode())
    path = write(tmp_path / f"a.csv.{suffix}", content)
    assert list(read_rows(path)) == ROWS
    assert read_rows(path).where(1) == f"{path}:3"
    with pytest.raises(DataError, match=rf"a.csv.{suffix} is a broken .{suffix} file.*Write it again"):
        read_rows(write(path, content[:-9]))
    with pytest.raises(DataError, match=rf"a.csv.{suffix} is a broken .{suffix} file"):
        read_rows(write(path, b"text,label\na,b\n"))


# Several files


def test_several_files_are_read_in_order(tmp_path):
    first = write(tmp_path / "a.jsonl", '{"text": "a"}\nbroken\n{"text": "b"}\n')
    second = write(tmp_path / "b.csv", "text\nc\n")
    for source in ([str(first), str(second)], str(tmp_path / "*.*"), [str(tmp_path / "a*"), second]):
        rows = read_rows(source, on_bad_row="skip")
        assert texts_of(rows) == ["a", "b", "c"]
        assert [rows.where(i) for i in range(3)] == [f"{first}:1", f"{first}:3", f"{second}:2"]
        origins = [rows.origin(i) for i in range(3)]
        assert [origin.file for origin in origins] == [str(first), str(first), str(second)]
        assert [origin.index for origin in origins] == [0, 2, 0]
        assert rows.only([2]).where(0) == f"{second}:2"
        assert len(rows.skipped) == 1


def test_a_pattern_or_list_without_files_is_rejected(tmp_path):
    with pytest.raises(DataError, match=r"no file matches .*/\*.jsonl"):
        read_rows(str(tmp_path / "*.jsonl"))
    save(tmp_path, "train.jsonl")
    with pytest.raises(DataError, match=r"trian.jsonl does not exist. Did you mean train.jsonl"):
        read_rows([str(tmp_path / "train.jsonl"), str(tmp_path / "trian.jsonl")])
    with pytest.raises(DataError, match=r"is a folder; name its files"):
        read_rows([str(tmp_path)])


def test_a_file_whose_name_looks_like_a_pattern_is_read(tmp_path):
    save(tmp_path, "a[1].jsonl")
    assert texts_of(read_rows(str(tmp_path / "a[1].jsonl"))) == ["a[1].jsonl"]


# Indices


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
    assert read_rows([{"a": 1, "b": 2}]).rename_columns({"a": "b", "b": "a"})[0] == {"b": 1, "a": 2}


# CSV and TSV


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
    pipe(monkeypatch, (bom + content).encode())
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
    pipe(monkeypatch, content.encode())
    with pytest.raises(DataError, match=message):
        read_rows("-", columns=["text"])


@pytest.mark.parametrize("line", ["a," * 10**5, '"' + "x" * 10**6, "[" * 10**5])
def test_a_long_line_of_text_is_a_row(monkeypatch, line):
    pipe(monkeypatch, line.encode())
    assert texts_of(read_rows("-", columns=["text"])) == [line]


def test_plain_text_becomes_the_column_that_is_required(monkeypatch):
    for columns, name in ((["question"], "question"), (["a", "b"], "text"), ([], "text")):
        pipe(monkeypatch, b"Who?\n")
        assert list(read_rows("-", columns=columns)) == [{name: "Who?"}]


def test_plain_text_that_looks_like_a_table_causes_a_warning(monkeypatch, caplog):
    pipe(monkeypatch, b"review,label\ngood,1\n")
    assert len(read_rows("-", columns=["text"])) == 2
    assert "looks like the columns of a table" in caplog.text


@pytest.mark.parametrize("content", ["text, label\ngood, 1\n", "review|label\ngood|1\n", "Text;label\ngood;1\n"])
def test_tables_with_other_delimiters_or_names_cause_a_warning(monkeypatch, caplog, content):
    pipe(monkeypatch, content.encode())
    assert len(read_rows("-", columns=["text"])) == 2
    assert "looks like the columns of a table" in caplog.text


@pytest.mark.parametrize(
    ("content", "warns"), [('"good"\n"a \\"b\\""\n', True), ('"good"\nbad\n', False), ('"a" b\n', False)]
)
def test_lines_of_json_strings_cause_a_warning(monkeypatch, caplog, content, warns):
    pipe(monkeypatch, content.encode())
    read_rows("-", columns=["text"])
    assert ("jq leaves them out with -r" in caplog.text) == warns
