"""Difficulty from the tokens of a row alone: their number and their rarity."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import final

import numpy as np

from lightning_softprompt.core.types import IGNORE, Encoded
from lightning_softprompt.data.difficulty.base import Difficulty, Scores, ScoringModel, read_encoded
from lightning_softprompt.data.prepared import PreparedRows


@final
@dataclass(frozen=True)
class TargetTokens(Difficulty):
    """The number of target tokens."""

    def scores(self, rows: PreparedRows, model: ScoringModel) -> Scores:
        """Returns the number of target tokens of each row."""
        return np.array([len(target_tokens(row)) for row in read_encoded(rows)], dtype=np.float64)


@final
@dataclass(frozen=True)
class PromptTokens(Difficulty):
    """The number of input tokens without the answer."""

    def scores(self, rows: PreparedRows, model: ScoringModel) -> Scores:
        """Returns the number of input tokens of each row."""
        return np.array([len(source_tokens(row)) for row in read_encoded(rows)], dtype=np.float64)


@final
@dataclass(frozen=True)
class Rarity(Difficulty):
    """The negative log-likelihood of a row's tokens by their frequency in the training rows (Platanios et al. 2019).

    Args:
        average: Whether to divide by the number of tokens; the sum of the paper also grows with the length.
    """

    average: bool = False

    def scores(self, rows: PreparedRows, model: ScoringModel) -> Scores:
        """Returns the rarity of each row's input and target tokens."""
        tokens_by_row = [[*source_tokens(row), *target_tokens(row)] for row in read_encoded(rows)]
        counts = Counter(token for tokens in tokens_by_row for token in tokens)
        log_total = np.log(counts.total())
        rarity = {token: log_total - np.log(count) for token, count in counts.items()}
        sums = np.array([sum(rarity[token] for token in tokens) for tokens in tokens_by_row], dtype=np.float64)
        if not self.average:
            return sums
        return sums / np.array([max(1, len(tokens)) for tokens in tokens_by_row])


@final
@dataclass(frozen=True)
class RandomDifficulty(Difficulty):
    """A random score, as a control: a curriculum is better than random only if it beats the same one with this score.

    Args:
        seed: Seed of the scores.
    """

    seed: int = 0

    def scores(self, rows: PreparedRows, model: ScoringModel) -> Scores:
        """Returns a random number for each row."""
        return np.random.default_rng(self.seed).random(len(rows))


def source_tokens(row: Encoded) -> list[int]:
    """Returns the input tokens of a row without its answer."""
    answers = set(row.answers)
    return [token for position, token in enumerate(row.ids) if position not in answers]


def target_tokens(row: Encoded) -> list[int]:
    """Returns the target tokens of a row."""
    return [token for token in row.targets if token != IGNORE]
