"""`softprompt constraints`: write prompts with verifiable constraints."""

from __future__ import annotations

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from lightning_softprompt.cli.next_steps import command_line, suggest
from lightning_softprompt.system.errors import CommandError

DESCRIPTION = """\
Write prompts that ask for properties which a program can check. Each of N random questions is combined with each of ten
constraints: a number of words, sentences or bullet points, lower case, no commas, required and forbidden words, a
required end, JSON, two answers, and the question repeated. The file has one JSON object per line with the columns
`prompt`, `answer` (the reference answer), `constraints`, `question` and `source`.

  softprompt constraints data/dolly/test.jsonl constraints.jsonl
  softprompt test --model NoPrompt --data configs/data/constraints.yaml --data.test constraints.jsonl
"""


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        "softprompt constraints", description=DESCRIPTION, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", metavar="QUESTIONS", help="rows of questions with reference answers")
    parser.add_argument("out", type=Path, metavar="OUT", help="the file of prompts, in JSON lines")
    parser.add_argument("--count", type=int, default=30, metavar="N", help="number of questions (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice and of the constraints (default: 0)")
    parser.add_argument("--question", default="instruction", help="column of the question (default: instruction)")
    parser.add_argument("--answer", default="output", help="column of the reference answer (default: output)")
    parser.add_argument(
        "--context", default="input", help="column of a text that the question refers to; rows with one are left out"
    )
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    from lightning_softprompt.constraints.prompts import Question, make_prompts
    from lightning_softprompt.data.readers.sources import read_rows
    from lightning_softprompt.system.atomic_files import write_file

    try:
        rows = read_rows(args.questions)
        questions = []
        for number, row in enumerate(rows):
            missing = [name for name in (args.question, args.answer) if not isinstance(row.get(name), str)]
            if missing:
                raise CommandError(
                    f"{rows.where(number)} has no text in the column {missing[0]!r}; its columns are {sorted(row)}: "
                    "set --question and --answer"
                )
            if not row.get(args.context):
                questions.append(Question(row[args.question], row[args.answer], rows.where(number)))
        prompts = list(make_prompts(questions, args.count, args.seed))
    except ValueError as error:
        raise CommandError(str(error)) from error
    lines = [f"{json.dumps(prompt, ensure_ascii=False)}\n" for prompt in prompts]
    write_file(args.out, "".join(lines).encode())
    print(f"Wrote {len(prompts)} prompts of {args.count} questions: {args.out}")
    suggest(
        command_line("test", "--model", "NoPrompt", "--data", "configs/data/constraints.yaml", "--data.test", args.out)
    )
    return 0
