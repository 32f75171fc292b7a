"""`Experience`: sampled answers with everything that learning from them requires."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, final

import torch
from torch import Tensor

from lightning_softprompt.core.types import Batch, Encoded


@final
@dataclass(kw_only=True)
class Experience(Batch):
    """Questions with the answers that a policy sampled: B rows with U tokens of answers.

    Rows of a question are adjacent and have the same number in `groups`. The old policy is the one that sampled them.

    Args:
        answer_mask: Tokens [B, U] that are learned from: those of answers, without answers that are left out.
        rewards: The reward [B] of each answer, as the reward function returned it.
        parts: The parts [B, parts] of the reward, in the order of `Reward.part_names`.
        advantages: How much better [B, U] each token is than expected; 0 outside of answers.
        old_logprobs: Log-probabilities [B, U] under the old policy; None if they are those of the only step.
        reference_logprobs: Log-probabilities [B, U] under the reference; None without one.
        values: Values [B, U] of the states before the tokens, by the old value function; None without one.
        returns: What values [B, U] are trained to predict; None without a value function.
    """

    answer_mask: Tensor
    rewards: Tensor
    parts: Tensor
    advantages: Tensor
    old_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch, answer_mask: Tensor, rewards: Tensor, parts: Tensor | None = None) -> Self:
        """Adds rewards [B], their parts [B, parts] and the mask [B, U] of answers to a batch; advantages are 0."""
        advantages = torch.zeros_like(answer_mask, dtype=rewards.dtype)
        parts = rewards.new_empty(len(rewards), 0) if parts is None else parts
        return batch.extend(cls, answer_mask=answer_mask, rewards=rewards, parts=parts, advantages=advantages)

    def state(self) -> dict[str, Any]:
        """Returns the rows as tensors, lists and numbers for a checkpoint, without their texts."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value.cpu() for name, value in values.items() if isinstance(value, Tensor)}
        encoded = [list(row) for row in self.require_encoded()]
        return {"tensors": tensors, "encoded": encoded, "rows": list(self.row_ids), "ids": list(self.global_row_ids)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> Self:
        """Returns the rows of `state` on a device."""
        tensors = {name: tensor.to(device) for name, tensor in state["tensors"].items()}
        encoded = tuple(Encoded(*row) for row in state["encoded"])
        return cls(**tensors, encoded=encoded, row_ids=tuple(state["rows"]), global_row_ids=tuple(state["ids"]))
