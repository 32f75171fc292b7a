"""`softprompt wordings`: a trained prompt on templates and paraphrases that its training did not use."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lightning_softprompt.reports.text_table import table
from lightning_softprompt.system.errors import CommandError

if TYPE_CHECKING:
    from lightning_softprompt.cli.dry_parse import ParsedRun
    from lightning_softprompt.inference.wording_test import WordingScore

DESCRIPTION = """\
Measure whether a prompt depends on the wording of its training: the loss of the test rows, and their accuracy if they
have classes, in the templates of the training and in others. The difference is paired by row, with a 95 % bootstrap
interval over rows.

  softprompt wordings runs/default/TIME-ID/prompt.safetensors --unseen unseen.txt
  softprompt wordings PROMPT --paraphrases paraphrases.jsonl --column instruction

A file of templates has one template per line, with \\n for a line break. The templates of the training are those of the
augmentation Templates in its config, or else the template of the data module.
"""


def parser() -> ArgumentParser:
    """The command's own arguments."""
    parser = ArgumentParser(
        "softprompt wordings", usage="softprompt wordings PROMPT [OPTIONS] [VALIDATE_OPTIONS]",
        description=DESCRIPTION, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("prompt", type=Path, metavar="PROMPT", help="prompt.safetensors or checkpoint of a run")
    parser.add_argument("--seen", type=Path, metavar="FILE", help="templates of the training (default: of its config)")
    parser.add_argument("--unseen", type=Path, metavar="FILE", help="templates that the training did not use")
    parser.add_argument("--paraphrases", type=Path, metavar="FILE",
                        help="paraphrases of test rows, as softprompt paraphrase --split test writes them")  # fmt: skip
    parser.add_argument("--column", default="instruction", help="column of the paraphrases (default: instruction)")
    parser.add_argument("--rows", type=int, metavar="N", help="only the first N test rows")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args, options = parser().parse_known_args(argv)
    if (args.unseen is None) == (args.paraphrases is None):
        raise CommandError("set --unseen to a file of templates, or --paraphrases to a file of paraphrases")
    from lightning_softprompt.checkpoints.prompt_file import read_prompt
    from lightning_softprompt.cli.dry_parse import parse_validation

    try:
        saved = read_prompt(args.prompt)
        run = parse_validation(args.prompt, options)
        saved.check(run.module.loaded, args.prompt)
        run.module.load_state_dict(saved.tensors)
        scores = _compare(args, run)
    except ValueError as error:
        raise CommandError(str(error)) from error
    print(format_scores(scores, args.json))
    return 0


def _compare(args: Namespace, run: ParsedRun) -> list[WordingScore]:
    """Measures the wordings that the options name."""
    from lightning_softprompt.data.augmentation.paraphrases import Paraphrases
    from lightning_softprompt.inference.wording_test import (
        check_wordings,
        compare_wordings,
        use_paraphrase,
        use_template,
    )

    text = run.data.row_text
    seen = read_templates(args.seen) if args.seen else _training_templates(run)
    unseen = read_templates(args.unseen) if args.unseen else []
    check_wordings(text, [*seen, *unseen])
    if repeated := sorted(set(seen) & set(unseen)):
        raise ValueError(f"templates of the training are no unseen ones: {repeated}")
    known = [use_template(template) for template in seen] or [lambda draft: draft]
    others = [use_template(template) for template in unseen]
    if args.paraphrases is not None:
        augmentation = Paraphrases(str(args.paraphrases), args.column)
        augmentation.check(text)
        most = max(map(len, augmentation.by_text.values()))
        others = [use_paraphrase(args.column, augmentation.by_text, number) for number in range(most)]
    return compare_wordings(run.module, run.data, known, others, args.rows)


def _training_templates(run: ParsedRun) -> list[str]:
    """The templates of the augmentation of the training; none if it used only that of the data module."""
    templates: list[str] = []
    for augmentation in run.data.augmentations:
        templates += getattr(augmentation, "templates", ())
    return templates


def read_templates(path: Path) -> list[str]:
    r"""Returns the templates in a file, one per line; `\n` is a line break.

    Raises:
        ValueError: If there are none.
    """
    lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    templates = [line.replace("\\n", "\n") for line in lines if line.strip()]
    if not templates:
        raise ValueError(f"{path} has no templates")
    return templates


def format_scores(scores: list[WordingScore], as_json: bool) -> str:
    """Formats the scores as a table, or as JSON."""
    values: list[dict[str, Any]] = []
    for score in scores:
        low, high = score.interval
        means = {"seen": fmean(score.seen), "unseen": fmean(score.unseen)}
        change = {"difference": score.difference, "low": low, "high": high}
        values.append({"metric": score.metric, "rows": len(score.seen), **means, **change})
    if as_json:
        return json.dumps(values, indent=2)
    cells = []
    for value in values:
        cells.append([value["metric"], str(value["rows"])])
        cells[-1] += [f"{value[name]:.4f}" for name in ("seen", "unseen")]
        signed = [f"{value[name]:+.4f}" for name in ("difference", "low", "high")]
        cells[-1] += [signed[0], f"[{signed[1]}, {signed[2]}]"]
    return table(cells, ["metric", "rows", "seen", "unseen", "difference", "95 % interval"])
