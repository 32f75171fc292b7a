"""The explanation of rows of a question-answering test by their passages, and measures over the rows of a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from math import fsum
from typing import Any

from lightning_softprompt.analysis.passage_effects import RUN, AnswerEffects, HeadMasses, LayerMasses, passage_masses
from lightning_softprompt.evaluation.metrics.intervals import bootstrap, share_interval

GENERATED, RIGHT = "generated", "right"  # the answer that the model generated, and the right answer
Values = dict[str, Any]

USE, CHANCE = "use", "chance"
MEASURES = {
    USE: "share of rows in which the passage with the largest effect is relevant",
    CHANCE: "share of passages that are relevant",
    "leak": "mean leave-one-out effect of passages that are not relevant",
    "leak_per_token": "the same, divided by the number of tokens of the answer",
    "relevant_effect": "mean effect of relevant passages",
    "other_effect": "mean effect of other passages",
    "relevant_interaction": "mean interaction of pairs of relevant passages; below 0 if one of them suffices",
    "gain": "log p(answer) with all passages minus without passages",
    "gradient_agreement": "rank correlation of gradient x input and leave-one-out effects, within rows",
    "attention_agreement": "rank correlation of attention and leave-one-out effects, within rows",
}


@dataclass(frozen=True)
class Explanation:
    """What the passages of a row do to its answers.

    Args:
        row: The row, as in the predictions of the test.
        question: The question.
        prediction: The answer that the model generated.
        target: The right answer.
        documents: The document of each passage.
        texts: The text of each passage.
        is_relevant: Whether each passage is of a gold document or contains the right answer.
        answers: The effects on `GENERATED` and `RIGHT`; an empty answer is left out.
        attention: The attention of the positions that predict the generated answer, by condition, see
            `PassageEffects.attention_by_condition`. Empty if it was not measured.
        num_tokens: Number of tokens of each part of the row; empty without attention.
        head_attention: The same attention in each head, of the passages in the order of the run and reversed.
    """

    row: int
    question: str
    prediction: str
    target: str
    documents: list[str]
    texts: list[str]
    is_relevant: list[bool]
    answers: dict[str, AnswerEffects]
    attention: dict[str, LayerMasses]
    num_tokens: dict[str, int]
    head_attention: dict[str, HeadMasses] = field(default_factory=dict)

    def to_record(self) -> Values:
        """Returns the values as in `explain.jsonl`."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Explanation:
        """Returns the explanation with the values of a record."""
        answers = {name: AnswerEffects(**effects) for name, effects in record["answers"].items()}
        return cls(**{**record, "answers": answers})

    def measure(self, name: str) -> dict[str, float]:
        """Returns the measures of an answer; those that are not defined for the row are left out.

        Args:
            name: `GENERATED` or `RIGHT`.
        """
        if name not in self.answers:
            return {}
        effects = self.answers[name]
        measures = {"gain": effects.log_p_all - effects.log_p_none}
        relevant, others = self._split(effects.effects)
        if relevant:
            measures["relevant_effect"] = _mean(relevant)
        if others:
            measures["other_effect"] = _mean(others)
            _, left_out = self._split(effects.leave_one_out)
            measures["leak"] = _mean(left_out)
            measures["leak_per_token"] = measures["leak"] / effects.num_tokens
        _add(measures, "relevant_interaction", self._relevant_interaction(effects))
        if relevant and others:
            measures[USE] = float(max(relevant) > max(others))
            measures[CHANCE] = len(relevant) / len(self.is_relevant)
        _add(measures, "gradient_agreement", rank_correlation(effects.gradient, effects.leave_one_out))
        if name == GENERATED and RUN in self.attention:
            masses = passage_masses(self.attention[RUN], len(self.documents))
            _add(measures, "attention_agreement", rank_correlation(masses, effects.leave_one_out))
        return measures

    def _relevant_interaction(self, effects: AnswerEffects) -> float | None:
        """Returns the mean interaction of two relevant passages; None without such a pair."""
        if effects.interactions is None:
            return None
        relevant = [index for index, is_relevant in enumerate(self.is_relevant) if is_relevant]
        pairs = [effects.interactions[one][other] for one, other in combinations(relevant, 2)]
        return _mean(pairs) if pairs else None

    def _split(self, values: Sequence[float]) -> tuple[list[float], list[float]]:
        """Returns the values of relevant passages, and of the others."""
        by_relevance: dict[bool, list[float]] = {True: [], False: []}
        for value, is_relevant in zip(values, self.is_relevant, strict=True):
            by_relevance[is_relevant].append(value)
        return by_relevance[True], by_relevance[False]


def _add(measures: dict[str, float], name: str, value: float | None) -> None:
    if value is not None:
        measures[name] = value


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values)


def rank_correlation(values: Sequence[float], others: Sequence[float]) -> float | None:
    """Returns Spearman's rank correlation; None if it is not defined, as for a single value or equal values.

    >>> rank_correlation([1.0, 5.0, 3.0], [0.1, 0.3, 0.2])
    1.0
    """
    from scipy.stats import spearmanr

    if len(set(values)) < 2 or len(set(others)) < 2:
        return None
    return round(float(spearmanr(values, others).statistic), 12)


def summarize(explanations: Sequence[Explanation]) -> dict[str, dict[str, Values]]:
    """Returns the mean of each measure over rows with its 95 % interval and number of rows, by answer."""
    summary: dict[str, dict[str, Values]] = {}
    for answer in (GENERATED, RIGHT):
        rows = [explanation.measure(answer) for explanation in explanations]
        summary[answer] = {}
        for name in MEASURES:
            values = [measures[name] for measures in rows if name in measures]
            if values:
                mean = _mean(values)
                low, high = share_interval(mean, len(values)) if name == USE else bootstrap(values)
                summary[answer][name] = {"mean": mean, "low": low, "high": high, "rows": len(values)}
    return summary


def compare(explanations: Sequence[Explanation], others: Sequence[Explanation]) -> dict[str, dict[str, Values]]:
    """Returns differences of measures from another run, with 95 % intervals by paired bootstrap over rows.

    Args:
        explanations: Rows of this run.
        others: The same rows of the other run. Differences are this run minus the other run.

    Raises:
        ValueError: If a row has another question or right answer in the other run, or the other run lacks it.
    """
    other_by_row = {other.row: other for other in others}
    pairs = []
    for explanation in explanations:
        other = other_by_row.get(explanation.row)
        if other is None:
            raise ValueError(f"row {explanation.row} is not in the other run; test both on the same rows")
        if (explanation.question, explanation.target) != (other.question, other.target):
            raise ValueError(
                f"row {explanation.row} has the question {explanation.question!r} in one run and {other.question!r} in "
                "the other, or another right answer; test both on the same rows"
            )
        pairs.append((explanation, other))
    comparison: dict[str, dict[str, Values]] = {}
    for answer in (GENERATED, RIGHT):
        rows = [(explanation.measure(answer), other.measure(answer)) for explanation, other in pairs]
        comparison[answer] = {}
        for name in MEASURES:
            values = [(this[name], other[name]) for this, other in rows if name in this and name in other]
            if values and name != CHANCE:  # the same in both runs
                comparison[answer][name] = _difference(values)
    return comparison


def _difference(pairs: Sequence[tuple[float, float]]) -> Values:
    differences = [value - other for value, other in pairs]
    low, high = bootstrap(differences)
    return {
        "this": _mean([value for value, _ in pairs]),
        "other": _mean([other for _, other in pairs]),
        "difference": _mean(differences),
        "low": low,
        "high": high,
        "rows": len(pairs),
    }
