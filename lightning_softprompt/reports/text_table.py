"""Text tables with aligned columns, for a terminal or a pipe. This module imports no other library."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from itertools import zip_longest

from lightning_softprompt.system.printable import printable

GAP = "  "
NARROWEST = 10  # no column becomes narrower; a line longer than the terminal is easier to read


def terminal_width() -> int:
    """Returns the columns of the terminal or of the variable `COLUMNS`; 120 in a pipe."""
    return shutil.get_terminal_size((120, 24)).columns


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), width: int | None = None) -> str:
    """Returns rows as aligned columns, with cells wrapped so that each line fits.

    The first column keeps its width, because users copy it; the widest of the others are narrowed.

    Args:
        rows: Cells, the same number in each row.
        header: Names of the columns, underlined; no header if empty.
        width: Characters per line; None for the width of the terminal.

    >>> print(table([["DePT", "A short prompt and a shift"], ["XPrompt", "Pruned"]], ["name", "what"], width=24))
    name     what
    -------  ---------------
    DePT     A short prompt
             and a shift
    XPrompt  Pruned
    """
    all_rows = [header, *rows] if header else rows
    cells = [[printable(cell) for cell in row] for row in all_rows]
    if not cells:
        return ""
    columns = zip(*cells, strict=True)
    widths = _fit([max(map(len, column)) for column in columns], width or terminal_width())
    blocks = [_wrap_row(row, widths) for row in cells]
    if header:
        blocks.insert(1, [GAP.join("-" * width for width in widths)])
    return "\n".join(line for block in blocks for line in block)


def _fit(widths: list[int], room: int) -> list[int]:
    """Narrows the widest columns until they fit, except the first one."""
    room -= len(GAP) * (len(widths) - 1)
    while sum(widths) > room:
        widest = max(range(1, len(widths)), key=widths.__getitem__, default=0)
        if widest == 0 or widths[widest] <= NARROWEST:
            break
        widths[widest] -= 1
    return widths


def _wrap_row(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Returns the lines of a row."""
    cells = [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widths, strict=True)]
    lines = []
    for parts in zip_longest(*cells, fillvalue=""):
        padded = [part.ljust(width) for part, width in zip(parts, widths, strict=True)]
        lines.append(GAP.join(padded).rstrip())
    return lines
