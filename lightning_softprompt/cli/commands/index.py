"""`softprompt index build|search|info`: a corpus made searchable, and what is found in it."""

from __future__ import annotations

import json
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from lightning_softprompt.retrieval.search.settings import STORES, WHOLE, IndexSettings
from lightning_softprompt.system.errors import CommandError
from lightning_softprompt.system.printable import printable

if TYPE_CHECKING:
    from lightning_softprompt.retrieval.manifest import Manifest
    from lightning_softprompt.retrieval.passages.documents import Document, Hit

SHOWN = 300  # characters of a passage
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
    _build_arguments(_command(commands, "build", "make a corpus searchable, or bring an index up to date"))
    _search_arguments(_command(commands, "search", "print what is found for a question"))
    info = _command(commands, "info", "say what stands in an index")
    info.add_argument("index", type=Path, help="folder of the index")
    info.add_argument("--check", action="store_true", help="read every file, and compare it with what was written")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _command(commands: Any, name: str, text: str) -> ArgumentParser:
    made: ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", formatter_class=ArgumentDefaultsHelpFormatter
    )
    return made


def _build_arguments(parser: ArgumentParser) -> None:
    add, default = parser.add_argument, IndexSettings()
    add("corpus", nargs="?", help="JSON lines, CSV, Parquet, a hub data set, files of text, or a folder; - for stdin")
    add("--index", type=Path, required=True, metavar="DIR", help="folder of the index; made, or brought up to date")
    add("--add", action="store_true", help="keep what the index holds beside this corpus, but for equal ids")
    add("--remove", nargs="+", default=[], metavar="ID", help="take these out; with --add, or without a corpus")
    add("--split", help="split of a folder or hub data set")
    for name in ("text", "id", "title", "source"):
        add(f"--{name}-column", default=name, metavar="NAME", help=f"column that holds the {name}")
    add("--on-bad-row", choices=("raise", "skip"), default="raise", help="whether a bad row stops the build")
    add("--size", type=int, default=default.size, help="words or tokens of a passage, at most")
    add("--overlap", type=int, default=default.overlap, help="how many of them it shares with the one before, at most")
    add("--unit", default=default.unit, help="words, or the name of a model whose tokens are counted")
    add("--whole", choices=WHOLE, default=default.whole, help="what is kept whole where it fits")
    add("--language", default=default.language, help="whose word stems lexical search goes by; none: words as they are")
    add("--k1", type=float, default=default.k1, help="how much a word counts that occurs often (BM25)")
    add("--b", type=float, default=default.b, help="how much long passages are held back (BM25)")
    add("--encoder", default=default.encoder, help="sentence encoder, by name or folder; none: no dense search")
    add("--store", choices=STORES, default=default.store, help="where vectors are searched")
    add("--url", help="address of a Qdrant server; without it, its data stand inside the index")


def _search_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("index", type=Path, help="folder of the index")
    add("question", help="what is searched for")
    add("-k", type=int, default=5, help="how many passages")
    add("--way", choices=("hybrid", "lexical", "dense"), help="how; hybrid unless the index has no vectors")
    add("--encoder", metavar="NAME", help="accept this encoder, where an index from somebody else names it")
    add("--unit", metavar="NAME", help="accept this tokenizer, where an index from somebody else names it")
    add("--url", help="accept this address of a Qdrant server, where an index from somebody else names it")
    add("--rerank", metavar="NAME", help="cross-encoder that puts the candidates in order, by folder or hub id")
    add("--json", action="store_true", help="print one JSON object for each passage, with its whole text")


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
    from lightning_softprompt.rag.index_setup import tracked
    from lightning_softprompt.retrieval.index_builder import build_index, update_index

    if args.add or args.remove:
        if args.corpus and not args.add:
            raise CommandError("--remove with a corpus wants --add; without it the index is to hold the corpus alone")
        if given := _settings_given(args):
            raise CommandError(f"an index is added to with its own settings, so {', '.join(given)} cannot be said here")
        manifest = update_index(args.index, _documents(args) if args.corpus else (), args.remove, tracked)
    elif args.corpus:
        manifest = build_index(args.index, _documents(args), _settings(args), tracked)
    else:
        raise CommandError("name a corpus to build from, or documents to --remove")
    print(f"{args.index}: {_counted(manifest)}")
    return 0


def _documents(args: Namespace) -> Iterator[Document]:
    from lightning_softprompt.data.readers.corpora import Columns, read_documents

    columns = Columns(args.text_column, args.id_column, args.title_column, args.source_column)
    return read_documents(args.corpus, columns, args.split, args.on_bad_row)


def _settings(args: Namespace) -> IndexSettings:
    values = {name: getattr(args, name) for name in IndexSettings().plain()}
    return IndexSettings(**{**values, "encoder": None if args.encoder == "none" else args.encoder})


def _settings_given(args: Namespace) -> list[str]:
    default = IndexSettings().plain()
    return [f"--{name}" for name, value in default.items() if getattr(args, name) != value]


def _search(args: Namespace) -> int:
    from lightning_softprompt.retrieval.chosen import choose
    from lightning_softprompt.retrieval.manifest import read_manifest
    from lightning_softprompt.retrieval.reranker import CrossEncoder
    from lightning_softprompt.retrieval.retriever import Retriever, Way

    for name in (args.encoder, args.unit, args.url):
        choose(name)
    way: Way = args.way or ("hybrid" if read_manifest(args.index).settings.encoder else "lexical")
    reranker = CrossEncoder(args.rerank) if args.rerank else None
    hits = Retriever(str(args.index), way, reranker=reranker).search([args.question], args.k)[0]
    if args.json:
        for hit in hits:
            print(printable(json.dumps({"score": hit.score, **vars(hit.passage)}, ensure_ascii=False)))
    else:
        print("\n\n".join(_shown(rank, hit) for rank, hit in enumerate(hits, start=1)) or "nothing found")
    return 0


def _shown(rank: int, hit: Hit) -> str:
    passage = hit.passage
    head = f"{rank}. {passage.title or passage.document}  (score {hit.score:.4g}, {passage.id}, {passage.source})"
    return f"{printable(head)}\n   {printable(shorten(passage.text, SHOWN, placeholder=' ...'))}"


def _info(args: Namespace) -> int:
    from lightning_softprompt.retrieval.manifest import check_files, read_manifest

    manifest = read_manifest(args.index)
    if args.check:
        check_files(args.index, manifest)
    size = sum(int(told["bytes"]) for told in manifest.files.values())
    if args.json:
        told = {**vars(manifest), "settings": manifest.settings.plain(), "bytes": size}
        print(json.dumps(told, indent=2))
        return 0
    print(f"{args.index}: {_counted(manifest)}, {size:,} bytes{', all files as written' if args.check else ''}")
    for name, value in {**manifest.settings.plain(), "corpus": manifest.corpus[:16], **manifest.versions}.items():
        print(printable(f"  {name:20} {value}"))
    return 0


def _counted(manifest: Manifest) -> str:
    dense = f"vectors of {manifest.width}" if manifest.width else "no vectors"
    return (
        f"{manifest.documents:,} documents, {manifest.passages:,} passages "
        f"({manifest.duplicates:,} duplicates left out), {dense}"
    )
