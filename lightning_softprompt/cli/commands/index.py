"""`softprompt index build|search|info`: build, search and describe a retrieval index over a corpus."""

from __future__ import annotations

import json
import logging
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from lightning_softprompt.cli.next_steps import command_line, suggest
from lightning_softprompt.moved import REMOVED_IN
from lightning_softprompt.retrieval.search.settings import STORES, WHOLE, IndexSettings
from lightning_softprompt.system.errors import CommandError
from lightning_softprompt.system.printable import printable

if TYPE_CHECKING:
    from lightning_softprompt.retrieval.manifest import Manifest
    from lightning_softprompt.retrieval.passages.documents import Document, Hit

log = logging.getLogger(__name__)
MODES = ("hybrid", "lexical", "dense")
MAX_SHOWN = 300  # characters of a passage
EXAMPLES = """\
examples:
  softprompt index build corpus.jsonl --index indexes/mine
  softprompt index build more.jsonl --index indexes/mine --add
  softprompt index search indexes/mine "Who is at risk?" -k 3
"""


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        "softprompt index",
        description="Build, search and describe an index of passages.",
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="build|search|info")
    _build_arguments(_command(commands, "build", "build an index over a corpus, or update an index"))
    _search_arguments(_command(commands, "search", "print the passages retrieved for a question"))
    info = _command(commands, "info", "show index settings and statistics")
    info.add_argument("index", type=Path, help="folder of the index")
    info.add_argument("--check", action="store_true", help="read every file and verify its checksum")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _command(commands: Any, name: str, text: str) -> ArgumentParser:
    command: ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", formatter_class=ArgumentDefaultsHelpFormatter
    )
    return command


def _build_arguments(parser: ArgumentParser) -> None:
    add, default = parser.add_argument, IndexSettings()
    add("corpus", nargs="?", help="JSON lines, CSV, Parquet, a hub data set, files of text, or a folder; - for stdin")
    add("--index", type=Path, required=True, metavar="DIR", help="folder of the index; created or updated")
    add("--add", action="store_true", help="add the corpus to the index; documents with equal ids are replaced")
    add("--remove", nargs="+", default=[], metavar="ID", help="remove these documents; with --add, or without a corpus")
    add("--split", help="split of a folder or hub data set")
    for name in ("text", "id", "title", "source"):
        add(f"--{name}-column", default=name, metavar="NAME", help=f"column with the {name}")
    add(
        "--on-bad-row", choices=("raise", "skip"), default="raise", help="raise an error for an invalid row, or skip it"
    )
    add("--size", type=int, default=default.size, help="maximum words or tokens of a passage")
    add("--overlap", type=int, default=default.overlap, help="maximum words or tokens shared with the previous passage")
    add(
        "--unit",
        default=default.unit,
        help="unit of size and overlap: words, or the name of a model whose tokens are counted",
    )
    add("--whole", choices=WHOLE, default=default.whole, help="unit that is not split if it fits into a passage")
    add("--language", default=default.language, help="language of the stemmer for lexical search; none: no stemming")
    add("--k1", type=float, default=default.k1, help="BM25 term frequency saturation")
    add("--b", type=float, default=default.b, help="BM25 length normalization")
    add("--encoder", default=default.encoder, help="sentence encoder, by name or folder; none: no dense search")
    add("--store", choices=STORES, default=default.store, help="vector store")
    add("--url", help="address of a Qdrant server (default: store the data in the index folder)")


def _search_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("index", type=Path, help="folder of the index")
    add("question", help="the query")
    add("-k", type=int, default=5, help="number of passages")
    add(
        "--mode",
        choices=MODES,
        help="retrieval mode (default: hybrid; lexical if the index has no vectors)",
    )
    add("--way", choices=MODES, help=SUPPRESS)  # the old name of --mode
    add("--encoder", metavar="NAME", help="allow this encoder to be loaded if an index from others names it")
    add("--unit", metavar="NAME", help="allow this tokenizer to be loaded if an index from others names it")
    add("--url", help="allow this Qdrant server to be contacted if an index from others names it")
    add("--rerank", metavar="NAME", help="cross-encoder that reranks the candidates, by folder or hub id")
    add("--json", action="store_true", help="print one JSON object per passage, with its full text")


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    run = {"build": _build, "search": _search, "info": _info}[args.command]
    try:
        return run(args)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error


def _build(args: Namespace) -> int:
    from lightning_softprompt.rag.index_setup import track_progress
    from lightning_softprompt.retrieval.index_builder import build_index, update_index

    if args.add or args.remove:
        if args.corpus and not args.add:
            raise CommandError("--remove with a corpus requires --add; without it, the index holds only the corpus")
        if changed := _find_changed_settings(args):
            raise CommandError(f"--add uses the settings of the index; omit {', '.join(changed)}")
        manifest = update_index(args.index, _documents(args) if args.corpus else (), args.remove, track_progress)
    elif args.corpus:
        manifest = build_index(args.index, _documents(args), _settings(args), track_progress)
    else:
        raise CommandError("pass a corpus to build from, or documents to --remove")
    print(f"{args.index}: {_summarize(manifest)}")
    suggest(command_line("index search", args.index, "your question"))
    return 0


def _documents(args: Namespace) -> Iterator[Document]:
    from lightning_softprompt.data.readers.corpora import Columns, read_documents

    columns = Columns(args.text_column, args.id_column, args.title_column, args.source_column)
    return read_documents(args.corpus, columns, args.split, args.on_bad_row)


def _settings(args: Namespace) -> IndexSettings:
    values = {name: getattr(args, name) for name in IndexSettings().plain()}
    return IndexSettings(**{**values, "encoder": None if args.encoder == "none" else args.encoder})


def _find_changed_settings(args: Namespace) -> list[str]:
    default = IndexSettings().plain()
    return [f"--{name}" for name, value in default.items() if getattr(args, name) != value]


def _search(args: Namespace) -> int:
    from lightning_softprompt.retrieval.manifest import read_manifest
    from lightning_softprompt.retrieval.reranker import CrossEncoder
    from lightning_softprompt.retrieval.retriever import Retriever, SearchMode
    from lightning_softprompt.retrieval.trusted_names import trust

    for name in (args.encoder, args.unit, args.url):
        trust(name)
    if args.way:
        log.warning("option --way is now --mode; the old name stops working in version %s", REMOVED_IN)
    has_vectors = read_manifest(args.index).settings.encoder is not None
    mode: SearchMode = args.mode or args.way or ("hybrid" if has_vectors else "lexical")
    reranker = CrossEncoder(args.rerank) if args.rerank else None
    hits = Retriever(str(args.index), mode, reranker=reranker).search([args.question], args.k)[0]
    if args.json:
        for hit in hits:
            print(printable(json.dumps({"score": hit.score, **vars(hit.passage)}, ensure_ascii=False)))
    else:
        print("\n\n".join(_format_hit(rank, hit) for rank, hit in enumerate(hits, start=1)) or "no passages found")
    return 0


def _format_hit(rank: int, hit: Hit) -> str:
    passage = hit.passage
    title = passage.title or passage.document
    head = f"{rank}. {title}  (score {hit.score:.4g}, {passage.id}, {passage.source})"
    text = shorten(passage.text, MAX_SHOWN, placeholder=" ...")
    return f"{printable(head)}\n   {printable(text)}"


def _info(args: Namespace) -> int:
    from lightning_softprompt.retrieval.manifest import check_files, read_manifest

    manifest = read_manifest(args.index)
    if args.check:
        check_files(args.index, manifest)
    size = sum(int(file["bytes"]) for file in manifest.files.values())
    if args.json:
        values = {**vars(manifest), "settings": manifest.settings.plain(), "bytes": size}
        print(json.dumps(values, indent=2))
        return 0
    checked = ", all checksums match" if args.check else ""
    print(f"{args.index}: {_summarize(manifest)}, {size:,} bytes{checked}")
    values = {**manifest.settings.plain(), "corpus": manifest.corpus[:16], **manifest.versions}
    for name, value in values.items():
        print(printable(f"  {name:20} {value}"))
    return 0


def _summarize(manifest: Manifest) -> str:
    dense = f"vectors of width {manifest.width}" if manifest.width else "no vectors"
    return (
        f"{manifest.documents:,} documents, {manifest.passages:,} passages "
        f"({manifest.duplicates:,} duplicates removed), {dense}"
    )
