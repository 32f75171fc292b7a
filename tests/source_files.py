"""Files of rows in each format, and a standard input, for tests of readers."""

import gzip
import io
import json
import sys

ROWS = [{"text": "naïve", "label": "0"}, {"text": "fun", "label": "1"}]


def to_json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


CONTENTS = {  # `ROWS` in each text format, by the name of a file
    "a.jsonl": to_json_lines(ROWS),
    "a.ndjson": to_json_lines(ROWS),
    "lines.json": to_json_lines(ROWS),
    "list.json": json.dumps(ROWS, indent=1, ensure_ascii=False),
    "a.csv": "text,label\nnaïve,0\nfun,1\n",
    "a.tsv": "text\tlabel\nnaïve\t0\nfun\t1\n",
}


def write(path, content):
    """Writes text or bytes to a file; returns its path."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_named_files(folder, *names):
    """Writes files of one row each, whose text is the name of the file."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = to_json_lines([{"text": name}]).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def texts_of(rows):
    """Returns the text of each row."""
    return [row["text"] for row in rows]


def places_of(rows):
    """Returns the file and line of each row."""
    return [rows.where(i) for i in range(len(rows))]


def set_standard_input(monkeypatch, content):
    """Replaces the standard input by bytes."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
