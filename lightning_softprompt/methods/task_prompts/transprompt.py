"""TransPrompt (Wang et al., EMNLP 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.init import Init, Normal
from lightning_softprompt.prompts.networks import Recurrent, perceptron
from lightning_softprompt.prompts.task_ids import ONLY, task_of_rows


class TransPrompt(SoftPromptModule):
    """What all tasks share and what each has of its own, mixed: P_k = MLP(s LSTM_0(Z_0) + (1 - s) LSTM_k(Z_k)).

    The tasks are those of `MultitaskDataModule`; with any other data there is one.

    Paper: Wang et al. 2021, EMNLP (TransPrompt)
    Enters: soft tokens at the template's first slot, other ones for each task
    Parameters: (K + 1) * (P * H + 12 * H^2 + 16 * H) + 2 * H^2 + 2 * H; without LSTM (K + 1) * P * H + 2 * H^2 + 2 * H

    Differences from the paper: the backbone stays frozen; rows are not weighed by how typical they are, and the entropy
    of answers is not part of the loss; there is one stage, on all tasks together.

    Args:
        length: P.
        share: s, how much of the prompt is shared.
        recurrent: Whether a bidirectional LSTM of two layers and width H / 2 is before the MLP; the authors' code has
            share 0.5 without.
        init: Z of all; None draws normally distributed numbers of the scale of the backbone's word embeddings.
        common: Arguments of every method.

    Raises:
        ValueError: If the length is not at least 1, or the share not between 0 and 1.
    """

    default_rate = 3e-4  # as of P-tuning, which it is made of

    def __init__(
        self, length: int = 10, share: float = 0.2, recurrent: bool = True, init: Init | None = None, **common: Any
    ) -> None:
        super().__init__(**common)
        if length < 1 or not 0 <= share <= 1:
            raise ValueError(f"length must be at least 1 and share from 0 to 1, got {length} and {share}")
        self.length, self.share, self.recurrent, self.init = length, share, recurrent, init or Normal()

    def build(self, backbone: Backbone) -> None:
        """Makes `universal` [P, H] and `private` [P, H] of each task, an encoder of each, and the MLP of all."""
        width = backbone.hidden_size
        self.names = self.tasks or (ONLY,)
        self.universal = nn.Parameter(self.init(backbone, self.length))
        self.private = nn.ParameterDict({n: nn.Parameter(self.init(backbone, self.length)) for n in self.names})
        self.encode_universal = self._encoder(width)
        self.encode_private = nn.ModuleDict({name: self._encoder(width) for name in self.names})
        self.perceptron = perceptron([width, width, width])

    def _encoder(self, width: int) -> nn.Module:
        return Recurrent(width, width // 2, 2, nn.Identity()) if self.recurrent else nn.Identity()

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Each row's task's own; the same for every row where they are of one task."""
        rows = task_of_rows(batch, self.names)
        shared: Tensor = self.encode_universal(self.universal)
        private = torch.stack([self.encode_private[name](self.private[name]) for name in self.names])[rows]
        return SoftPrompt(tokens=self.perceptron(self.share * shared + (1 - self.share) * private))
