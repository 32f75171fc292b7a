"""Context-aware prompt tuning (Blau et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.causal import CausalBackbone
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.demonstrations import FORMAT, INPUT, Context


class ContextAware(SoftPromptModule):
    """Demonstrations as the prompt (CPT), of which the words, but not the answers, move a little: E[c] + delta.

    The demonstrations are `data.demonstrations` training rows of each class. Untrained, this is in-context learning.
    Reports the penalty `context`, the loss on the demonstrations' own answers, weighed 1 unless `penalty_weights` says
    otherwise.

    Paper: Blau et al. 2024, arXiv 2410.17222
    Enters: soft tokens at the template's first slot
    Parameters: P * H for demonstrations of P tokens

    Differences from the paper: the projection follows the optimizer's step, not the forward pass; the losses on the
    demonstrations' answers and on the row's are added, not averaged over their tokens, which is the same up to scale.

    Args:
        epsilon_input: How far a token of a column may move, in units of sqrt(H / 2048).
        epsilon_format: How far a token of the template may move.
        decay: gamma; the answer of the last demonstration weighs gamma, that of the one before gamma^2.
        common: Arguments of every method.
    """

    words: Tensor
    reach: Tensor
    weights: Tensor

    def __init__(
        self, epsilon_input: float = 0.1, epsilon_format: float = 0.1, decay: float = 0.95, **common: Any
    ) -> None:
        super().__init__(**common)
        self.epsilons, self.decay = {INPUT: epsilon_input, FORMAT: epsilon_format}, decay
        self.penalty_weights = self.penalty_weights or {"context": 1.0}

    def build(self, backbone: Backbone) -> None:
        """Makes `delta` [P, H]."""
        if self.classes is None or not self.classes.demonstrations:
            raise ValueError("ContextAware wants demonstrations; set data.demonstrations to so many of each class")
        if not isinstance(backbone, CausalBackbone):
            raise ValueError(f"ContextAware wants a decoder, which {backbone.spec.name} is not")
        self.context = Context.of(backbone.codec, Template(self.classes.template), self.classes.demonstrations)
        unit = (backbone.hidden_size / 2048) ** 0.5
        reach = sum(epsilon * unit * (self.context.kinds == kind) for kind, epsilon in self.epsilons.items())
        ids = self.context.ids.to(backbone.word_embeddings.device)
        self.register_buffer("words", backbone.embed(ids).detach().float(), persistent=False)
        self.register_buffer("reach", torch.as_tensor(reach)[:, None], persistent=False)
        self.register_buffer("weights", self.context.weights(self.decay), persistent=False)
        self.delta = nn.Parameter(torch.zeros(self.words.shape))

    def prompt(self, batch: Batch) -> SoftPrompt:
        """The same demonstrations for every row."""
        moved = self.delta * (self.reach > 0)
        penalties = {"context": self._context_loss(moved)} if self.training else {}
        return SoftPrompt(tokens=(self.words + moved)[None], penalties=penalties)

    def _context_loss(self, moved: Tensor) -> Tensor:
        """Cross entropy of the demonstrations' answers, each behind the demonstrations before it."""
        batch = self.context.batch().to(moved.device)
        before = moved.new_zeros(len(self.context.start), moved.shape[1])
        shift = SoftPrompt(shift=torch.cat([before, moved])[None])
        return (self.loaded.cross_entropy(batch, shift)[0] * self.weights).sum()

    @torch.no_grad()
    def project(self) -> None:
        """Brings each token back to where it may be."""
        self.delta.mul_(self.reach / torch.maximum(self.delta.norm(dim=1, keepdim=True), self.reach).clamp(min=1e-30))
