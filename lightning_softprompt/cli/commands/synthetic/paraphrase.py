"""`softprompt paraphrase`: paraphrases of a column by the frozen model, for the augmentation `Paraphrases`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_softprompt.cli.commands.synthetic.class_options import join_class_options
from lightning_softprompt.reports.text_table import table
from lightning_softprompt.system.errors import CommandError

if TYPE_CHECKING:
    from collections import Counter

    from lightning_softprompt.synthetic.paraphrasing import ParaphrasePlan

DESCRIPTION = """\
Write paraphrases of the texts of a column with the frozen model, and reject those that are unfinished, too long or too
short, too similar to the text or too different from it, or that make the answer of the row less likely. Small models
write few useful paraphrases: the command reports the share that was rejected, by reason. If it is interrupted, start it
again: it continues the file.

  softprompt paraphrase data/dolly paraphrases.jsonl --column instruction --answer output --limit 200
  softprompt fit --model PromptTuning --data configs/data/dolly.yaml \\
      --data.augment Paraphrases --data.augment.path paraphrases.jsonl
"""
EPILOG = """\
Other options: --filter.OPTION, such as --filter.max_drop 0.3, --filter.min_cosine 0.7, or --filter.low_length and
high_length, low_overlap and high_overlap; --decoding.OPTION (default: sampling with top_p 0.9 and at most 64 tokens);
--backbone.OPTION, such as --backbone.name FOLDER.
"""


def parser() -> ArgumentParser:
    """The command's arguments."""
    form: dict[str, Any] = {"formatter_class": RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = ArgumentParser("softprompt paraphrase", description=DESCRIPTION, epilog=EPILOG, **form)
    parser.add_argument(
        "rows", metavar="IN", help="the rows: a file, a folder with a file of each split, or a data set"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the file of paraphrases, in JSON lines")
    parser.add_argument("--column", default="instruction", help="column of the texts (default: instruction)")
    parser.add_argument("--answer", metavar="COLUMN", help="column of the answers, whose likelihood is compared")
    parser.add_argument("--split", default="train", help="split of the rows, if IN is a folder (default: train)")
    parser.add_argument("--count", type=int, default=4, metavar="N", help="paraphrases of each text before the filter "
                        "(default: 4)")  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N texts")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling (default: 0)")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="texts at once (default: 8)")
    parser.add_argument("--frame", metavar="TEXT", help="the template around an instruction, with {instruction} and "
                        "{target} (default: a turn of the packaged model)")  # fmt: skip
    parser.add_argument("--max_tokens", type=int, default=512, metavar="N",
                        help="maximum tokens of an instruction and its answer (default: 512)")  # fmt: skip
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args, class_options = parser().parse_known_args(join_class_options(argv))
    from lightning_softprompt.backbones.generation.decoding import Decoding
    from lightning_softprompt.cli.commands.synthetic.class_arguments import ClassParser, parse_classes
    from lightning_softprompt.core.backbone_spec import BackboneSpec
    from lightning_softprompt.synthetic.paraphrasing import ParaphraseFilter

    classes = ClassParser(prog="softprompt paraphrase", exit_on_error=False)
    classes.add_class_arguments(ParaphraseFilter, "filter")
    classes.add_class_arguments(Decoding, "decoding")
    classes.add_class_arguments(BackboneSpec, "backbone")
    classes.set_defaults({"decoding.do_sample": True, "decoding.top_p": 0.9, "decoding.max_new_tokens": 64})
    try:
        return _write(args, parse_classes(classes, class_options))
    except ValueError as error:
        raise CommandError(str(error)) from error


def _write(args: Any, objects: Any) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from lightning_softprompt.synthetic.generator import CHAT_FRAME, Generator
    from lightning_softprompt.synthetic.paraphrasing import write_paraphrases

    plan = _read_plan(args, objects.filter)
    frame = (args.frame or CHAT_FRAME).replace("\\n", "\n")
    generator = Generator(objects.backbone, objects.decoding, None, frame, args.max_tokens)
    columns = (TextColumn("Paraphrasing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("texts", total=len(plan.texts))
        counts = write_paraphrases(
            plan, generator, args.out, lambda complete: progress.update(task, completed=complete)
        )
    print(_format_counts(counts))
    print(f"\nWrote {counts['accepted']} paraphrases of {len(plan.texts)} texts: {args.out}")
    if not counts["accepted"]:
        raise CommandError("every paraphrase was rejected, for the reasons above; --filter.OPTION changes the limits")
    return 0


def _read_plan(args: Any, paraphrase_filter: Any) -> ParaphrasePlan:
    from lightning_softprompt.data.readers.sources import read_rows
    from lightning_softprompt.synthetic.paraphrasing import ParaphrasePlan

    answers: dict[str, str] = {}
    for row in read_rows(args.rows, args.split):
        for column in filter(None, (args.column, args.answer)):
            if not isinstance(row.get(column), str):
                raise ValueError(f"{column!r} is not a column of text; the row has {', '.join(map(str, row))}")
        text = row[args.column].strip()
        if text:
            answers.setdefault(text, row[args.answer].strip() if args.answer else "")
    texts = list(answers)[: args.limit]
    text_answers = [answers[text] for text in texts]
    return ParaphrasePlan(texts, text_answers, args.count, paraphrase_filter, args.seed, batch_size=args.batch_size)


def _format_counts(counts: Counter[str]) -> str:
    """Formats the number of paraphrases by reason of rejection, the accepted ones first."""
    rejected = {reason: count for reason, count in counts.most_common() if reason != "accepted"}
    cells = []
    for name, count in {"accepted": counts["accepted"], **rejected}.items():
        cells.append([name, str(count), f"{count / max(1, counts.total()):.1%}"])
    return table(cells, ["paraphrases", "count", "share"])
