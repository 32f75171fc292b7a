"""Measures how often the passage that answers a question is among the first results of each search mode.

    python benchmarks/retrieval.py PATH/TO/qa/medquad PATH/TO/qa/faquad_pt:portuguese

Each folder has `corpus.jsonl` and `test.jsonl`, whose rows name their passages in `positive_ids`. The language of word
stems follows the colon. hit@k is the fraction of questions with a named document among the first k. The script prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from lightning_softprompt.data.readers.corpora import read_documents
from lightning_softprompt.data.readers.sources import read_rows
from lightning_softprompt.retrieval.index_builder import build_index
from lightning_softprompt.retrieval.passages.documents import Hit
from lightning_softprompt.retrieval.retriever import MODES, Retriever, SearchMode
from lightning_softprompt.retrieval.search.settings import IndexSettings

CUTOFFS = (1, 5, 10)
Row = dict[str, Any]


def compute_hit_rates(hits_by_question: Sequence[Sequence[Hit]], positives: Sequence[AbstractSet[str]]) -> list[float]:
    """Returns hit@k for each k. A document counts once, even if several of its passages are found."""
    ranked = [list(dict.fromkeys(hit.passage.document for hit in hits)) for hits in hits_by_question]
    rates = []
    for cutoff in CUTOFFS:
        hits = [not gold.isdisjoint(ids[:cutoff]) for ids, gold in zip(ranked, positives, strict=True)]
        rates.append(sum(hits) / len(hits))
    return rates


def format_row(name: str, mode: SearchMode, index: str, rows: Sequence[Row], candidates: int) -> str:
    """Returns a row of the table."""
    questions = [str(row["question"]) for row in rows]
    start = time.perf_counter()
    hits_by_question = Retriever(index, mode, candidates=candidates).search(questions, 2 * max(CUTOFFS))
    seconds = (time.perf_counter() - start) / len(questions)
    positives = [set(row["positive_ids"]) for row in rows]
    rates = " | ".join(f"{rate:.3f}" for rate in compute_hit_rates(hits_by_question, positives))
    return f"| {name} | {mode} | {rates} | {1000 * seconds:.1f} |"


def main() -> None:
    """Builds an index of each corpus and searches it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", help="folder, optionally with the language: PATH:portuguese")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--split", default="test")
    parser.add_argument("--encoder", default="all-minilm-l6-v2")
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--keep", type=Path, help="folder in which indexes are stored and reused")
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp())
    encoder = None if list(args.modes) == ["lexical"] else args.encoder
    print("| set | mode | " + " | ".join(f"hit@{k}" for k in CUTOFFS) + " | ms per question |")
    print("|---" * (len(CUTOFFS) + 3) + "|")
    for argument in args.sets:
        path, _, language = argument.partition(":")
        index = folder / f"{Path(path).name}{'' if encoder else '-lexical'}"
        settings = IndexSettings(language=language or "english", encoder=encoder)
        build_index(index, read_documents(path), settings)
        rows = [dict(row) for row in read_rows(path, split=args.split)][: args.questions]
        for mode in args.modes:
            print(format_row(Path(path).name, mode, str(index), rows, args.candidates), flush=True)


if __name__ == "__main__":
    main()
