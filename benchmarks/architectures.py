"""Runs every check of `tests/architecture_table.py` on every architecture and writes `docs/architectures.md`.

    python benchmarks/architectures.py [NAME ...]

With names, only their rows of the table change.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOME / "tests"))

import torch  # noqa: E402
from architecture_checks import EQUAL, REFUSED, Result, run  # noqa: E402
from architecture_table import COLUMNS, read, write  # noqa: E402
from architectures import NotSmallError, architectures  # noqa: E402
from transformers.utils.logging import set_verbosity_error  # noqa: E402

TABLE = HOME / "docs" / "architectures.md"


def main(names: list[str]) -> int:
    """Runs the architectures of these names, or all; the exit code is 1 if any is neither equal nor refused."""
    warnings.simplefilter("ignore")
    set_verbosity_error()
    torch.set_num_threads(1)
    every = architectures()
    table = read(TABLE) if names else {}
    failed = 0
    for name in names or every:
        with tempfile.TemporaryDirectory() as folder:
            try:
                table[name] = run(every[name], Path(folder), COLUMNS)
            except NotSmallError as reason:
                table[name] = {"load": Result("not built", str(reason))}
                continue
        differences = {check: result for check, result in table[name].items() if result.verdict != EQUAL}
        failed += any(result.verdict != REFUSED for result in differences.values())
        for check, result in differences.items():
            print(f"{name}: {check}: {result.verdict}: {result.reason}", flush=True)
        if not differences:
            print(f"{name}: equal", flush=True)
    write(TABLE, table, list(COLUMNS))
    print(f"{len(names or every)} architectures, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
