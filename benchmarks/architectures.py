"""Runs every check of `tests/architecture_table.py` on every architecture and writes `docs/architectures.md`."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOME / "tests"))

import torch  # noqa: E402
from architecture_checks import EQUAL, REFUSED, Result, run  # noqa: E402
from architecture_table import COLUMNS, read, write  # noqa: E402
from transformers.utils.logging import set_verbosity_error  # noqa: E402

trials: Any = importlib.import_module("architectures")  # the module of this name in tests
TABLE = HOME / "docs" / "architectures.md"


def main() -> int:
    """Runs the architectures and returns the exit code: 1 if a check is neither equal nor refused."""
    every = trials.architectures()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures whose rows are updated (default: all)")
    names = parser.parse_args().names
    unknown = [name for name in names if name not in every]
    if unknown:
        parser.error(f"unknown architectures: {', '.join(unknown)}")
    warnings.simplefilter("ignore")
    set_verbosity_error()
    torch.set_num_threads(1)
    table = read(TABLE) if names else {}
    failed = 0
    for name in names or every:
        with tempfile.TemporaryDirectory() as folder:
            try:
                table[name] = run(every[name], Path(folder), COLUMNS)
            except trials.NotSmallError as reason:
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
    sys.exit(main())
