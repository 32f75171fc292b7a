"""Writes and reads files of rows in JSON Lines."""

import json


def write_rows(path, rows):
    """Writes one line for each row; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_splits(folder, **splits):
    """Writes each split to a file of its name; creates the folder if needed and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


def read_rows(path):
    """Returns the rows of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
