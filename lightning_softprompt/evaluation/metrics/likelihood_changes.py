"""The likelihood of the same windows in several tests: bits per byte of each corpus, and their change."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_softprompt.evaluation.metrics.intervals import bootstrap_ratio
from lightning_softprompt.system.errors import CommandError

MAIN = "main"  # the corpus without a name
Windows = Mapping[tuple[str, int], Mapping[str, Any]]  # records by corpus and row


@dataclass(frozen=True)
class LikelihoodChange:
    """The likelihood of a corpus in a test.

    Args:
        run: The run folder.
        corpus: Name of the corpus.
        bits_per_byte: Bits per byte.
        change: Difference from the first run; None for the first run.
        low: Lower end of the 95 % interval of the change over documents.
        high: Its upper end.
        documents: Number of documents.
    """

    run: str
    corpus: str
    bits_per_byte: float
    change: float | None
    low: float | None
    high: float | None
    documents: int

    @property
    def value(self) -> float:
        """Bits per byte."""
        return self.bits_per_byte


def compare_likelihoods(tests: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[LikelihoodChange]:
    """Compares tests of `CorpusDataModule` with the first one, window by window.

    Args:
        tests: The records of each test by the name of its run.

    Raises:
        CommandError: If a test has no windows, or tests scored different windows.
    """
    windows_by_run = {name: index_windows(name, records) for name, records in tests.items()}
    (first_name, first), *_ = windows_by_run.items()
    changes = []
    for name, windows in windows_by_run.items():
        check_same_windows(first_name, first, name, windows)
        for corpus in dict.fromkeys(corpus for corpus, _ in first):
            keys = [key for key in first if key[0] == corpus]
            before = [first[key] for key in keys] if name != first_name else None
            changes.append(measure_change(name, corpus, [windows[key] for key in keys], before))
    return changes


def index_windows(name: str, records: Sequence[Mapping[str, Any]]) -> Windows:
    """Returns the windows of a test by corpus and row.

    Raises:
        CommandError: If it has none.
    """
    if not records or not all({"nats", "bytes", "document"} <= record.keys() for record in records):
        raise CommandError(f"the records of {name} have no likelihoods; expected a test of CorpusDataModule")
    return {(record.get("corpus") or MAIN, record["row"]): record for record in records}


def check_same_windows(first_name: str, first: Windows, name: str, windows: Windows) -> None:
    """Checks that two tests scored the same windows.

    Raises:
        CommandError: If not.
    """
    texts = [{key: window.get("target") for key, window in of_run.items()} for of_run in (first, windows)]
    if texts[0] != texts[1]:
        raise CommandError(
            f"{first_name} and {name} scored different windows; test both with the same documents, data.corpora, "
            "data.window, data.seed and limits"
        )


def measure_change(
    run: str, corpus: str, windows: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]] | None
) -> LikelihoodChange:
    """Measures the likelihood of a corpus, and its change from the same windows in another test."""
    bits: dict[int, float] = defaultdict(float)
    changes: dict[int, float] = defaultdict(float)
    sizes: dict[int, float] = defaultdict(float)
    for window, earlier in zip(windows, before or windows, strict=True):
        document, change = window["document"], window["nats"] - earlier["nats"]
        bits[document] += window["nats"] / math.log(2)
        changes[document] += change / math.log(2)
        sizes[document] += window["bytes"]
    total = math.fsum(sizes.values())
    value = math.fsum(bits.values()) / total
    if before is None:
        return LikelihoodChange(run, corpus, value, None, None, None, len(sizes))
    low, high = bootstrap_ratio(list(changes.values()), list(sizes.values()))
    return LikelihoodChange(run, corpus, value, math.fsum(changes.values()) / total, low, high, len(sizes))
