"""`softprompt explain`: what each passage of a question-answering test does to the answers."""

from __future__ import annotations

import json
import random
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_softprompt import __version__
from lightning_softprompt.cli.commands.analysis.analyze import describe_test, read_run
from lightning_softprompt.reports.text_table import table
from lightning_softprompt.system.atomic_files import write_file
from lightning_softprompt.system.errors import CommandError

if TYPE_CHECKING:
    from lightning_softprompt.analysis.explanation import Explanation
    from lightning_softprompt.analysis.passage_effects import HeadMasses, PassageEffects
    from lightning_softprompt.cli.dry_parse import ParsedRun
    from lightning_softprompt.rag.qa_datamodule import RagQaDataModule
    from lightning_softprompt.reports.error_types import AnsweredRow

ROWS, SUMMARY, PAGE = "explain.jsonl", "explain.json", "explain.html"
SEED = 0  # of the sample of rows
SECONDS_BETWEEN_LINES = 30  # of the progress, if the output is not a terminal
SUBSETS_ON_CPU, SUBSETS_ON_GPU = 2, 8  # of passages that run together; on a CPU, pairs share most and are the fastest
DESCRIPTION = """\
Measure what each retrieved passage does to the answers of a test: the passages are left out in all combinations, and
the probability of the generated answer and of the right answer is computed for each. Writes explain.html, explain.json
and explain.jsonl to the folder of the test.

  softprompt explain runs/rag/20261128-101500-a1b2              20 random rows of the test
  softprompt explain RUN --row 3 --row 17                       some rows
  softprompt explain RUN --rows 100 --baseline RUN2             differences from another test, such as of NoPrompt

use     share of rows in which the passage with the largest effect on the answer is relevant
leak    mean effect of the passages that are not relevant; above 0 if the answer is taken from them

It accepts the options of `softprompt test`, such as --trainer.accelerator cpu. Rows of up to 6 passages have exact
Shapley values, which require 2**passages evaluations of each answer. Longer ones have a sparse linear model of 64
random subsets (ContextCite).
"""


def parser() -> ArgumentParser:
    """The command's own arguments."""
    parser = ArgumentParser(
        "softprompt explain", usage="softprompt explain RUN [OPTIONS] [TEST_OPTIONS]",
        description=DESCRIPTION, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a test with RagQaDataModule")
    parser.add_argument("--rows", type=int, default=20, metavar="N", help="number of random rows (default: 20)")
    parser.add_argument(
        "--row", type=int, action="append", metavar="K", help="a row of the predictions, instead of random ones"
    )
    parser.add_argument("--baseline", type=Path, metavar="RUN2", help="another test of the same rows, to compare with")
    parser.add_argument("--no-attention", action="store_true", help="do not measure attention")
    parser.add_argument("--examples", type=int, default=20, metavar="N", help="rows on the page (default: 20)")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args, options = parser().parse_known_args(argv)
    if args.rows < 1 or args.examples < 0:
        raise CommandError(f"--rows must be at least 1 and --examples at least 0, got {args.rows} and {args.examples}")
    from lightning_softprompt.analysis.explanation import compare, summarize
    from lightning_softprompt.analysis.explanation_page import comparison_rows, explanation_page, measure_rows

    rows = _choose_rows(read_run(args.run), args)
    explanations = explain_rows(args.run, rows, options, not args.no_attention)
    summary = summarize(explanations)
    report: dict[str, Any] = {"run": str(args.run), "version": __version__, "rows": len(explanations)}
    report["measures"] = summary
    header, cells = measure_rows(summary)
    print(table(cells, header))
    comparison = None
    if args.baseline is not None:
        others = _explain_baseline(args.baseline, explanations, options)
        try:
            comparison = compare(explanations, others)
        except ValueError as error:
            raise CommandError(f"{args.run} and {args.baseline} cannot be compared: {error}") from error
        report["baseline"] = {"run": str(args.baseline), "measures": comparison}
        header, cells = comparison_rows(comparison)
        print(f"\n{table(cells, header)}")
    note = describe_test(args.run, "explain", argv)
    page = explanation_page(args.run.resolve().name, explanations, summary, comparison, args.examples, note)
    lines = ""
    for explanation in explanations:
        record = _round(explanation.to_record())
        lines += f"{json.dumps(record, ensure_ascii=False)}\n"
    write_file(args.run / ROWS, lines.encode())
    write_file(args.run / SUMMARY, f"{json.dumps(report, indent=1, ensure_ascii=False)}\n".encode())
    write_file(args.run / PAGE, page.encode())
    print(f"\nWrote {args.run / PAGE}, {args.run / SUMMARY} (all measures) and {args.run / ROWS} (rows)")
    return 0


def _choose_rows(rows: list[AnsweredRow], args: Namespace) -> list[AnsweredRow]:
    """Select the rows to explain, in the order of the test.

    Raises:
        CommandError: If a requested row does not exist, or no row has passages.
    """
    by_number = {row.number: row for row in rows}
    if len(by_number) < len(rows):
        raise CommandError(f"{args.run} has several rows of the same number, from several files or tasks")
    if args.row:
        if missing := [number for number in args.row if number not in by_number]:
            raise CommandError(f"{args.run} has no row {missing[0]}; its rows are {min(by_number)} to {max(by_number)}")
        requested = [by_number[number] for number in sorted(set(args.row))]
        if empty := [row.number for row in requested if not row.passages]:
            raise CommandError(f"row {empty[0]} of {args.run} has no passages; choose other rows")
        return requested
    with_passages = [row for row in rows if row.passages]
    if not with_passages:
        raise CommandError(f"no row of {args.run} has passages; explain requires a test with retrieved passages")
    sample = random.Random(SEED).sample(with_passages, min(args.rows, len(with_passages)))
    return sorted(sample, key=lambda row: row.number)


def explain_rows(
    folder: Path, rows: Sequence[AnsweredRow], options: Sequence[str], has_attention: bool
) -> list[Explanation]:
    """Explain rows of a test with the model and the data of the test.

    Args:
        folder: The folder of the test.
        rows: The rows.
        options: Options of `softprompt test`.
        has_attention: Whether to measure attention.

    Raises:
        CommandError: If the test cannot be repeated, because its data or its prompt have changed.
    """
    from lightning_softprompt.analysis.passage_effects import PassageEffects

    run = _load_run(folder, options)
    data = _qa_data(run, folder)
    trainer = run.make_validation_trainer()
    module = run.module.to(trainer.strategy.root_device).eval()
    subsets_per_batch = SUBSETS_ON_CPU if module.device.type == "cpu" else SUBSETS_ON_GPU
    effects = PassageEffects(module.loaded, module.prompt, subsets_per_batch)
    try:
        with trainer.precision_plugin.forward_context():
            explanations = list(_explain_each(data, rows, effects, has_attention))
    except ValueError as error:
        raise CommandError(f"{folder} cannot be explained: {error}") from error
    return sorted(explanations, key=lambda explanation: explanation.row)


def _explain_each(
    data: RagQaDataModule, rows: Sequence[AnsweredRow], effects: PassageEffects, has_attention: bool
) -> Iterator[Explanation]:
    """Yield the explanation of each row, the longest first, and print the progress.

    Raises:
        ValueError: If a row has other passages than in the test.
    """
    index_of = {number: index for index, number in enumerate(data.source_rows("test"))}
    if missing := [row.number for row in rows if row.number not in index_of]:
        raise ValueError(f"row {missing[0]} is not among the test rows; its data have changed")
    lengths = data.split("test").lengths
    longest_first = sorted(rows, key=lambda row: lengths[index_of[row.number]], reverse=True)
    began = printed = time.monotonic()
    for done, row in enumerate(longest_first, start=1):
        yield _explain_row(data, index_of[row.number], row, effects, has_attention)
        now = time.monotonic()
        if sys.stderr.isatty() or now - printed > SECONDS_BETWEEN_LINES or done == len(rows):
            printed = now
            left = (now - began) / done * (len(rows) - done)
            print(f"explained {done} of {len(rows)} rows, {left:.0f} s left", file=sys.stderr, flush=True)


def _explain_row(
    data: RagQaDataModule, index: int, row: AnsweredRow, effects: PassageEffects, has_attention: bool
) -> Explanation:
    from lightning_softprompt.analysis.explanation import GENERATED, RIGHT, Explanation
    from lightning_softprompt.analysis.passage_effects import mean_over_heads, select_passages
    from lightning_softprompt.rag.passage_ablation import AblationRow

    ablation = AblationRow(data, index)
    passages = ablation.example.passages
    documents = [passage.document for passage in passages]
    if [passage["document"] for passage in row.passages] != documents:
        raise ValueError(f"row {row.number} had other passages in the test; its data or its index have changed")
    texts = {GENERATED: ablation.read_answer(row.record), RIGHT: ablation.example.target}
    texts = {name: text for name, text in texts.items() if text.strip()}
    different_texts = list(dict.fromkeys(texts.values()))
    effects_of = dict(zip(different_texts, effects.measure(ablation, different_texts), strict=True))
    attention: dict[str, HeadMasses] = {}
    num_tokens: dict[str, int] = {}
    if has_attention and GENERATED in texts:
        examples = data.split("test").examples
        other_question = examples[(index + 1) % len(examples)].fields[data.question]
        attention, num_tokens = effects.attention_by_condition(ablation, texts[GENERATED], other_question)
    return Explanation(
        row=row.number,
        question=ablation.question,
        prediction=row.answer,
        target=ablation.example.target,
        documents=documents,
        texts=[passage.text for passage in passages],
        is_relevant=list(row.passage_is_relevant),
        answers={name: effects_of[text] for name, text in texts.items()},
        attention={condition: mean_over_heads(masses) for condition, masses in attention.items()},
        num_tokens=num_tokens,
        head_attention=select_passages(attention, len(passages)),
    )


def _load_run(folder: Path, options: Sequence[str]) -> ParsedRun:
    """Load the method of a test with its trained tensors.

    Raises:
        CommandError: If the config, the checkpoint or the prompt of the test cannot be used.
    """
    from lightning_softprompt.checkpoints.prompt_file import read_prompt
    from lightning_softprompt.checkpoints.restore import load_tensors
    from lightning_softprompt.cli.dry_parse import parse_run
    from lightning_softprompt.cli.run_config import read_run_config
    from lightning_softprompt.reports.run_table import CONFIG
    from lightning_softprompt.reports.run_table import read_run as read_summary

    if not (folder / CONFIG).is_file():
        raise CommandError(f"{folder} has no {CONFIG}; expected a run folder of `softprompt test`")
    try:
        source = read_summary(folder, with_interval=False).source
        names_config = {"-c", "--config"} & {option.partition("=")[0] for option in options}
        config = [] if names_config else ["--config", read_run_config(folder / CONFIG).text]
        run = parse_run(["test", *config, *options])
        run.module.configure_model()
        if source is not None:
            saved = read_prompt(source)
            saved.check(run.module.loaded, source)
            load_tensors(run.module, saved.tensors, source)
    except ValueError as error:
        raise CommandError(str(error)) from error
    return run


def _qa_data(run: ParsedRun, folder: Path) -> RagQaDataModule:
    """Prepare the test rows.

    Raises:
        CommandError: If the data module is another one, or its rows cannot be read.
    """
    from lightning_softprompt.rag.qa_datamodule import RagQaDataModule

    data = run.data
    if not isinstance(data, RagQaDataModule):
        raise CommandError(f"{folder} is a test with {type(data).__name__}; explain requires RagQaDataModule")
    try:
        data.prepare_data()
        data.split("test")
    except ValueError as error:
        raise CommandError(str(error)) from error
    return data


def _explain_baseline(folder: Path, explanations: Sequence[Explanation], options: Sequence[str]) -> list[Explanation]:
    """Read the explanations of the same rows in another test, or compute them.

    Raises:
        CommandError: If the other test lacks a row.
    """
    answered = {row.number: row for row in read_run(folder)}
    missing = [explanation.row for explanation in explanations if explanation.row not in answered]
    if missing:
        raise CommandError(f"{folder} has no row {missing[0]}; test both runs on the same rows")
    rows = [answered[explanation.row] for explanation in explanations]
    saved = _read_explanations(folder / ROWS)
    if all(row.number in saved and saved[row.number].prediction == row.answer for row in rows):
        print(f"Using {folder / ROWS}", file=sys.stderr)
        return [saved[row.number] for row in rows]
    return explain_rows(folder, rows, options, has_attention=False)


def _read_explanations(path: Path) -> dict[int, Explanation]:
    """Read the explained rows of a test; empty if the test was not explained.

    Raises:
        CommandError: If the file is damaged.
    """
    from lightning_softprompt.analysis.explanation import Explanation

    if not path.is_file():
        return {}
    try:
        records = [json.loads(line) for line in path.read_bytes().splitlines()]
        explanations = [Explanation.from_record(record) for record in records]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CommandError(f"{path} cannot be read ({error}); delete it to compute its rows again") from error
    return {explanation.row: explanation for explanation in explanations}


def _round(value: Any) -> Any:
    """Round the numbers of a record, since further digits are rounding errors."""
    if isinstance(value, float):
        return round(value, 8)
    if isinstance(value, dict):
        return {name: _round(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_round(inner) for inner in value]
    return value
