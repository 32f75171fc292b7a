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
    """A mixture of a shared and a private prompt per task: P_k = MLP(s LSTM_0(Z_0) + (1 - s) LSTM_k(Z_k)).

    The tasks are those of `MultitaskDataModule`; any other data module has one task.

    Paper: Wang et al. 2021, EMNLP (TransPrompt)
    Enters: soft tokens at the template's first slot, one prompt per task
    Parameters: (K + 1) * (P * H + 12 * H^2 + 16 * H) + 2 * H^2 + 2 * H; without LSTM (K + 1) * P * H + 2 * H^2 + 2 * H

    Differences from the paper: the backbone stays frozen; rows are not weighted by how typical they are, and the loss
    has no entropy term; there is one stage, on all tasks together.

    Args:
        length: P, the number of soft tokens.
        share: s, weight of the shared prompt.
        recurrent: Whether a bidirectional LSTM with two layers of width H / 2 precedes the MLP; the authors' code
            uses share 0.5 without it.
        init: Initial Z of all tasks; None draws from a normal distribution with the scale of word embeddings.
        common: Arguments of every method.

    Raises:
        ValueError: If length is below 1, or share is not between 0 and 1.
    """

    default_rate = 3e-4  # as in P-tuning, whose encoder it uses

    def __init__(
        self, length: int = 10, share: float = 0.2, recurrent: bool = True, init: Init | None = None, **common: Any
    ) -> None:
        super().__init__(**common)
        if length < 1 or not 0 <= share <= 1:
            raise ValueError(f"length must be at least 1 and share between 0 and 1, got {length} and {share}")
        self.length, self.share, self.recurrent = length, share, recurrent
        self.init = init or Normal()

    def build(self, backbone: Backbone) -> None:
        """Creates `universal` [P, H] and `private` [P, H] of each task, their encoders and the shared MLP."""
        width = backbone.hidden_size
        self.names = self.tasks or (ONLY,)
        self.universal = nn.Parameter(self.init(backbone, self.length))
        private = {name: nn.Parameter(self.init(backbone, self.length)) for name in self.names}
        self.private = nn.ParameterDict(private)
        self.encode_universal = self._build_encoder(width)
        self.encode_private = nn.ModuleDict({name: self._build_encoder(width) for name in self.names})
        self.perceptron = perceptron([width, width, width])

    def _build_encoder(self, width: int) -> nn.Module:
        return Recurrent(width, width // 2, 2, nn.Identity()) if self.recurrent else nn.Identity()

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the prompt of each row's task; one prompt if all rows belong to one task."""
        rows = task_of_rows(batch, self.names)
        shared: Tensor = self.encode_universal(self.universal)
        encoded = [self.encode_private[name](self.private[name]) for name in self.names]
        private = torch.stack(encoded)[rows]
        mixture = self.share * shared + (1 - self.share) * private
        return SoftPrompt(tokens=self.perceptron(mixture))
