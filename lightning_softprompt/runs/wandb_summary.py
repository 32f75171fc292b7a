"""The summary of a W&B run that several commands log to.

On upload, a part that was recorded offline replaces the summary of the run on W&B. It would lose the values of earlier
parts, so a part starts with their summary, which the folder of an earlier part has.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_softprompt.system.atomic_files import write_file

if TYPE_CHECKING:
    from wandb import Run

log = logging.getLogger(__name__)
FILE = Path("wandb", "summary.json")


def save_summary(run: Run, folders: Collection[Path]) -> None:
    """Save the summary of a run for later parts; a failure is only logged.

    Args:
        run: The W&B run.
        folders: Folders of runs of this package that log to the W&B run.
    """
    summary: dict[str, Any] = run.summary._as_dict()
    values = {name: value for name, value in summary.items() if not name.startswith("_")}  # the others belong to W&B
    for folder in folders:
        try:
            write_file(folder / FILE, json.dumps(values).encode())
        except (OSError, TypeError, ValueError) as error:
            log.debug("could not save the summary of the W&B run in %s: %s", folder, error)


def restore_summary(run: Run, folder: Path) -> None:
    """Set the summary of a run to that of its earlier parts, if the folder of an earlier part has it.

    Args:
        run: The W&B run, recorded offline. Online, W&B itself restores the summary.
        folder: Folder of an earlier part.
    """
    try:
        values = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError, RecursionError):  # an earlier version wrote none, or it was edited
        return
    if isinstance(values, dict):
        run.summary.update(values)
