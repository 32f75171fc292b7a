"""The contract of difficulty scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lightning_softprompt.core.types import Encoded
from lightning_softprompt.data.prepared import PreparedRows

Scores = npt.NDArray[np.float64]


class ScoringModel(Protocol):
    """Measures losses of rows with the backbone of a training."""

    def bare_losses(self, rows: PreparedRows) -> Scores:
        """Returns the mean loss per target token of each row without prompt; it is stored in a file."""

    def losses_without_source(self, rows: PreparedRows) -> Scores:
        """Returns the same as `bare_losses` for rows with empty columns; it is stored in a file."""

    def current_losses(self, rows: PreparedRows) -> Scores:
        """Returns the mean loss per target token of each row with the prompt at this point of the training."""


class Difficulty(ABC):
    """Scores the difficulty of training rows."""

    @abstractmethod
    def scores(self, rows: PreparedRows, model: ScoringModel) -> Scores:
        """Returns a score of each row; a higher score is more difficult.

        Args:
            rows: The training rows.
            model: Measures losses, if the score needs them.
        """


def read_encoded(rows: PreparedRows) -> list[Encoded]:
    """Returns the tokens of each row. Rows on disk are read one by one."""
    return [rows.encoded[row] for row in range(len(rows))]
