"""How commands print Python warnings: one line each, without the source line, and with control characters escaped."""

from __future__ import annotations

import sys
from typing import Any

from lightning_softprompt.system.printable import one_line


def format_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> str:
    r"""Format a warning as one line; the signature is that of `warnings.formatwarning`.

    >>> format_warning("a.b is now a.c", FutureWarning, "file.py", 1)
    'FutureWarning: a.b is now a.c\n'
    """
    return f"{category.__name__}: {one_line(message)}\n"


def show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Print a warning as one line; the signature is that of `warnings.showwarning`."""
    sys.stderr.write(format_warning(message, category))
