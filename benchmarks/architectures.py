"""Runs every check of `tests/architecture_checks.py` on every architecture and writes `docs/architectures.md`.

    python benchmarks/architectures.py [--generation] [NAME ...]

With names, only their rows of the table change. With `--generation` it runs the checks of generation instead, and only
prints what they find.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOME / "tests"))

import torch  # noqa: E402
from architecture_checks import CHECKS, EQUAL, REFUSED, Result, run  # noqa: E402
from architecture_generation import GENERATION  # noqa: E402
from architecture_table import read, write  # noqa: E402
from architectures import NotSmallError, architectures  # noqa: E402
from transformers.utils.logging import set_verbosity_error  # noqa: E402

TABLE = HOME / "docs" / "architectures.md"


def main(names: list[str]) -> int:
    """Runs the architectures of these names, or all; the exit code is 1 if any is neither equal nor refused."""
    warnings.simplefilter("ignore")
    set_verbosity_error()
    torch.set_num_threads(1)
    every = architectures()
    checks = GENERATION if "--generation" in names else CHECKS
    names = [name for name in names if name != "--generation"]
    table = read(TABLE) if names and checks is CHECKS else {}
    failed = 0
    for name in names or every:
        with tempfile.TemporaryDirectory() as folder:
            try:
                table[name] = run(every[name], Path(folder), checks)
            except NotSmallError as reason:
                table[name] = {"load": Result("not built", str(reason))}
                continue
        bad = {check: result for check, result in table[name].items() if result.verdict not in (EQUAL, REFUSED)}
        failed += bool(bad)
        for check, result in table[name].items():
            if result.verdict != EQUAL:
                print(f"{name}: {check}: {result.verdict}: {result.reason}", flush=True)
        if not any(result.verdict != EQUAL for result in table[name].values()):
            print(f"{name}: equal", flush=True)
    if checks is CHECKS:
        write(TABLE, table, list(CHECKS))
    print(f"{len(names or every)} architectures, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
