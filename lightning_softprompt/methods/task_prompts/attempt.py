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
    """A private prompt for each task, and a mixture of it and of frozen prompts of sources: P = P_k + sum_j a_j P_j.

    How much each counts is attended to row by row. The attention is shared by all tasks. Files that sources come from
    must stay where they are, to load a checkpoint.

    Paper: Asai et al. 2022, arXiv 2205.11961
    Enters: soft tokens at the template's first slot, other ones for each row
    Parameters: K * P * H + 2 * H * M + 2 * H

    Differences from the paper: padding and the answer are left out of what the attention sees. With `train_sources` the
    sources are trained too, which is how shared and private prompts are mixed in CrossPT (arXiv 2509.14253).

    Args:
        sources: Prompts of other tasks, such as `FromCheckpoint`.
        length: P, the same for all.
        bottleneck: M, width of the attention's middle.
        temperature: What the attention's scores are divided by; None takes e * H.
        attention_lr: Learning rate of the attention; prompts take the optimizer's.
        train_sources: Whether the sources are trained too.
        init: Where private prompts start, as from one of the sources; None draws words of the vocabulary.
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
            raise ValueError("ATTEMPT wants sources, such as [{class_path: FromCheckpoint, init_args: {path: FILE}}]")
        self.starts, self.length, self.bottleneck = list(sources), length, bottleneck
        self.temperature, self.attention_lr, self.train_sources = temperature, attention_lr, train_sources
        self.init = init or SampleVocabulary()

    def build(self, backbone: Backbone) -> None:
        """Makes `private` [P, H] for each task and the attention, and keeps `sources` [J, P, H]."""
        self.names = self.tasks or (ONLY,)
        sources = torch.stack([start(backbone, self.length) for start in self.starts])
        if self.train_sources:
            self.sources = nn.Parameter(sources)
        else:
            self.register_buffer("sources", sources)
        self.private = nn.ParameterDict({n: nn.Parameter(self.init(backbone, self.length)) for n in self.names})
        self.attention = PromptAttention(backbone.hidden_size, self.bottleneck, self.temperature)

    def parameter_groups(self) -> Iterable[dict[str, Any]]:
        """Two learning rates."""
        return self.split_groups("attention", self.attention.parameters(), self.attention_lr)

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Other ones for each row; logs how much each source, and the private prompt, counted."""
        rows = task_of_rows(batch, self.names)
        private = torch.stack([self.private[name] for name in self.names])[rows]  # [B|1, P, H]
        each = torch.cat([self.sources.expand(len(private), -1, -1, -1), private[:, None]], 1)  # [B|1, J + 1, P, H]
        features = max_embedding(self.loaded.embed(batch.input_ids), batch)
        shares = self.attention(features, each.amax(2))  # [B, J + 1]
        mixture = (shares[:, None] @ each.flatten(2)).view(len(batch), *private.shape[1:])
        return SoftPrompt(tokens=private + mixture, logs=self._told(shares.detach().mean(0)))

    def _told(self, shares: Tensor) -> dict[str, Tensor]:
        names = [*(f"source_{number}" for number in range(len(self.starts))), "private"]
        return {f"attention/{name}": share for name, share in zip(names, shares, strict=True)}
