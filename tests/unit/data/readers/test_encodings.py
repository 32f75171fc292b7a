"""Files in other encodings, and compressed files."""

import bz2
import gzip
import lzma
import zipfile

import pytest
from source_files import CONTENTS, ROWS, set_standard_input, write

from lightning_softprompt.data.readers.sources import DataError, read_rows

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
    set_standard_input(monkeypatch, "a warm film\n".encode(encoding))
    with pytest.raises(DataError, match="standard input is UTF-16"):
        read_rows("-")


def test_compressed_standard_input_is_reported(monkeypatch):
    set_standard_input(monkeypatch, gzip.compress(b"a warm film\n"))
    with pytest.raises(DataError, match="standard input is compressed by gzip; decompress it first"):
        read_rows("-")


def test_text_with_a_few_zero_bytes_is_not_read_as_utf16(tmp_path):
    assert [row["text"] for row in read_rows(write(tmp_path / "a.txt", b"good\x00 film\n"))] == ["good\x00 film"]


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
