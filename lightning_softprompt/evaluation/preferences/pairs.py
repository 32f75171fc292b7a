"""Metrics of preferences: whether preferred answers have higher scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.answer_pairs import AnswerPairs, pairs_of, preferences_of
from lightning_softprompt.core.types import IGNORE, Batch, PreferenceExample
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.metrics.intervals import bootstrap
from lightning_softprompt.evaluation.metrics.text_rows import Numbers, TextRows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 10  # of the calibration
COLUMNS = ("question", "better", "worse", "better_length", "worse_length", "better_logprob", "worse_logprob")
OF_SCORES = (
    "accuracy", "margin", "bradley_terry", "calibration_error", "longer_accuracy", "accuracy_shorter_chosen",
    "length_correlation",
)  # fmt: skip
OF_LOGPROBS = ("logprob_accuracy", "chosen_logprob", "rejected_logprob")
LOWER = ("bradley_terry", "calibration_error")


@final
class PreferenceEvaluation(Evaluation):
    """Whether the answers that are preferred have the higher scores.

    The score of an answer is the output of a reward head, the reward of the objective (such as the implicit reward of
    DPO), or, without either, the log-probability of the answer.

    Logs, over pairs of answers to the same question: `accuracy`, in which equal scores count one half; `margin`, the
    mean difference of the scores; `bradley_terry`, the mean of -log sigmoid of the difference; `calibration_error`,
    the expected calibration error of the sigmoid in ten bins; `longer_accuracy`, the accuracy of preferring the longer
    answer; `accuracy_shorter_chosen`, the accuracy over pairs whose preferred answer is the shorter one; and
    `length_correlation` of scores and numbers of tokens. Without a reward head also `chosen_logprob` and
    `rejected_logprob`, the mean log-probabilities of whole answers, and `logprob_accuracy`, which compares them. The
    pairs of a question count as much as the pair of another. A test also logs the 95 % bootstrap interval of the
    accuracy over questions, as `accuracy_low` and `accuracy_high`.
    """

    monitor = ("accuracy", "max")
    logged = (*OF_SCORES, *OF_LOGPROBS)

    def __init__(self) -> None:
        super().__init__()
        self.pairs = TextRows(COLUMNS)

    def predict(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Returns the answer with the highest score, and the scores of all answers, for each question."""
        return self._records(lm.answer_scores(batch), batch)  # type: ignore[return-value]  # None is left out

    def _records(self, scores: Tensor, batch: Batch) -> list[dict[str, Any] | None]:
        records: list[dict[str, Any] | None] = [None] * len(batch)
        values = scores.tolist()
        for unit, question in zip(batch.units(), preferences_of(batch), strict=True):
            of_answers = [values[b] for b in unit]
            records[unit[0]] = {
                "prediction": question.answers[of_answers.index(max(of_answers))],
                "scores": dict(zip(answer_names(question), of_answers, strict=True)),
                "details": {"rejected": list(question.rejected), "margin": question.margin},
            }
        return records

    def update(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any] | None]:
        """Adds a batch to the metrics and returns its records, one for each question."""
        pairs = pairs_of(batch)
        scores = lm.answer_scores(batch)
        lengths = (batch.targets != IGNORE).sum(1)
        logprobs = torch.full_like(scores, torch.nan) if lm.has_readout else lm.logprobs(batch).sum(1)
        self._add(pairs, batch, [scores, lengths, logprobs])
        records = self._records(scores, batch)
        for unit, question in zip(batch.units(), preferences_of(batch), strict=True):
            records[unit[0]] = {**(records[unit[0]] or {}), "target": question.target}
        return records

    def _add(self, pairs: AnswerPairs, batch: Batch, values: Sequence[Tensor]) -> None:
        of_answers = torch.stack([value.double() for value in values])  # [values, B]
        both = torch.stack([of_answers[:, pairs.better], of_answers[:, pairs.worse]], dim=1)  # [values, 2, N]
        row_ids = [batch.row_ids[b] for b in pairs.better.tolist()]
        measures = both.flatten(0, 1).T.tolist()
        table = [[row, *columns] for row, columns in zip(row_ids, measures, strict=True)]
        self.pairs.update(row_ids, table, [{}] * len(table))

    def compute(self) -> dict[str, Tensor]:
        """Returns the metrics."""
        pairs = self.pairs.compute()
        metrics = summarize(pairs.columns, with_interval=self.stage == "test") if len(pairs) else {}
        return {name: torch.tensor(value, device=self.pairs.device) for name, value in metrics.items()}

    def figures(self) -> dict[str, Figure]:
        """Returns plots of a test: calibration, and scores over lengths."""
        pairs = self.pairs.compute()  # in every process, because it gathers rows
        if self.stage != "test" or not len(pairs):
            return {}
        from lightning_softprompt.evaluation.preferences.figures import preference_figures

        return preference_figures(pairs.columns)

    def reset(self) -> None:
        """Resets the metrics."""
        self.pairs.reset()

    def mode_of(self, name: str) -> Literal["min", "max"]:
        """Returns whether lower or higher values of a metric are better."""
        return "min" if name in LOWER else super().mode_of(name)


def answer_names(question: PreferenceExample) -> list[str]:
    """Returns the names of the answers of a question in records.

    >>> answer_names(PreferenceExample({}, "a dog", rejected=("a cat",)))
    ['chosen', 'rejected']
    """
    if len(question.answers) == 2:
        return ["chosen", "rejected"]
    return [f"answer_{number}" for number in range(1, len(question.answers) + 1)]


def credit(differences: Numbers) -> Numbers:
    """Returns 1 for each difference above 0, one half for 0, and 0 for others.

    >>> credit(np.array([0.5, 0.0, -2.0])).tolist()
    [1.0, 0.5, 0.0]
    """
    return (np.sign(differences) + 1) / 2


def calibration_error(differences: Numbers, weights: Numbers) -> float:
    """Returns the expected calibration error of the sigmoid of differences, in ten bins (Guo et al. 2017).

    The confidence is that of the answer with the higher score, between one half and 1.

    Args:
        differences: Scores of better answers minus those of worse answers [N].
        weights: The weight of each pair, 1 in total.

    >>> calibration_error(np.array([100.0, -100.0]), np.array([0.5, 0.5]))
    0.5
    """
    confidence = 1 / (1 + np.exp(-np.abs(differences)))
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights * (credit(differences) - confidence), minlength=BINS)
    return float(np.abs(gaps).sum())


def correlation(first: Numbers, second: Numbers) -> float:
    """Returns Pearson's correlation; 0 if one of the values is constant.

    >>> correlation(np.array([1.0, 1.0]), np.array([1.0, 2.0]))
    0.0
    """
    if not first.std() or not second.std():
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def summarize(columns: Mapping[str, Numbers], with_interval: bool) -> dict[str, float]:
    """Returns the metrics of pairs.

    Args:
        columns: The columns of all pairs by name, each [N].
        with_interval: Whether to add the interval of the accuracy over questions.
    """
    _, question, counts = np.unique(columns["question"], return_inverse=True, return_counts=True)
    weights = 1 / counts[question] / len(counts)  # 1 in total
    better, worse = columns["better"], columns["worse"]
    differences = better - worse
    longer = columns["better_length"] - columns["worse_length"]
    correct = credit(differences)
    scores, lengths = np.append(better, worse), np.append(columns["better_length"], columns["worse_length"])
    metrics = {
        "accuracy": float(weights @ correct),
        "margin": float(weights @ differences),
        "bradley_terry": float(weights @ np.logaddexp(0, -differences)),
        "calibration_error": calibration_error(differences, weights),
        "longer_accuracy": float(weights @ credit(longer)),
        "length_correlation": correlation(scores, lengths),
    }
    is_shorter = longer < 0
    if is_shorter.any():
        metrics["accuracy_shorter_chosen"] = float(np.average(correct[is_shorter], weights=weights[is_shorter]))
    chosen, rejected = columns["better_logprob"], columns["worse_logprob"]
    if not np.isnan(chosen).any():
        metrics |= {
            "logprob_accuracy": float(weights @ credit(chosen - rejected)),
            "chosen_logprob": float(weights @ chosen),
            "rejected_logprob": float(weights @ rejected),
        }
    if with_interval:
        of_questions = np.bincount(question, weights * correct) * len(counts)
        metrics["accuracy_low"], metrics["accuracy_high"] = bootstrap(of_questions.tolist())
    return metrics
