"""How often the passage that answers a question is among the first found: lexical, dense and hybrid search.

    python benchmarks/retrieval.py PATH/TO/qa/medquad PATH/TO/qa/faquad_pt:portuguese

Each folder has `corpus.jsonl` and `test.jsonl`, whose rows name their passages in `positive_ids`; behind the colon is
the language of word stems. hit@k: the share of questions with a named document among the first k. It prints a Markdown
table.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from lightning_softprompt.data.readers.corpora import read_documents
from lightning_softprompt.data.readers.sources import read_rows
from lightning_softprompt.retrieval.index_builder import build_index
from lightning_softprompt.retrieval.passages.documents import Hit
from lightning_softprompt.retrieval.retriever import MODES, Retriever, SearchMode
from lightning_softprompt.retrieval.search.settings import IndexSettings

AT = (1, 5, 10)


def hit_rates(found: Sequence[Sequence[Hit]], positives: Sequence[Sequence[str]]) -> list[float]:
    """hit@k for each k: documents count once, however many of their passages are found."""
    ranked = [list(dict.fromkeys(hit.passage.document for hit in hits)) for hits in found]
    pairs = list(zip(ranked, positives, strict=True))
    return [sum(not set(gold).isdisjoint(ids[:k]) for ids, gold in pairs) / len(pairs) for k in AT]


def line(name: str, mode: SearchMode, index: str, rows: Sequence[dict[str, object]], candidates: int) -> str:
    """A row of the table."""
    questions = [str(row["question"]) for row in rows]
    start = time.perf_counter()
    found = Retriever(index, mode, candidates=candidates).search(questions, 2 * max(AT))
    took = (time.perf_counter() - start) / len(questions)
    rates = " | ".join(f"{rate:.3f}" for rate in hit_rates(found, [row["positive_ids"] for row in rows]))
    return f"| {name} | {mode} | {rates} | {1000 * took:.1f} |"


def main() -> None:
    """Builds an index of each corpus and asks it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", help="folder, and perhaps the language: PATH:portuguese")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--split", default="test")
    parser.add_argument("--encoder", default="all-minilm-l6-v2")
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--keep", type=Path, help="keep the indexes here, and take those that are here")
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp())
    encoder = None if list(args.modes) == ["lexical"] else args.encoder
    print("| set | mode | " + " | ".join(f"hit@{k}" for k in AT) + " | ms a question |")
    print("|---" * (len(AT) + 3) + "|")
    for told in args.sets:
        path, _, language = told.partition(":")
        index = folder / f"{Path(path).name}{'' if encoder else '-lexical'}"
        settings = IndexSettings(language=language or "english", encoder=encoder)
        build_index(index, read_documents(path), settings)
        rows = [dict(row) for row in read_rows(path, split=args.split)][: args.questions]
        for mode in args.modes:
            print(line(Path(path).name, mode, str(index), rows, args.candidates), flush=True)


if __name__ == "__main__":
    main()
