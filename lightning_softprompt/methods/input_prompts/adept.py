"""ADePT (Tang et al., ICLR 2025)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.init import Init, SampleVocabulary
from lightning_softprompt.prompts.networks import at_least_float32


class ADePT(SoftPromptModule):
    """A short prompt, and a shift of the input embeddings by token: x + W_up ReLU(W_down x + b_1) + b_2.

    Paper: Tang et al. 2025, arXiv 2501.03291
    Enters: soft tokens at the template's first slot, and the embeddings of the input
    Parameters: P * H + 2 * H * R + R + H

    Differences from the paper: W_up and b_2 start at zero, so that the input is initially unchanged; the answer is not
    shifted, so that training and generation see the same inputs.

    Args:
        length: P, the number of soft tokens.
        bottleneck: R, hidden width of the network.
        update_lr: Learning rate of the network; the soft tokens use the optimizer's.
        init: Initial soft tokens (default: embeddings of words sampled from the vocabulary).
        common: Arguments of every method.
    """

    def __init__(
        self,
        length: int = 40,
        bottleneck: int = 17,
        update_lr: float = 5e-4,
        init: Init | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.length, self.bottleneck, self.update_lr = length, bottleneck, update_lr
        self.init = init or SampleVocabulary()

    def build(self, backbone: Backbone) -> None:
        """Creates `tokens` [P, H] and the network."""
        self.tokens = nn.Parameter(self.init(backbone, self.length))
        up = nn.Linear(self.bottleneck, backbone.hidden_size)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.network = nn.Sequential(nn.Linear(backbone.hidden_size, self.bottleneck), nn.ReLU(), up)

    def parameter_groups(self) -> Iterable[dict[str, Any]]:
        """Returns parameter groups with two learning rates."""
        return self.split_groups("update", self.network.parameters(), self.update_lr)

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the same soft tokens for every row, and the shift [B, T, H] of each row."""
        embeds = at_least_float32(self.loaded.embed(batch.input_ids))
        return SoftPrompt(tokens=self.tokens[None], shift=self.network(embeds) * batch.source[..., None])
