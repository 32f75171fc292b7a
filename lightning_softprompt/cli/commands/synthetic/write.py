"""`softprompt write`: rows that the frozen model writes."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_softprompt.cli.commands.synthetic.class_options import join_class_options
from lightning_softprompt.cli.next_steps import command_line, suggest
from lightning_softprompt.system.errors import CommandError

if TYPE_CHECKING:
    from lightning_softprompt.synthetic.writers.base import Source

DESCRIPTION = """\
Write rows with the frozen model. OUT is a file of JSON lines; each row contains its origin: the model, the prompt, the
seed and the source row. If the command is interrupted, start it again: it continues the file.

Writers (options of a writer: softprompt write --writer.help NAME):
  LabelText       texts of given classes
  KeywordText     texts that contain keywords of source rows, and optionally summaries of them
  QuestionAnswer  questions and answers from documents, answered twice as a check
  SelfInstruct    new instructions and answers, after examples of instructions
  PromptText      texts of a trained prompt (--prompt)

  softprompt write reviews.jsonl --writer LabelText --writer.labels '{negative: bad, positive: good}' \\
      --writer.instruction 'Write one sentence of a {label} movie review.' --count 200 \\
      --decoding.do_sample true --decoding.top_p 0.9 --decoding.max_new_tokens 40
  softprompt filter reviews.jsonl selected.jsonl --filters '[Unfinished, Duplicates, Balance]'
"""
EPILOG = """\
Other options: --decoding.OPTION (default: sampling with top_p 0.9), such as --decoding.temperature 0.7;
--backbone.OPTION, such as --backbone.name FOLDER, the model that writes.
"""


def parser() -> ArgumentParser:
    """The command's arguments."""
    form: dict[str, Any] = {"formatter_class": RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = ArgumentParser("softprompt write", description=DESCRIPTION, epilog=EPILOG, **form)
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT", help="the file of rows, in JSON lines")
    parser.add_argument("--writer", metavar="NAME", help="the writer")
    parser.add_argument("--count", type=int, default=100, metavar="N", help="number of rows (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all choices and of sampling (default: 0)")
    parser.add_argument("--source", metavar="ROWS", help="file of source rows, such as documents")
    parser.add_argument("--split", default="train", help="split of the source, if it is a folder (default: train)")
    parser.add_argument("--prompt", type=Path, metavar="FILE", help="a trained prompt that writes")
    parser.add_argument("--frame", metavar="TEXT", help="the template around an instruction, with {instruction} and "
                        "{target} (default: a turn of the packaged model)")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="rows at once (default: 32)")
    parser.add_argument("--max_tokens", type=int, default=512, metavar="N",
                        help="maximum tokens of an instruction and its answer (default: 512)")  # fmt: skip
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args, class_options = parser().parse_known_args(join_class_options(argv))
    from lightning_softprompt.backbones.generation.decoding import Decoding
    from lightning_softprompt.cli.commands.synthetic.class_arguments import ClassParser, parse_classes
    from lightning_softprompt.core.backbone_spec import BackboneSpec
    from lightning_softprompt.core.plugin_modules import import_modules
    from lightning_softprompt.synthetic.writers.base import Writer

    import_modules("lightning_softprompt.synthetic.writers")
    classes = ClassParser(prog="softprompt write", exit_on_error=False)
    classes.add_subclass_arguments(Writer, "writer", required=True)
    classes.add_class_arguments(Decoding, "decoding")
    classes.add_class_arguments(BackboneSpec, "backbone")
    classes.set_defaults({"decoding.do_sample": True, "decoding.top_p": 0.9})
    writer_option = [f"--writer={args.writer}"] if args.writer else []
    if args.out is None and not any(option.startswith("--writer.help") for option in class_options):
        raise CommandError("name the file of rows: softprompt write OUT --writer NAME")
    try:
        objects = parse_classes(classes, [*writer_option, *class_options])
        return _write(args, objects)
    except ValueError as error:
        raise CommandError(str(error)) from error


def _write(args: Any, objects: Any) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from lightning_softprompt.synthetic.generator import CHAT_FRAME, Generator
    from lightning_softprompt.synthetic.writing import WritingPlan, write_rows

    source = _read_source(args)
    plan = WritingPlan(objects.writer, args.count, args.seed, args.batch_size, source)
    frame = (args.frame or CHAT_FRAME).replace("\\n", "\n")
    generator = Generator(objects.backbone, objects.decoding, args.prompt, frame, args.max_tokens)
    columns = (TextColumn("Writing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("rows", total=args.count)
        num_before = write_rows(plan, generator, args.out, lambda complete: progress.update(task, completed=complete))
    continued = f" ({num_before} of them before the interruption)" if num_before else ""
    print(f"Wrote {args.count} rows{continued}: {args.out}")
    suggest(command_line("filter", args.out, args.out.with_suffix(".selected.jsonl"), "--filters", "[Unfinished]"))
    return 0


def _read_source(args: Any) -> Source:
    from lightning_softprompt.data.readers.sources import read_rows
    from lightning_softprompt.synthetic.writers.base import Source

    if args.source is None:
        return Source()
    rows = read_rows(args.source, args.split)
    return Source(list(rows), [rows.where(index) for index in range(len(rows))])
