"""`softprompt vocabulary extend|report`: extend a tokenizer with terms of a corpus, and measure tokenizers."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_softprompt.cli.next_steps import command_line, suggest
from lightning_softprompt.reports.text_table import table
from lightning_softprompt.system.errors import CommandError
from lightning_softprompt.system.printable import printable

if TYPE_CHECKING:
    from lightning_softprompt.vocabulary.base import Extension, Selection
    from lightning_softprompt.vocabulary.measurement import Measurement
    from lightning_softprompt.vocabulary.word_counts import WordCounts

DEFAULT_BASE = "smollm2-135m-instruct"
MAX_SHOWN = 20  # new tokens and skipped terms that are printed
EXAMPLES = """\
examples:
  softprompt vocabulary extend corpus.jsonl --general wikitext.jsonl --rows 500 --out portuguese
  softprompt vocabulary extend --terms terms.txt --out medical
  softprompt vocabulary report test.jsonl --vocabulary portuguese
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
    report.add_argument("--vocabulary", type=Path, metavar="DIR", help="extended tokenizer to compare with the base")
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
    add("--min-count", type=int, default=8, help="minimum occurrences of a word (default: 8)")
    add("--min-documents", type=int, default=4, help="minimum documents with a word (default: 4)")
    add(
        "--unit",
        choices=("auto", "pieces", "words"),
        default="auto",
        help="pieces: the most frequent pieces of words, as a byte-pair encoding learns them; words: whole words "
        "(default: pieces if the tokenizer is a byte-pair encoding)",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write, which must not exist")


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
    from lightning_softprompt.vocabulary.base import Selection
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
            print(f"\n{_compare(tokenizers, sources, args, name, extension.first_id)}")
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


def _report(args: Namespace) -> int:
    from lightning_softprompt.backbones.tokenization.added_rows import read_vocabulary

    tokenizers = {"base": _load_tokenizer(args.base)}
    first_added = None
    if args.vocabulary is not None:
        vocabulary = read_vocabulary(args.vocabulary)
        tokenizers["extended"] = _load_tokenizer(str(args.vocabulary.expanduser()))
        first_added = vocabulary.rows[0].id
    print(_compare(tokenizers, args.corpus, args, "texts", first_added))
    return 0


def _load_tokenizer(name: str) -> Any:
    from lightning_softprompt.backbones.loading import load_tokenizer
    from lightning_softprompt.core.backbone_spec import BackboneSpec

    return load_tokenizer(BackboneSpec(name))


def _compare(
    tokenizers: dict[str, Any], sources: Sequence[str], args: Namespace, name: str, first_added: int | None
) -> str:
    """Returns a table of the measures of tokenizers on texts."""
    from lightning_softprompt.vocabulary.corpus_texts import read_pieces
    from lightning_softprompt.vocabulary.measurement import measure_tokenizer

    measured: list[Measurement] = []
    for tokenizer in tokenizers.values():
        pieces = read_pieces(sources, args.column, args.split)
        measured.append(measure_tokenizer(pieces, tokenizer, first_added))
    rows = []
    for label, text in MEASURES.items():
        rows.append([label, *(text.format(m=measurement) for measurement in measured)])
    header = [f"{name} ({measured[0].documents:,} documents)", *tokenizers]
    if len(measured) > 1:
        header.append("change")
        for row, attribute in zip(rows, CHANGES, strict=True):
            row.append(_change(measured, attribute))
    return table(rows, header)


def _change(measured: Sequence[Measurement], attribute: str | None) -> str:
    if attribute is None:
        return ""
    before, after = (getattr(measurement, attribute) for measurement in measured)
    return f"{100 * (after - before) / before:+.2f} %" if before else ""


MEASURES = {
    "tokens": "{m.tokens:,}",
    "tokens per word": "{m.fertility:.3f}",
    "tokens per document": "{m.tokens_per_document:.1f}",
    "bytes per token": "{m.bytes_per_token:.3f}",
    "unknown tokens": "{m.unknown_rate:.3%}",
    "new tokens": "{m.added:,}",
    "tokenization, MB per CPU second": "{m.megabytes_per_second:.2f}",
}
CHANGES = (
    "tokens",
    "fertility",
    "tokens_per_document",
    "bytes_per_token",
    "unknown_rate",
    None,
    "megabytes_per_second",
)
