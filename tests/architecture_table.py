"""The table of architectures in the documentation: written by a sweep, read by tests."""

from pathlib import Path

from architecture_checks import CHECKS, EQUAL, Result
from architecture_generation import GENERATION
from architecture_method_checks import METHODS

COLUMNS = {**CHECKS, **METHODS, **GENERATION}

HEAD = """# Architectures

Every language-model type of transformers that a small configuration can build, and variants that change how rows run.
Each check compares a tiny random model with plain transformers that runs one row at a time. `equal` means equal to
1e-5 (`bfloat16`: runs, with about the same loss). `refused` means a clear error before a run leaves anything on disk.
An architecture that is refused as a whole is refused when it is loaded.

| columns | what they compare |
|---|---|
| bare, short, long, text, padding, checkpoint | training and evaluation with soft tokens |
| prefix, late | keys and values before the rows, soft tokens at a middle layer |
| states, words | states for heads of classes and tags, scores of single words |
| recompute, prepacked, bfloat16 | options of the backbone |
| memory | the estimate of `softprompt estimate` |
| generate, beams, conversation | generation of batches against single rows |

`python benchmarks/architectures.py` writes this page.
"""


def write(path: Path, table, checks) -> None:
    """Write the table with one row for each architecture."""
    loaded = {name: results for name, results in sorted(table.items()) if "load" not in results}
    not_loaded = {name: results["load"] for name, results in sorted(table.items()) if "load" in results}
    lines = [HEAD, "## Loaded", "", f"| architecture | {' | '.join(checks)} |", "|---" * (len(checks) + 1) + "|"]
    for name, results in loaded.items():
        verdicts = [results.get(check, Result("-")).verdict for check in checks]
        lines.append(f"| {name} | {' | '.join(verdicts)} |")
    lines += ["", "## Reasons", "", "| architecture | check | result | reason |", "|---|---|---|---|"]
    for name, results in loaded.items():
        for check, result in results.items():
            if result.verdict != EQUAL:
                lines.append(f"| {name} | {check} | {result.verdict} | {_cell(result.reason)} |")
    lines += ["", "## Not loaded", "", "| architecture | result | reason |", "|---|---|---|"]
    for name, result in not_loaded.items():
        lines.append(f"| {name} | {result.verdict} | {_cell(result.reason)} |")
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def read(path: Path):
    """Return the results by architecture and check."""
    sections = path.read_text().split("\n## ") if path.is_file() else []
    rows = {section.splitlines()[0]: _rows(section) for section in sections[1:]}
    if not rows:
        return {}
    checks = rows["Loaded"][0][1:]
    table = {}
    for name, *verdicts in rows["Loaded"][1:]:
        table[name] = dict(zip(checks, map(Result, verdicts), strict=True))
    for name, check, verdict, reason in rows["Reasons"][1:]:
        table[name][check] = Result(verdict, reason)
    return table | {name: {"load": Result(verdict, reason)} for name, verdict, reason in rows["Not loaded"][1:]}


def _rows(section):
    lines = [line for line in section.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def _cell(text):
    return " ".join(text.replace("|", "/").split())
