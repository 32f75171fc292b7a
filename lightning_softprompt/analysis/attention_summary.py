"""Attention to the parts of rows, as means over the rows of a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from lightning_softprompt.analysis.explanation import Explanation
from lightning_softprompt.analysis.passage_effects import (
    CONDITIONS,
    PASSAGE,
    REVERSED,
    RUN,
    SOFT_TOKENS,
    passage_masses,
)
from lightning_softprompt.backbones.tokenization.token_names import ANSWER, START, TEMPLATE

RELEVANT, OTHERS, QUESTION = "relevant passages", "other passages", "question"
PARTS = (SOFT_TOKENS, RELEVANT, OTHERS, QUESTION, TEMPLATE, ANSWER, START)


def part_of(name: str, explanation: Explanation) -> str:
    """Returns the part in `PARTS` of tokens with a name."""
    for number, is_relevant in enumerate(explanation.is_relevant, start=1):
        if name == PASSAGE.format(number):
            return RELEVANT if is_relevant else OTHERS
    return name


def masses_by_layer(explanations: Sequence[Explanation], condition: str) -> dict[str, list[float]]:
    """Returns the attention mass of each part in each layer, as the mean over the rows that have the condition."""
    rows = [explanation for explanation in explanations if condition in explanation.attention]
    totals: dict[str, list[float]] = {}
    for explanation in rows:
        for name, masses in explanation.attention[condition].items():
            total = totals.setdefault(part_of(name, explanation), [0.0] * len(masses))
            for layer, mass in enumerate(masses):
                total[layer] += mass / len(rows)
    return {part: totals[part] for part in PARTS if part in totals}


def mean_tokens(explanations: Sequence[Explanation]) -> dict[str, float]:
    """Returns the mean number of tokens of each part."""
    rows = [explanation for explanation in explanations if explanation.num_tokens]
    totals = dict.fromkeys(PARTS, 0.0)
    for explanation in rows:
        for name, count in explanation.num_tokens.items():
            totals[part_of(name, explanation)] += count / len(rows)
    return totals


def lift(masses: Mapping[str, float], num_tokens: Mapping[str, float]) -> dict[str, float]:
    """Returns the attention mass of each part, divided by its share of the tokens without those at the start.

    Args:
        masses: The attention mass of each part.
        num_tokens: The number of tokens of each part.
    """
    total = sum(count for part, count in num_tokens.items() if part != START)
    lifts = {}
    for part, mass in masses.items():
        if part != START and num_tokens[part]:
            lifts[part] = mass / (num_tokens[part] / total)
    return lifts


def masses_by_position(explanations: Sequence[Explanation], condition: str, is_reversed: bool) -> list[float]:
    """Returns the attention mass of the passage at each position, as the mean over rows.

    Only the rows with the largest number of passages count.

    Args:
        explanations: The rows.
        condition: The condition.
        is_reversed: Whether the condition has the passages in reversed order.
    """
    measured = [explanation for explanation in explanations if condition in explanation.attention]
    count = max((len(explanation.documents) for explanation in measured), default=0)
    rows = [explanation for explanation in measured if len(explanation.documents) == count]
    totals = [0.0] * count
    for explanation in rows:
        masses = passage_masses(explanation.attention[condition], count)
        for position, mass in enumerate(reversed(masses) if is_reversed else masses):
            totals[position] += mass / len(rows)
    return totals


def conditions_of(explanations: Sequence[Explanation]) -> list[str]:
    """Returns the conditions under which attention was measured, in the order of `CONDITIONS`."""
    measured = {name for explanation in explanations for name in explanation.attention}
    return [name for name in CONDITIONS if name in measured]


@dataclass(frozen=True)
class HeadAttention:
    """Mean attention of a head to relevant passages and to the others.

    Args:
        layer: Index of the layer.
        head: Index of the head in the layer.
        relevant: Attention mass of the relevant passages of a row.
        others: Attention mass of its other passages.
        relevant_reversed: Attention mass of the relevant passages with the passages in reversed order.
    """

    layer: int
    head: int
    relevant: float
    others: float
    relevant_reversed: float


def heads_by_relevance(explanations: Sequence[Explanation]) -> list[HeadAttention]:
    """Returns the attention of each head, those with most attention to relevant passages first.

    Only rows with relevant and other passages count; without such rows, the list is empty.

    Args:
        explanations: The rows.
    """
    rows = []
    for explanation in explanations:
        has_both = any(explanation.is_relevant) and not all(explanation.is_relevant)
        if has_both and explanation.head_attention:
            rows.append(explanation)
    if not rows:
        return []
    relevant = _mean_by_head(rows, RUN, is_relevant=True)
    others = _mean_by_head(rows, RUN, is_relevant=False)
    relevant_reversed = _mean_by_head(rows, REVERSED, is_relevant=True)
    heads = []
    for layer, masses in enumerate(relevant):
        for head, mass in enumerate(masses):
            heads.append(HeadAttention(layer, head, mass, others[layer][head], relevant_reversed[layer][head]))
    return sorted(heads, key=attrgetter("relevant"), reverse=True)


def _mean_by_head(rows: Sequence[Explanation], condition: str, is_relevant: bool) -> list[list[float]]:
    """Returns the attention mass [layers][heads] of passages of a kind, as the mean over rows."""
    first = next(iter(rows[0].head_attention[condition].values()))
    totals = [[0.0] * len(by_head) for by_head in first]
    for row in rows:
        for number, row_is_relevant in enumerate(row.is_relevant, start=1):
            masses = row.head_attention[condition].get(PASSAGE.format(number))
            if masses is None or row_is_relevant != is_relevant:
                continue
            for layer, by_head in enumerate(masses):
                for head, mass in enumerate(by_head):
                    totals[layer][head] += mass / len(rows)
    return totals
