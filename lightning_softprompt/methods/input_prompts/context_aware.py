"""Context-aware prompt tuning (Blau et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.causal import CausalBackbone
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.demonstrations import FORMAT, INPUT, Context


class ContextAware(SoftPromptModule):
    """Demonstrations as the prompt (CPT), whose inputs, but not answers, are tuned within a small radius: E[c] + delta.

    The demonstrations are `data.demonstrations` training rows of each class. Without training, this is in-context
    learning. Reports the penalty `context`, the loss on the answers of the demonstrations; its weight is 1 unless
    `penalty_weights` sets it.

    Paper: Blau et al. 2024, arXiv 2410.17222
    Enters: soft tokens at the template's first slot
    Parameters: P * H for demonstrations of P tokens

    Differences from the paper: the projection follows the optimizer step, not the forward pass; the losses on the
    answers of the demonstrations and of the row are added, not averaged over their tokens, which is equal up to scale.

    Args:
        epsilon_input: Largest change of a token of a column, in units of sqrt(H / 2048).
        epsilon_format: Largest change of a token of the template, in the same units.
        decay: gamma; the answer of the last demonstration has the weight gamma, that of the previous one gamma^2.
        common: Arguments of every method.
    """

    default_penalty_weights: ClassVar[Mapping[str, float]] = {"context": 1.0}
    words: Tensor
    reach: Tensor
    weights: Tensor

    def __init__(
        self, epsilon_input: float = 0.1, epsilon_format: float = 0.1, decay: float = 0.95, **common: Any
    ) -> None:
        super().__init__(**common)
        self.epsilons, self.decay = {INPUT: epsilon_input, FORMAT: epsilon_format}, decay

    def build(self, backbone: Backbone) -> None:
        """Creates `delta` [P, H]."""
        if self.classes is None or not self.classes.demonstrations:
            raise ValueError("ContextAware requires demonstrations; set data.demonstrations to the number per class")
        if not isinstance(backbone, CausalBackbone):
            raise ValueError(f"ContextAware requires a decoder-only backbone; {backbone.spec.name} is not one")
        template = Template(self.classes.template)
        self.context = Context.from_rows(backbone.codec, template, self.classes.demonstrations)
        unit = (backbone.hidden_size / 2048) ** 0.5
        kinds = self.context.kinds
        reach = sum(epsilon * unit * (kinds == kind) for kind, epsilon in self.epsilons.items())
        ids = self.context.ids.to(backbone.word_embeddings.device)
        self.register_buffer("words", backbone.embed(ids).detach().float(), persistent=False)
        self.register_buffer("reach", torch.as_tensor(reach)[:, None], persistent=False)
        self.register_buffer("weights", self.context.weights(self.decay), persistent=False)
        self.delta = nn.Parameter(torch.zeros(self.words.shape))

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the same demonstrations for every row."""
        moved = self.delta * (self.reach > 0)
        penalties = {"context": self._context_loss(moved)} if self.training else {}
        return SoftPrompt(tokens=(self.words + moved)[None], penalties=penalties)

    def _context_loss(self, moved: Tensor) -> Tensor:
        """Cross entropy of the answer of each demonstration, given the preceding demonstrations."""
        batch = self.context.batch().to(moved.device)
        before = moved.new_zeros(len(self.context.start), moved.shape[1])
        shift = SoftPrompt(shift=torch.cat([before, moved])[None])
        return (self.loaded.cross_entropy(batch, shift)[0] * self.weights).sum()

    @torch.no_grad()
    def project(self) -> None:
        """Projects the change of each token onto the ball of its radius."""
        norm = self.delta.norm(dim=1, keepdim=True)
        largest = torch.maximum(norm, self.reach).clamp(min=1e-30)
        self.delta.mul_(self.reach / largest)
