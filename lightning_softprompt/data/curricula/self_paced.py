"""Self-paced learning: rows whose loss under the current model is below a rising threshold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch

from lightning_softprompt.data.curricula.base import Curriculum, RowPlan, rank_rows
from lightning_softprompt.data.difficulty.base import Scores, ScoringModel
from lightning_softprompt.data.prepared import PreparedRows
from lightning_softprompt.data.sampling.row_order import WINDOW, Indices, Pool, Position, RowOrder

LOSSES, LOSSES_EPOCH, THRESHOLD = "losses of rows", "epoch of the losses", "threshold of the losses"


@final
@dataclass(frozen=True)
class SelfPaced(Curriculum):
    """Uses the rows whose loss is below a threshold, which grows in each epoch (Kumar, Packer and Koller 2010).

    The losses of all training rows are computed at the start of each epoch, with the prompt at that point and without
    dropout. This takes about a third of the time of an epoch. All processes share the work. Once all rows are below the
    threshold, an epoch uses each of them once.

    Args:
        threshold: Threshold of the first epoch, in nats per target token (default: the median of the losses).
        growth: Factor by which the threshold grows in each epoch.

    Raises:
        ValueError: If the threshold is not above 0, or does not grow.
    """

    threshold: float | None = None
    growth: float = 1.3

    uses_trained_model = True

    def __post_init__(self) -> None:
        if self.growth <= 1 or (self.threshold is not None and self.threshold <= 0):
            raise ValueError(
                f"growth must be above 1 and threshold above 0, got {self.growth} and {self.threshold}; rows above "
                "the threshold would never be used"
            )

    def plan(self, rows: PreparedRows, model: ScoringModel) -> RowPlan:
        """Returns an order that measures the losses at the start of each epoch."""
        return RowPlan(SelfPacedOrder(self, lambda: model.current_losses(rows)))


@final
class SelfPacedOrder(RowOrder):
    """The order of `SelfPaced`.

    Args:
        settings: Threshold and growth.
        measure: Returns the loss of each row under the current model.
    """

    def __init__(self, settings: SelfPaced, measure: Callable[[], Scores]) -> None:
        self.settings, self._measure = settings, measure
        self._epoch: int | None = None  # of the losses
        self._losses: Scores = np.zeros(0)
        self._first_threshold = settings.threshold

    def _update(self, epoch: int) -> None:
        """Measures the losses, once per epoch."""
        if self._epoch == epoch:
            return
        self._losses, self._epoch = self._measure(), epoch
        if self._first_threshold is None:
            self._first_threshold = float(np.median(self._losses))

    def threshold(self, epoch: int) -> float:
        """Returns the threshold of an epoch."""
        self._update(epoch)
        assert self._first_threshold is not None
        return float(self._first_threshold * self.settings.growth**epoch)

    def is_plain(self, position: Position) -> bool:
        """Whether all rows are below the threshold."""
        return bool((self._losses_of(position.epoch) < self.threshold(position.epoch)).all())

    def _losses_of(self, epoch: int) -> Scores:
        self._update(epoch)
        return self._losses

    def ranked(self, epoch: int) -> Indices:
        """Returns all rows by their losses."""
        return rank_rows(self._losses_of(epoch))

    def pool(self, ranked: Indices, position: Position) -> Pool:
        """Returns the rows below the threshold."""
        losses = self._losses_of(position.epoch)[ranked]
        return Pool(ranked[losses < self.threshold(position.epoch)], WINDOW)

    @property
    def identity(self) -> Mapping[str, Any]:
        """The settings."""
        return {"settings": repr(self.settings)}

    @property
    def state(self) -> dict[str, Any]:
        """The losses of the epoch, and the threshold of the first epoch."""
        if self._epoch is None:
            return {}
        return {
            LOSSES: torch.from_numpy(self._losses.copy()),
            LOSSES_EPOCH: self._epoch,
            THRESHOLD: self._first_threshold,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Sets the losses of a saved epoch."""
        if LOSSES in state:
            self._losses, self._epoch = state[LOSSES].numpy(), state[LOSSES_EPOCH]
            self._first_threshold = state[THRESHOLD]
