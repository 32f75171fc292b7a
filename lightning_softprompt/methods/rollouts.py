"""`Rollouts`: what a method learns from in each training step, for objectives that take several steps for a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch
from lightning_softprompt.objectives.base import Objective
from lightning_softprompt.objectives.policy.experience import Experience


@final
class Rollouts:
    """Gives the rows of each training step: those of the batch, or a part of the answers that were sampled for it.

    A rollout is what an objective samples for one batch. It takes `objective.steps_per_batch` steps to learn from it,
    in which the loader returns the same batch.

    Args:
        objective: The objective of the training.

    Attributes:
        number: Number of earlier rollouts.
        turn: Number of the next step of the current rollout, from 0.
        is_stopped: Whether the remaining steps of the rollout are skipped.
        has_learned: Whether a gradient was computed since the last optimizer step.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.number, self.turn = 0, 0
        self.is_stopped = self.has_learned = False
        self._rows: Batch | None = None
        self._questions: Sequence[int] = ()
        self._state: Mapping[str, Any] | None = None  # of a checkpoint, until the device is known

    def next(self, lm: PromptedLM, batch: Batch) -> Batch:
        """Returns the rows of the next step.

        Args:
            lm: The language model that is trained.
            batch: The batch of the step.

        Raises:
            ValueError: If a rollout is not complete, but the batch has other rows.
        """
        steps = self.objective.steps_per_batch
        questions = batch.global_row_ids
        if self._state is not None:
            self._rows, self._state = Experience.from_state(self._state, batch.mask.device), None
        if self.turn == 0 or self._rows is None:
            self._rows = self.objective.begin(lm, batch)
            self._questions, self.is_stopped = questions, False
        elif list(questions) != list(self._questions):
            raise ValueError(
                f"{type(self.objective).__name__} learns from each batch in {steps} steps, but the loader returned "
                "another batch before the last of them; use a data module of this package, which repeats its batches"
            )
        rows = self.objective.select(self._rows, self.number, self.turn)
        self.turn += 1
        if self.turn == steps:
            self.number, self.turn, self._rows = self.number + 1, 0, None
        return rows

    def check(self, change: Tensor) -> bool:
        """Stops the rollout if the policy has changed too much, and returns whether it is stopped.

        Args:
            change: The logged value `policy_change`, the mean over all processes.
        """
        limit = self.objective.max_policy_change
        self.is_stopped = limit is not None and float(change) > limit
        return self.is_stopped

    def state(self) -> dict[str, Any]:
        """Returns the position and the rows of an incomplete rollout for a checkpoint."""
        position = {"number": self.number, "turn": self.turn, "is_stopped": self.is_stopped}
        rows = self._rows.state() if isinstance(self._rows, Experience) else self._state
        return position if rows is None else {**position, "questions": list(self._questions), "rows": rows}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Resumes at a position. Without rows, the rollout samples answers again for its remaining steps."""
        self.number, self.turn, self.is_stopped = state["number"], state["turn"], state["is_stopped"]
        self._rows, self._state, self._questions = None, state.get("rows"), state.get("questions", ())
