"""Atomic writes of checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, final

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO


@final
class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file in the same folder, flushes it to disk and renames it.

    Lightning writes to the temporary folder of the machine and moves the file, which is a copy if that is another
    disk: a run that is killed then replaces the last good checkpoint with an incomplete one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """See `CheckpointIO`. Lightning handles paths of object stores.

        Raises:
            OSError: If the file cannot be written, naming it.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.part")
        try:
            with part.open("wb") as opened:
                torch.save(checkpoint, opened)
                opened.flush()
                os.fsync(opened.fileno())
            part.replace(file)
        except (OSError, RuntimeError) as error:
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):  # torch wraps the error of a full disk
                raise
            raise OSError(cause.errno, cause.strerror or str(cause), str(file)) from error
        finally:
            part.unlink(missing_ok=True)
