"""`softprompt vocabulary extend|report`: extend a tokenizer with terms of a corpus, and measure tokenizers."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_softprompt.cli.next_steps import command_line, suggest
from lightning_softprompt.system.errors import CommandError
from lightning_softprompt.system.printable import printable

if TYPE_CHECKING:
    from lightning_softprompt.backbones.tokenization.added_rows import AddedRow
    from lightning_softprompt.vocabulary.base import Extension, Selection
    from lightning_softprompt.vocabulary.word_counts import WordCounts

DEFAULT_BASE = "smollm2-135m-instruct"
MAX_SHOWN = 20  # new tokens and skipped terms that are printed
EXAMPLES = """\
examples:
  softprompt vocabulary extend corpus.jsonl --general wikitext.jsonl --rows 500 --out portuguese
  softprompt vocabulary extend --terms terms.txt --out medical
  softprompt vocabulary report test.jsonl --vocabulary portuguese
  softprompt vocabulary report test.jsonl --vocabulary portuguese --plot savings.png --speed 12
  softprompt fit --data CorpusDataModule --data.path corpus.jsonl --backbone.vocabulary portuguese --model NewTokens
"""


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        "softprompt vocabulary",
        description="Extend a copy of a tokenizer with terms of a corpus, and measure tokenizers on texts.",
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="extend|report")
    _extend_arguments(commands.add_parser("extend", help="select terms and write an extended tokenizer"))
    report = commands.add_parser("report", help="unknown tokens, tokens per word and speed of a tokenizer")
    report.add_argument("corpus", nargs="+", help="texts to measure on: text files, JSON lines, folders, data sets")
    _common_arguments(report)
    _report_arguments(report)
    return parser


def _extend_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    parser.description = (
        "Select terms of a corpus and write an extended tokenizer. A word can become a token, or a part of one, if it "
        "consists of letters, has several tokens, and is more frequent in the corpus than in the general text. "
        "Existing tokens keep their ids; the files of the base tokenizer are not changed."
    )
    add("corpus", nargs="*", help="texts to select terms from: text files, JSON lines, folders, data sets")
    _common_arguments(parser)
    add("--general", nargs="+", default=[], metavar="TEXT", help="general texts, whose words are not selected")
    add("--terms", type=Path, metavar="FILE", help="add these terms, one per line, before terms of the corpus")
    add("--rows", type=int, default=500, help="maximum number of new tokens (default: 500)")
    count_help = "minimum occurrences of a word, or of a piece in all words (default: 8)"
    add("--min-count", type=int, default=8, help=count_help)
    documents_help = "minimum documents with a word (default: 4 for whole words; 1 for pieces, shared by words)"
    add("--min-documents", type=int, help=documents_help)
    add(
        "--unit",
        choices=("auto", "pieces", "words"),
        default="auto",
        help="pieces: the most frequent pieces of words, as a byte-pair encoding learns them; words: whole words "
        "(default: pieces if the tokenizer is a byte-pair encoding)",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write, which must not exist")


def _report_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    parser.description = (
        "Measure a tokenizer on texts: tokens, unknown tokens, and the words that cost the most tokens. With an "
        "extended tokenizer, also the savings by the number of its new tokens."
    )
    add("--vocabulary", type=Path, metavar="DIR", help="extended tokenizer to compare with the base")
    add("--words", type=int, default=20, metavar="N", help="costliest words to print (default: 20; 0 for none)")
    add("--plot", type=Path, metavar="FILE", help="draw the tokens saved by the number of new tokens, such as a PNG")
    add(
        "--speed",
        type=int,
        default=0,
        metavar="ROWS",
        help="also load the model and measure training steps on this many parts of the texts (default: 0, no steps)",
    )


def _common_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--base", default=DEFAULT_BASE, metavar="NAME", help=f"backbone with the tokenizer (default: {DEFAULT_BASE})")
    add(
        "--column",
        nargs="+",
        default=["text"],
        metavar="NAME",
        help="column of the text in rows; of several names, the first one that a row has (default: text)",
    )
    add("--split", help="split of a folder or hub data set")


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    run = {"extend": _extend, "report": _report}[args.command]
    try:
        return run(args)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error


def _extend(args: Namespace) -> int:
    from lightning_softprompt.cli.vocabulary_report import compare_tokenizers
    from lightning_softprompt.vocabulary.base import Selection
    from lightning_softprompt.vocabulary.corpus_texts import read_pieces
    from lightning_softprompt.vocabulary.extension import create_extension
    from lightning_softprompt.vocabulary.folder import write_tokenizer

    if not args.corpus and args.terms is None:
        raise CommandError("pass a corpus to select terms from, or --terms FILE")
    if args.rows < 1:
        raise CommandError(f"--rows must be at least 1, got {args.rows}")
    if args.out.exists():
        raise CommandError(f"{args.out} exists; remove it, or choose another --out")
    tokenizer = _load_tokenizer(args.base)
    extension = create_extension(tokenizer)
    selection = Selection(args.rows, args.min_count, args.min_documents, args.unit)
    skipped = _select(args, extension, selection)
    _print_skipped(skipped)
    if not extension.rows and not args.corpus:
        raise CommandError("no new tokens: all terms were skipped, for the reasons above")
    if not extension.rows:
        raise CommandError(
            "no new tokens: every frequent word is one token already, or is as frequent in the general text; lower "
            "--min-count and --min-documents, or omit --general"
        )
    extended = write_tokenizer(args.out, extension, args.base)
    print(f"Wrote {args.out}: {len(extension.rows):,} new tokens, {len(extended):,} in total")
    shown = [row for row in extension.rows if len(row.text) > 2][:MAX_SHOWN]
    print(printable("New tokens: " + ", ".join(repr(row.text) for row in shown)))
    tokenizers = {"base": tokenizer, "extended": extended}
    for name, sources in (("corpus", args.corpus), ("general", args.general)):
        if sources:
            read = partial(read_pieces, sources, args.column, args.split)
            print(f"\n{compare_tokenizers(tokenizers, read, name, extension.first_id)}")
    suggest(
        command_line("vocabulary report", "TEXT", "--base", args.base, "--vocabulary", args.out),
        command_line("fit", "--backbone.vocabulary", args.out.absolute(), "--model", "NewTokens", "..."),
    )
    return 0


def _select(args: Namespace, extension: Extension, selection: Selection) -> dict[str, str]:
    """Adds the listed terms and those of the corpus, and returns the terms that were skipped."""
    counts = _count(args.corpus, args, extension) if args.corpus else None
    skipped: dict[str, str] = {}
    if args.terms is not None:
        skipped = extension.add_terms(_read_terms(args.terms), counts, selection.rows)
    if counts is not None and len(extension.rows) < selection.rows:
        general = _count(args.general, args, extension) if args.general else None
        extension.select(counts, general, selection)
        _print_counts(counts)
    return skipped


def _read_terms(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    terms = [line.strip() for line in lines if line.strip()]
    if not terms:
        raise ValueError(f"{path} has no terms; write one per line")
    return list(dict.fromkeys(terms))


def _count(sources: Sequence[str], args: Namespace, extension: Extension) -> WordCounts:
    from lightning_softprompt.vocabulary.corpus_texts import read_pieces
    from lightning_softprompt.vocabulary.word_counts import count_words

    return count_words(read_pieces(sources, args.column, args.split), extension.tokenizer)


def _print_counts(counts: WordCounts) -> None:
    print(f"{counts.total:,} words, {len(counts.counts):,} different ones")
    if counts.max_error:
        print(f"Words with {counts.max_error} occurrences or fewer were dropped to bound memory")


def _print_skipped(skipped: dict[str, str]) -> None:
    if skipped:
        print(f"Skipped {len(skipped)} terms:")
    for term, reason in list(skipped.items())[:MAX_SHOWN]:
        print(printable(f"  {term}: {reason}"))
    if len(skipped) > MAX_SHOWN:
        print(f"  and {len(skipped) - MAX_SHOWN} more")


def _check_report(args: Namespace) -> None:
    if args.plot is not None and args.vocabulary is None:
        raise CommandError("--plot draws the savings of new tokens; pass --vocabulary, too")
    for name in ("words", "speed"):
        if getattr(args, name) < 0:
            raise CommandError(f"--{name} must be at least 0, got {getattr(args, name)}")


def _report(args: Namespace) -> int:
    from lightning_softprompt.backbones.tokenization.added_rows import read_vocabulary
    from lightning_softprompt.cli.vocabulary_report import (
        compare_speed,
        compare_tokenizers,
        describe_words,
        savings_table,
    )
    from lightning_softprompt.vocabulary.corpus_texts import read_pieces
    from lightning_softprompt.vocabulary.savings import draw_savings, measure_savings

    _check_report(args)
    read = partial(read_pieces, args.corpus, args.column, args.split)
    tokenizers = {"base": _load_tokenizer(args.base)}
    rows: tuple[AddedRow, ...] = ()
    if args.vocabulary is not None:
        rows = read_vocabulary(args.vocabulary).rows
        tokenizers["extended"] = _load_tokenizer(str(args.vocabulary.expanduser()))
    print(compare_tokenizers(tokenizers, read, "texts", rows[0].id if rows else None))
    if args.words:
        print(f"\n{describe_words(tokenizers, read, args.words)}")
    if rows:
        savings = list(measure_savings(read, tokenizers["extended"], rows))
        print(f"\n{savings_table(savings)}")
        if args.plot is not None:
            draw_savings(savings).savefig(args.plot, dpi=150)
            print(f"\nWrote {args.plot}")
    if args.speed:
        vocabularies = [None] if args.vocabulary is None else [None, str(args.vocabulary)]
        print(f"\n{compare_speed(args.base, vocabularies, read, args.speed)}")
    return 0


def _load_tokenizer(name: str) -> Any:
    from lightning_softprompt.backbones.loading import load_tokenizer
    from lightning_softprompt.core.backbone_spec import BackboneSpec

    return load_tokenizer(BackboneSpec(name))
