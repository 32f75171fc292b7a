"""The folder from which clients with the admin token may load prompts. No other file can be reached."""

from __future__ import annotations

import stat
from pathlib import Path, PurePosixPath

from lightning_softprompt.serving.errors import RequestError, invalid

SUFFIX = ".safetensors"


class PromptFolder:
    """A folder of prompt files.

    Args:
        root: The folder.
        max_bytes: Largest file that is read.

    Raises:
        ValueError: If there is no such folder.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        if not root.is_dir():
            raise ValueError(f"{root} is not a folder")
        self.root = root.resolve()
        self.max_bytes = max_bytes

    def find(self, path: str) -> Path:
        """Returns the file with a path relative to the folder.

        Raises:
            RequestError: If the path leaves the folder, follows a link, or is not a prompt file.
        """
        parts = PurePosixPath(path).parts
        is_inside = bool(parts) and not path.startswith("/") and ".." not in parts
        if not is_inside or "\0" in path or "\\" in path or not path.endswith(SUFFIX):
            raise invalid(f"path must be a relative path of a {SUFFIX} file in the folder of the server", "path")
        current = self.root
        for part in parts:
            current = current / part
            self._refuse_link(current)
        status = current.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise invalid("path must be a regular file", "path")
        if status.st_size > self.max_bytes:
            raise RequestError(413, f"the file exceeds {self.max_bytes} bytes", "file_too_large", "path")
        return current

    def _refuse_link(self, path: Path) -> None:
        try:
            is_link = stat.S_ISLNK(path.lstat().st_mode)
        except (OSError, ValueError):  # also a name that is too long, or a file where a folder is expected
            raise RequestError(404, "the folder of the server has no such file", "file_not_found", "path") from None
        if is_link:
            raise invalid("path must not contain symbolic links", "path")
