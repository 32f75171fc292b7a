"""The file with the predictions of a test: a JSON object for each row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_softprompt.system.errors import CommandError

PREDICTIONS = "test_predictions.jsonl"
MAX_SHOWN = 60  # bytes of an invalid line that a message shows


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """Reads the records of a test.

    Raises:
        CommandError: Naming the file and the line of a record that is not valid.
    """
    with path.open("rb") as lines:
        return [_parse_record(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _parse_record(line: bytes, position: str) -> dict[str, Any]:
    beginning = line[:MAX_SHOWN].decode(errors="replace")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        message = f"{position}: expected a JSON object, got {beginning!r} ({error}); run the test again"
        raise CommandError(message) from error
    if not isinstance(record, dict):
        raise CommandError(f"{position}: expected a JSON object, got {beginning!r}; run the test again")
    return record
