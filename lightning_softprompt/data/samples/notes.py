"""The data of `softprompt quickstart --rag`: notes on soft prompts, written for this project, and questions on them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import yaml

from lightning_softprompt.system.atomic_files import write_folder
from lightning_softprompt.system.cache_dirs import cache_folder

SOURCE = Path(__file__).with_name("notes.yaml")
VALIDATION = 2  # of the notes that would train


def notes() -> Path:
    """The folder with `corpus`, `train`, `validation` and `test` as JSON lines, which is created at first use.

    No note has questions in two splits, so a tested prompt was not trained on the answers or their notes.
    """
    content = SOURCE.read_bytes()
    folder = cache_folder("data", f"notes-{blake2b(content, digest_size=4).hexdigest()}")
    if not folder.is_dir():
        write_folder(folder, partial(_write, written=yaml.safe_load(content)))
    return folder


def _write(folder: Path, written: Sequence[Mapping[str, Any]]) -> None:
    shown, tested = written[0::2], written[1::2]
    splits = {"train": shown[:-VALIDATION], "validation": shown[-VALIDATION:], "test": tested}
    for split, some in splits.items():
        _lines(folder / f"{split}.jsonl", [row for note in some for row in _rows(note)])
    _lines(
        folder / "corpus.jsonl", [{"id": _id(note), "title": note["title"], "text": note["text"]} for note in written]
    )


def _rows(note: Mapping[str, Any]) -> list[dict[str, Any]]:
    asked = note["asked"].items()
    return [{"question": question, "answers": [answer], "positive_ids": [_id(note)]} for question, answer in asked]


def _id(note: Mapping[str, Any]) -> str:
    return str(note["title"]).lower().replace(" ", "-")


def _lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
