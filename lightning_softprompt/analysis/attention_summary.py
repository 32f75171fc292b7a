"""Attention to the parts of rows, as means over the rows of a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_softprompt.analysis.explanation import Explanation
from lightning_softprompt.analysis.passage_effects import CONDITIONS, PASSAGE, SOFT_TOKENS, passage_masses
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
