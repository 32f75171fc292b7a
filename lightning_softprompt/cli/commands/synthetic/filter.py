"""`softprompt filter`: select among rows, and report how many rows each filter dropped."""

from __future__ import annotations

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_softprompt.reports.text_table import table
from lightning_softprompt.system.errors import CommandError

if TYPE_CHECKING:
    from lightning_softprompt.synthetic.filtering import FilterResult
    from lightning_softprompt.synthetic.filters.base import Row

DESCRIPTION = """\
Select among rows with filters, which are applied in their order. The rows that pass are written to OUT, the others to
OUT with the ending .dropped.jsonl, each with its filter and the reason, and the counts to OUT with the ending
.report.json.

Filters, each with its options as {class_path: NAME, init_args: {OPTION: VALUE}}, or only its name:
  Length          bounds on the number of words                               low, high
  Unfinished      texts that reached the limit of tokens                      punctuation
  Duplicates      texts with equal words
  NearDuplicates  texts with similar character n-grams                        similarity, ngram
  LeakedWords     texts that contain words of the label or the instruction    words
  Score           bounds on a score of the writer, such as round_trip_f1      name, low, high
  Agreement       rows whose label a classifier does not predict              prompt, or template and labels
  Likelihood      rows of the lowest and the highest log-probability          low, high
  Overlap         texts that share 8 words in sequence with a test row        path, words
  Balance         surplus rows of frequent classes; use it last               most, seed

  softprompt filter reviews.jsonl selected.jsonl --filters '[Unfinished, Duplicates,
      {class_path: Length, init_args: {low: 4, high: 60}}, Balance]'
"""


def parser() -> ArgumentParser:
    """The command's arguments."""
    form: dict[str, Any] = {"formatter_class": RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = ArgumentParser("softprompt filter", description=DESCRIPTION, **form)
    parser.add_argument("rows", metavar="IN", help="the rows, such as a file that `softprompt write` wrote")
    parser.add_argument("out", type=Path, metavar="OUT", help="the file of rows that pass, in JSON lines")
    parser.add_argument("--filters", metavar="LIST", required=True, help="the filters, in YAML")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    from lightning_softprompt.cli.commands.synthetic.class_arguments import ClassParser, parse_classes
    from lightning_softprompt.core.plugin_modules import import_modules
    from lightning_softprompt.data.readers.sources import read_rows
    from lightning_softprompt.synthetic.filtering import apply_filters
    from lightning_softprompt.synthetic.filters.base import Filter

    import_modules("lightning_softprompt.synthetic.filters")
    classes = ClassParser(prog="softprompt filter", exit_on_error=False)
    classes.add_argument("--filters", type=list[Filter], required=True)
    try:
        filters = parse_classes(classes, [f"--filters={args.filters}"]).filters
        rows = [dict(row) for row in read_rows(args.rows, "train")]
        result = apply_filters(rows, filters)
    except ValueError as error:
        raise CommandError(str(error)) from error
    _write_files(args.out, result)
    print(_format_counts(result))
    classes_of_rows = Counter(str(row["label"]) for row in result.rows if "label" in row)
    counts = ", ".join(f"{name} {count}" for name, count in sorted(classes_of_rows.items()))
    of_classes = f" ({counts})" if counts else ""
    print(f"\nWrote {len(result.rows)} of {len(rows)} rows{of_classes}: {args.out}")
    print(f"Dropped rows with their reasons: {dropped_path(args.out)}")
    if not result.rows:
        raise CommandError("no row passed the filters; the file of dropped rows contains the reasons")
    return 0


def dropped_path(out: Path) -> Path:
    """Returns the path of the dropped rows."""
    return out.with_suffix(".dropped.jsonl")


def report_path(out: Path) -> Path:
    """Returns the path of the counts."""
    return out.with_suffix(".report.json")


def _write_files(out: Path, result: FilterResult) -> None:
    from dataclasses import asdict

    from lightning_softprompt.system.atomic_files import write_file

    counts = [asdict(count) for count in result.counts]
    report = {"rows": len(result.rows), "dropped": len(result.dropped), "filters": counts}
    write_file(report_path(out), f"{json.dumps(report, indent=2)}\n".encode())
    write_file(dropped_path(out), _to_lines(result.dropped))
    write_file(out, _to_lines(result.rows))


def _to_lines(rows: Sequence[Row]) -> bytes:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()


def _format_counts(result: FilterResult) -> str:
    cells = []
    for count in result.counts:
        share = count.num_dropped / count.num_rows if count.num_rows else 0.0
        cells.append([count.name, str(count.num_rows), str(count.num_dropped), f"{share:.1%}"])
    return table(cells, ["filter", "rows", "dropped", "share"])
