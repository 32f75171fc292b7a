"""Aligned text in columns, for a terminal and for a pipe; plain strings, so that nothing has to be imported for it."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from itertools import zip_longest

from lightning_softprompt.system.printable import printable

GAP = "  "
NARROWEST = 10  # no column is squeezed further; a line that is longer than the terminal still reads better


def terminal_width() -> int:
    """Columns of the terminal, or of `COLUMNS`; 120 in a pipe."""
    return shutil.get_terminal_size((120, 24)).columns


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), width: int | None = None) -> str:
    """Rows as aligned columns, cells wrapped so that a line fits.

    The first column keeps its width, since it holds what is typed; the widest of the others give way.

    Args:
        rows: The cells, the same number in each row.
        header: Names of the columns, underlined; none if empty.
        width: Characters in a line; the terminal's if None.

    >>> print(table([["DePT", "A short prompt and a shift"], ["XPrompt", "Pruned"]], ["name", "what"], width=24))
    name     what
    -------  ---------------
    DePT     A short prompt
             and a shift
    XPrompt  Pruned
    """
    cells = [[printable(cell) for cell in row] for row in ([header, *rows] if header else rows)]
    if not cells:
        return ""
    widths = _fit([max(map(len, column)) for column in zip(*cells, strict=True)], width or terminal_width())
    lines = [_lines(row, widths) for row in cells]
    if header:
        lines.insert(1, ["  ".join("-" * size for size in widths)])
    return "\n".join(line for block in lines for line in block)


def _fit(widths: list[int], room: int) -> list[int]:
    room -= len(GAP) * (len(widths) - 1)
    while sum(widths) > room:
        widest = max(range(1, len(widths)), key=widths.__getitem__, default=0)
        if widest == 0 or widths[widest] <= NARROWEST:
            break
        widths[widest] -= 1
    return widths


def _lines(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    wrapped = [textwrap.wrap(cell, size) or [""] for cell, size in zip(row, widths, strict=True)]
    return [
        GAP.join(part.ljust(size) for part, size in zip(parts, widths, strict=True)).rstrip()
        for parts in zip_longest(*wrapped, fillvalue="")
    ]
