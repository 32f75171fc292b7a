"""The answers to the same cloze questions in several tests: accuracies, and their change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lightning_softprompt.evaluation.words.cloze import ACCURACY, Result, bootstrap_documents
from lightning_softprompt.system.errors import CommandError

METRICS = {ACCURACY: "correct", "all tokens": "exact", "share of tokens": "share"}  # values of a result


@dataclass(frozen=True)
class ClozeChange:
    """A metric of the cloze questions of a test.

    Args:
        run: The run folder.
        metric: Name of the metric.
        value: Its mean over questions.
        change: Difference from the first run; None for the first run.
        low: Lower end of the 95 % interval of the change over documents.
        high: Its upper end.
        questions: Number of questions.
    """

    run: str
    metric: str
    value: float
    change: float | None
    low: float | None
    high: float | None
    questions: int


def compare_cloze(tests: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[ClozeChange]:
    """Compares the questions of tests with those of the first one.

    Args:
        tests: The records of each test by the name of its run.

    Returns:
        The changes; none if no test has questions.

    Raises:
        CommandError: If tests have different questions.
    """
    results = {name: list_results(records) for name, records in tests.items()}
    if not any(results.values()):
        return []
    (first_name, first), *_ = results.items()
    changes = []
    for name, of_run in results.items():
        if [identify(result) for result in of_run] != [identify(result) for result in first]:
            raise CommandError(
                f"{first_name} and {name} answered different cloze questions; test both with the same data.cloze, "
                "documents and limits. Models with different tokenizers require a file of questions (softprompt cloze)"
            )
        changes += [measure_change(name, metric, of_run, first if name != first_name else None) for metric in METRICS]
    return changes


def list_results(records: Sequence[Mapping[str, Any]]) -> list[Result]:
    """Returns the results of all questions of a test, by their row."""
    ordered = sorted(records, key=lambda record: record["row"])
    return [result for record in ordered for result in record.get("cloze", [])]


def identify(result: Result) -> tuple[int, str]:
    """Returns the document and the term of a question."""
    return result["document"], result["term"]


def measure_change(run: str, metric: str, results: Sequence[Result], before: Sequence[Result] | None) -> ClozeChange:
    """Returns a metric of questions, and its change from the same questions in another test."""
    values = [float(result[METRICS[metric]]) for result in results]
    value, count = fmean(values), len(values)
    if before is None:
        return ClozeChange(run, metric, value, None, None, None, count)
    differences = [after - float(earlier[METRICS[metric]]) for after, earlier in zip(values, before, strict=True)]
    low, high = bootstrap_documents(differences, [result["document"] for result in results])
    return ClozeChange(run, metric, value, fmean(differences), low, high, count)
