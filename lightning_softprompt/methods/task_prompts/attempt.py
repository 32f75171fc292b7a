"""ATTEMPT (Asai et al., EMNLP 2022)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.init import Init, SampleVocabulary
from lightning_softprompt.prompts.prompt_attention import PromptAttention, max_embedding
from lightning_softprompt.prompts.task_ids import ONLY, task_of_rows


class ATTEMPT(SoftPromptModule):
    """A private prompt per task plus an attention-weighted mixture with source prompts: P = P_k + sum_j a_j P_j.

    The attention weights are computed for each row, by one attention for all tasks. Checkpoints refer to the files of
    the sources, which must stay in place.

    Paper: Asai et al. 2022, arXiv 2205.11961
    Enters: soft tokens at the template's first slot, input-dependent
    Parameters: K * P * H + 2 * H * M + 2 * H

    Differences from the paper: the attention does not see padding and the answer. With `train_sources`, the sources are
    trained too, which is how CrossPT (arXiv 2509.14253) mixes shared and private prompts.

    Args:
        sources: Prompts of other tasks, such as `FromCheckpoint`.
        length: P, the number of soft tokens of each prompt.
        bottleneck: M, hidden width of the attention.
        temperature: Divisor of the attention scores (default: e * H).
        attention_lr: Learning rate of the attention; prompts use the optimizer's.
        train_sources: Whether the sources are trained too.
        init: Initial private prompts, such as one of the sources (default: words sampled from the vocabulary).
        common: Arguments of every method.

    Raises:
        ValueError: If there are no sources.
    """

    sources: Tensor

    def __init__(
        self,
        sources: Sequence[Init] = (),
        length: int = 20,
        bottleneck: int = 100,
        temperature: float | None = None,
        attention_lr: float = 0.001,
        train_sources: bool = False,
        init: Init | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if not sources:
            raise ValueError("ATTEMPT requires sources, e.g. [{class_path: FromCheckpoint, init_args: {path: FILE}}]")
        self.starts, self.length, self.bottleneck = list(sources), length, bottleneck
        self.temperature, self.attention_lr, self.train_sources = temperature, attention_lr, train_sources
        self.init = init or SampleVocabulary()

    def build(self, backbone: Backbone) -> None:
        """Creates `private` [P, H] for each task and the attention, and stores `sources` [J, P, H]."""
        self.names = self.tasks or (ONLY,)
        sources = torch.stack([start(backbone, self.length) for start in self.starts])
        if self.train_sources:
            self.sources = nn.Parameter(sources)
        else:
            self.register_buffer("sources", sources)
        private = {name: nn.Parameter(self.init(backbone, self.length)) for name in self.names}
        self.private = nn.ParameterDict(private)
        self.attention = PromptAttention(backbone.hidden_size, self.bottleneck, self.temperature)

    def parameter_groups(self) -> Iterable[dict[str, Any]]:
        """Returns parameter groups with two learning rates."""
        return self.split_groups("attention", self.attention.parameters(), self.attention_lr)

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the soft tokens of each row, and the mean attention weights as logs."""
        rows = task_of_rows(batch, self.names)
        private = torch.stack([self.private[name] for name in self.names])[rows]  # [B|1, P, H]
        sources = self.sources.expand(len(private), -1, -1, -1)
        prompts = torch.cat([sources, private[:, None]], 1)  # [B|1, J + 1, P, H]
        features = max_embedding(self.loaded.embed(batch.input_ids), batch)
        weights = self.attention(features, prompts.amax(2))  # [B, J + 1]
        mixture = weights[:, None] @ prompts.flatten(2)  # [B, 1, P * H]
        mixture = mixture.view(len(batch), *private.shape[1:])
        return SoftPrompt(tokens=private + mixture, logs=self._name_weights(weights.detach().mean(0)))

    def _name_weights(self, weights: Tensor) -> dict[str, Tensor]:
        names = [*(f"source_{number}" for number in range(len(self.starts))), "private"]
        return {f"attention/{name}": weight for name, weight in zip(names, weights, strict=True)}
