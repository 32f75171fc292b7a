"""Checkpoints that are on the disk whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, final

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO


@final
class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the checkpoint, and renames once the disk has it.

    Lightning writes to the machine's temporary folder and moves the file from there, which is a copy where that is
    another disk: a run that is killed then leaves half of it in the place of the last good one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """See `CheckpointIO`; paths of object stores are Lightning's business.

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
            if not isinstance(cause, OSError):  # torch reports a full disk by an error of its own
                raise
            raise OSError(cause.errno, cause.strerror or str(cause), str(file)) from error
        finally:
            part.unlink(missing_ok=True)
