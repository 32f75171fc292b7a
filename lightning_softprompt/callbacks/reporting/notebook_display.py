"""Progress bars in notebooks: one output that is replaced, without widgets, so that it is saved with the notebook."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lightning.pytorch.callbacks.progress.rich_progress import CustomProgress
from rich.live import Live


class NotebookProgress(CustomProgress):
    """Progress bars as an output of the current cell.

    The display of rich uses `ipywidgets` in notebooks, which may be missing and whose outputs are not saved.

    Args:
        columns: The columns of a bar.
        options: Arguments of rich's `Progress`.
    """

    def __init__(self, *columns: Any, **options: Any) -> None:
        super().__init__(*columns, **options)
        self.live = NotebookDisplay(self, refresh_per_second=self.live.refresh_per_second)


class NotebookDisplay(Live):
    """Shows progress bars as an output of the current cell, and replaces this output at each refresh.

    Args:
        progress: The progress bars.
        refresh_per_second: Refreshes per second.
    """

    def __init__(self, progress: NotebookProgress, refresh_per_second: float) -> None:
        super().__init__(console=progress.console, refresh_per_second=refresh_per_second)
        self._progress = progress
        self._handle: Any = None  # of the output

    def start(self, refresh: bool = False) -> None:
        """Starts the display. The notebook itself shows what is printed in the meantime."""
        self._started = True

    def stop(self) -> None:
        """Shows the final state."""
        with self._lock:
            if self._started:
                self.refresh()
            self._started = False

    def refresh(self) -> None:
        """Replaces the output by the current state."""
        with self._lock:
            if not any(task.visible for task in self._progress.tasks):
                return
            if self._handle is None:
                show = import_module("IPython.display").display
                self._handle = show(self._progress, display_id=True)
            else:
                self._handle.update(self._progress)
