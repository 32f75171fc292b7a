"""The tokens that an extended tokenizer adds to that of a backbone, as `vocabulary.json` in its folder lists them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = "vocabulary.json"


@dataclass(frozen=True)
class AddedRow:
    """A token that an extended tokenizer adds.

    Args:
        id: Its id.
        token: Its name in the tokenizer.
        text: Its text.
        base: Ids of the tokens of the base tokenizer that it replaces.
        count: How often it occurs in the corpus that it was selected from.
    """

    id: int
    token: str
    text: str
    base: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class Vocabulary:
    """The added tokens of an extended tokenizer.

    Args:
        base: Name of the backbone whose tokenizer is extended.
        digest: Digest of the base tokenizer, see `fingerprint.tokenizer_digest`.
        rows: The added tokens by id.
    """

    base: str
    digest: str
    rows: tuple[AddedRow, ...]

    def save(self, folder: Path) -> None:
        """Writes `vocabulary.json` into a folder."""
        (folder / FILE).write_text(json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n")


def read_vocabulary(folder: Path | str) -> Vocabulary:
    """Reads the added tokens of an extended tokenizer.

    Raises:
        ValueError: If the folder is not one that `softprompt vocabulary` wrote.
    """
    path = Path(folder).expanduser() / FILE
    try:
        content = json.loads(path.read_bytes())
        rows = tuple(_read_row(row) for row in content["rows"])
        vocabulary = Vocabulary(str(content["base"]), str(content["digest"]), rows)
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} has no {FILE}; backbone.vocabulary is a folder that softprompt vocabulary wrote"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}); write it again") from error
    _check_ids(vocabulary.rows, path)
    return vocabulary


def _read_row(row: dict[str, Any]) -> AddedRow:
    base = tuple(int(id) for id in row["base"])
    return AddedRow(int(row["id"]), str(row["token"]), str(row["text"]), base, int(row["count"]))


def _check_ids(rows: Sequence[AddedRow], path: Path) -> None:
    """Checks that ids are consecutive and that base ids precede them.

    Raises:
        ValueError: If they are not.
    """
    first = rows[0].id if rows else 0
    are_consecutive = [row.id for row in rows] == list(range(first, first + len(rows)))
    have_base = all(row.base for row in rows)
    base_ids = [id for row in rows for id in row.base]
    are_base = have_base and bool(rows) and min(base_ids) >= 0 and max(base_ids) < first
    if not are_consecutive or not are_base:
        raise ValueError(f"{path} lists no tokens, or ids that do not follow those of the base tokenizer")
