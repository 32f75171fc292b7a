"""Checks and descriptions of corpora."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sized
from typing import cast

import numpy as np

from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import WindowExample
from lightning_softprompt.data.corpus.documents import is_folder_of_texts
from lightning_softprompt.data.corpus.stored_windows import StoredRows
from lightning_softprompt.data.prepared import PreparedRows
from lightning_softprompt.data.splits.row_source import is_file

MIN_WINDOW = 16  # bytes
NAME = re.compile(r"\w[\w-]*")


def is_undivided(path: str) -> bool:
    """Whether documents of a path are divided into splits: a file, a pattern, or a folder without files of splits."""
    return is_file(path) or is_folder_of_texts(path)


def check_sizes(window: int, stride: int | None, template: Template) -> None:
    """Checks the sizes of windows.

    Raises:
        ValueError: If a size is too small, the stride is not below the window, or the template of windows with a stride
            has a space before the target.
    """
    if window < MIN_WINDOW:
        raise ValueError(f"window must be at least {MIN_WINDOW} bytes, got {window}")
    if stride is None:
        return
    if not MIN_WINDOW <= stride < window:
        raise ValueError(f"stride must be at least {MIN_WINDOW} bytes and below window={window}, got {stride}")
    if template.glue:
        raise ValueError(f"with stride, no space may precede the target of the template, got {template.text!r}")


def check_corpora(corpora: Mapping[str, str], rates: Mapping[str, float]) -> None:
    """Checks the names and rates of further corpora.

    Raises:
        ValueError: If a name cannot be part of the name of a metric, a rate names no corpus or is not above 0, or the
            rates leave no batch for the main corpus.
    """
    if wrong := [name for name in corpora if not NAME.fullmatch(name)]:
        raise ValueError(f"names of corpora may contain only letters, digits, _ and -, got {wrong}")
    if unknown := [name for name in rates if name not in corpora]:
        raise ValueError(f"rates names {unknown}, but corpora are {list(corpora)}; add the source to data.corpora")
    if any(rate <= 0 for rate in rates.values()) or sum(rates.values()) >= 1:
        raise ValueError(
            f"rates must be above 0 and leave a share for the main corpus, so that their sum is below 1, got {rates}"
        )


def check_parts(parts: Mapping[str, Sized], documents: int) -> None:
    """Checks that each split has documents.

    Raises:
        ValueError: If one has none.
    """
    if not all(map(len, parts.values())):
        raise ValueError(
            f"the corpus has {documents} documents, too few to hold out some; set data.validation (and data.test), or "
            "divide a text file into more documents by data.boundary"
        )


def describe_size(rows: PreparedRows) -> str:
    """Describes the number of documents, bytes and windows, for the log."""
    if isinstance(rows, StoredRows):
        documents, size = len(np.unique(rows.table.documents)), int(rows.table.sizes.sum())
    else:
        windows = [cast(WindowExample, example) for example in rows.examples]
        documents = len({window.document for window in windows})
        size = sum(window.num_bytes for window in windows)
    return f"{documents:,} documents, {size:,} bytes, {len(rows):,} windows"
