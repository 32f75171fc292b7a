"""Decoder-only language models: Llama, GPT-2, Qwen, SmolLM and their like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lightning_softprompt.backbones.base import Backbone, answer_positions
from lightning_softprompt.backbones.codec import Codec
from lightning_softprompt.types import Batch, SoftPrompt


@final
class CausalCodec(Codec):
    """The answer follows the source. Rows start with BOS, or EOS, so that every target has a state before it.

    Text after the answer could not be seen when it is said, and is left out.
    """

    @property
    def start(self) -> tuple[int, ...]:
        """One special token that opens every row."""
        tokenizer = self.tokenizer
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return (self.pad_id if first is None else first,)

    @property
    def end(self) -> tuple[int, ...]:
        """Nothing: the answer comes last."""
        return ()

    def assemble(self, before: Sequence[int], after: Sequence[int], answer: Sequence[int]) -> tuple[list[int], range]:
        """What stands before the answer, then the answer."""
        return [*before, *answer], range(len(before), len(before) + len(answer))


@final
class CausalBackbone(Backbone):
    """A frozen decoder-only model."""

    codec_class = CausalCodec

    @staticmethod
    def claims(config: PreTrainedConfig) -> bool:
        """Whatever no other family claims."""
        return True

    def forward(self, batch: Batch, prompt: SoftPrompt | None = None) -> Tensor:
        """Logits [B, U, V] of the targets.

        Rows are padded at the end, where a causal model never looks: no mask is needed, and fast attention kernels run.
        """
        rows = self.splice(batch, prompt)
        columns = rows.columns.gather(1, answer_positions(batch)) - 1
        positions = torch.arange(rows.mask.shape[1], device=rows.mask.device)[None]
        with self.head_on(columns.clamp(min=0)):
            return self.model(inputs_embeds=rows.embeds, position_ids=positions, use_cache=False).logits  # type: ignore[no-any-return]

    @torch.no_grad()
    def generate(self, batch: Batch, prompt: SoftPrompt | None = None, **decoding: Any) -> Tensor:
        """Greedy continuations [B, U]."""
        rows = self.splice(self.codec.questions(batch), prompt, pad_left=True)
        return self.model.generate(  # type: ignore[no-any-return, operator]
            inputs_embeds=rows.embeds,
            attention_mask=rows.mask.long(),
            **{"do_sample": False, "num_beams": 1, "pad_token_id": self.codec.pad_id, **decoding},
        )
