"""Checks of the arguments of data modules."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_softprompt.data.splits.row_source import Source, is_file

log = logging.getLogger(__name__)


def check_path(path: str | None, train: Source | None) -> None:
    """Refuses rows as the source of all splits, and a file as a second source of training rows.

    Raises:
        ValueError: If `path` is not a string, or is a file in addition to `train`.
    """
    if path is not None and not isinstance(path, str | Path):
        raise ValueError(
            f"path must name a folder of splits or a data set on the hub, got {type(path).__name__}; pass rows by "
            "split: train=rows, validation=rows, test=rows"
        )
    if path is not None and train is not None and is_file(path):
        raise ValueError(
            f"data.path is the file {path}, whose rows are divided into splits, but data.train has other training "
            "rows; remove one of the two"
        )


def check_template_escapes(template: str) -> None:
    """Warns of a backslash that the shell or YAML did not turn into a line break or tab."""
    escape = re.search(r"\\[nt]", template)
    if escape:
        log.warning(
            "The template contains a literal backslash and letter, %s. For a line break or tab, use $'...' in bash or "
            "double quotes in YAML: %r", escape[0], template,
        )  # fmt: skip


def check_shares(validation_share: float, test_share: float) -> None:
    """Checks the fractions of rows to hold out.

    Raises:
        ValueError: If there would be no validation rows, or no training rows.
    """
    if not 0 < validation_share < 1:
        raise ValueError(
            f"validation_share must be between 0 and 1, got {validation_share}: validation rows are required to "
            "select the best prompt"
        )
    if not 0 <= test_share < 1 - validation_share:
        raise ValueError(f"test_share must be at least 0 and below 1 - validation_share, got {test_share}")


def check_sizes(batch_size: int, eval_batch_size: int | None, max_tokens: int, num_workers: int, seed: int) -> None:
    """Checks the numbers that have a lower limit.

    Raises:
        ValueError: If a number is below its limit.
    """
    if min(batch_size, eval_batch_size or batch_size, max_tokens) < 1 or num_workers < 0:
        raise ValueError("batch_size, eval_batch_size and max_tokens must be at least 1, num_workers at least 0")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")


def check_new_names(new_names: Mapping[str, Any]) -> None:
    """Refuses two columns with the same new name.

    Args:
        new_names: New column names by their names in the source.

    Raises:
        ValueError: Naming the columns.
    """
    values = list(new_names.values())
    duplicates = sorted({name for name in values if values.count(name) > 1})
    if duplicates:
        duplicate = duplicates[0]
        old_names = [old for old, new in new_names.items() if new == duplicate]
        raise ValueError(
            f"rename_columns gives the columns {old_names} the same name {duplicate!r}; use different names"
        )
