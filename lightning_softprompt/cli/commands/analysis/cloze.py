"""`softprompt cloze`: questions about rare terms of held-out documents."""

from __future__ import annotations

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from lightning_softprompt.cli.next_steps import command_line, suggest
from lightning_softprompt.system.errors import CommandError

DESCRIPTION = """\
Draw questions about rare terms of the held-out documents of a corpus, and write them as JSON lines with the columns
left, term, right and distractors. A rare term occurs 5 to 50 times in the training documents and never in data.corpora,
and has at least two tokens. Its nine distractors are equally frequent and have as many tokens.

A test with the same option and --data.cloze FILE asks the questions. Models with different tokenizers need the same
file; for one tokenizer, --data.cloze 200 draws the same questions without a file.

  softprompt cloze questions.jsonl --data CorpusDataModule --data.path medical.txt \\
      --data.corpora '{general: wikitext.txt}'
  softprompt test --model NoPrompt --data CorpusDataModule --data.path medical.txt --data.cloze questions.jsonl
"""


def parser() -> ArgumentParser:
    """The command's own arguments."""
    parser = ArgumentParser(
        "softprompt cloze",
        usage="softprompt cloze FILE [--count N] TEST_OPTIONS",
        description=DESCRIPTION,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="file to write, which must not exist")
    parser.add_argument("--count", type=int, default=200, metavar="N", help="maximum questions (default: 200)")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args, test_options = parser().parse_known_args(argv)
    if args.count < 1:
        raise CommandError(f"--count must be at least 1, got {args.count}")
    if args.file.exists():
        raise CommandError(f"{args.file} exists; delete it, or name another file")
    from lightning_softprompt.cli.dry_parse import parse_run
    from lightning_softprompt.data.corpus.cloze import to_row
    from lightning_softprompt.data.corpus.datamodule import CorpusDataModule
    from lightning_softprompt.system.atomic_files import write_file

    has_method = any(option.partition("=")[0] == "--model" for option in test_options)
    data = parse_run(["test", *([] if has_method else ["--model=NoPrompt"]), *test_options]).data
    if not isinstance(data, CorpusDataModule):
        raise CommandError(f"softprompt cloze requires --data CorpusDataModule, got {type(data).__name__}")
    try:
        questions = data.draw_cloze(args.count)
    except ValueError as error:
        raise CommandError(str(error)) from error
    lines = [json.dumps(to_row(question), ensure_ascii=False) for question in questions]
    write_file(args.file, "".join(f"{line}\n" for line in lines).encode())
    terms = {question.term for question in questions}
    print(f"Wrote {len(questions)} questions about {len(terms)} terms to {args.file}")
    suggest(command_line("test", *test_options, "--data.cloze", args.file))
    return 0
