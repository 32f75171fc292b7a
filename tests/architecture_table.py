"""The table of architectures in the documentation: written by a sweep, read by tests."""

from pathlib import Path

from architecture_checks import CHECKS, EQUAL, Result
from architecture_generation import GENERATION
from architecture_method_checks import METHODS
from architectures import VARIANTS, Architecture

COLUMNS = {**CHECKS, **METHODS, **GENERATION}

HEAD = """# Architectures

This page lists every language-model type (`model_type`) of transformers that can be created from a small
configuration, and some variants of these types; the section "Variants" explains their names. Each check runs on a tiny
random model. It compares the results for a batch in this package with
the results for each row alone in plain transformers.

- `equal`: the results differ by at most 1e-5. In the column `bfloat16`: the model runs and has about the same loss.
- `refused`: the package raises an error before a run writes a file. The section "Reasons" has the error messages. In
  the column `bfloat16`, only this precision is refused. An architecture in the section "Not loaded" is refused as a
  whole when it is loaded.
- `not built`: transformers did not create the small model, so the architecture was not tested. The reason is the error
  of transformers.

| column | what is compared |
|---|---|
| bare | logits without a prompt |
| short, long | loss and gradient of soft tokens, on short rows and then on longer rows |
| text | soft tokens that have the embeddings of words, and the words themselves as input |
| padding | rows with more padding on either side, and a row alone |
| checkpoint | the fingerprints of two loads of the model, and a folded prompt with the original |
| prefix | loss and gradient of keys and values in every layer; in a decoder, also compared with soft tokens |
| late | hidden states inserted before a layer; a decoder must accept keys and values for this |
| states | hidden states for the readouts `ClassHead` and `TokenHead` |
| words | logits of label words |
| recompute, prepacked, bfloat16 | the options `checkpointing`, `linear_backend` and `dtype` of the backbone |
| memory | the estimate of `softprompt estimate` with the measured memory |
| generate, beams | answers of a batch by greedy search and by beam search, against those of single rows |
| conversation | the second turn of a conversation with a cache, against the complete text |

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
    lines += ["", "## Variants", "", "| architecture | type | changed options of its configuration |", "|---|---|---|"]
    for name, variant in VARIANTS.items():
        lines.append(f"| {name} | {variant.model_type} | {_options(variant)} |")
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


def _options(variant: Architecture) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in {**variant.more, **variant.generation}.items())


def _cell(text):
    return " ".join(text.replace("|", "/").split())
