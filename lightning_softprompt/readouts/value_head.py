"""Values of the states before the tokens of an answer, from a trained linear head."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.types import Batch, Classes, SoftPrompt
from lightning_softprompt.prompts.init import SampleVocabulary
from lightning_softprompt.readouts.base import Readout


@final
class ValueHead(Readout):
    """A linear map of the state before each token of an answer to its value, the expected return (`PPO`).

    By default, it reads the states of the policy without changing them, so that values cost no further pass of the
    backbone. Weights and bias begin with 0. It is saved with the prompt.

    Args:
        codec: Codec of the backbone.
        classes: No classes, since tokens are scored.
        own_tokens: Number of soft tokens of the value function. If it is above 0, the head reads the states of a
            separate pass, with these tokens in place of the policy's prompt; they are trained with the head.
        lr: Learning rate of the head; null for that of the prompt.

    Raises:
        ValueError: If there are classes, or an argument is out of range.
    """

    scores_tokens = True

    def __init__(self, codec: Codec, classes: Classes, own_tokens: int = 0, lr: float | None = 0.001) -> None:
        super().__init__(codec, classes)
        if len(classes):
            raise ValueError(
                f"ValueHead scores tokens of answers, but the data has the classes {list(classes.names)[:3]}; use "
                "PromptDataModule, or another readout"
            )
        if own_tokens < 0 or (lr is not None and lr <= 0):
            raise ValueError(f"own_tokens must be at least 0 and lr above 0 in ValueHead, got {own_tokens} and {lr}")
        self.own_tokens, self.lr = own_tokens, lr

    def build(self, backbone: Backbone) -> None:
        """Creates weights [1, H] and bias, and the soft tokens [P, H] of the value function."""
        self.linear = nn.Linear(backbone.head.layer.weight.shape[1], 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        if self.own_tokens:
            self.tokens = nn.Parameter(SampleVocabulary()(backbone, self.own_tokens))

    def forward(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Computes values [B, U] in float32."""
        if self.own_tokens:
            hidden = lm.backbone.states(batch, SoftPrompt(tokens=self.tokens[None])).hidden
        else:
            hidden = lm.states(batch).hidden.detach()
        return self.linear(hidden.to(self.linear.weight.dtype)).squeeze(-1)  # type: ignore[no-any-return]
