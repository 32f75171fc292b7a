"""Encoder-only masked language models: BERT, RoBERTa and their like."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from lightning_softprompt.backbones.base import Backbone, answer_positions
from lightning_softprompt.backbones.execution.lm_head import States
from lightning_softprompt.backbones.insertion.layers import starting_at
from lightning_softprompt.backbones.insertion.splice import Spliced, splice
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.types import Batch, SoftPrompt


@final
class MaskedCodec(Codec):
    """The answer's place holds as many mask tokens as the answer has tokens, and one where the answer is not known.

    Raises:
        ValueError: If the tokenizer has no mask token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, padding_side: str = "right") -> None:
        super().__init__(tokenizer, padding_side)
        if tokenizer.mask_token_id is None:
            raise ValueError("a masked language model wants a tokenizer with a mask token, and this one has none")
        self.mask_id = tokenizer.mask_token_id

    @property
    def stop(self) -> tuple[int, ...]:
        """Nothing: masks are filled, not generated one after the other."""
        return ()

    def assemble(self, before: Sequence[int], after: Sequence[int], answer: Sequence[int]) -> tuple[list[int], range]:
        """Masks between what stands before and after."""
        count = max(1, len(answer))
        return [*before, *[self.mask_id] * count, *after], range(len(before), len(before) + count)


@final
class MaskedBackbone(Backbone):
    """A frozen encoder with its masked-language-modelling head."""

    codec_class = MaskedCodec

    @staticmethod
    def claims(config: PreTrainedConfig) -> bool:
        """Architectures that have a masked-LM head and are not set up as decoders."""
        return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)

    @property
    def window(self) -> int | None:
        """RoBERTa counts positions from behind its padding id; its tokenizer knows how many are left."""
        length: int = self.codec.tokenizer.model_max_length
        return length if super().window is None else min(super().window or length, length)

    def states(self, batch: Batch, prompt: SoftPrompt | None = None) -> States:
        """Those at the masks."""
        return self.row_check.run(self.run_padded, batch, prompt, self.known_logits, States.join)

    def run_padded(self, batch: Batch, prompt: SoftPrompt | None) -> States:
        """As `states`, all rows in one batch."""
        prompt = prompt or SoftPrompt()
        late = next(iter(prompt.hidden), None)
        rows = self.splice(batch, prompt) if late is None else self._late(batch, prompt, late)
        ids = self.ids_of(rows, batch)
        run = partial(self.entry.run, self.model, rows.embeds, ids, attention_mask=rows.mask.long())
        start = nullcontext() if late is None else starting_at(self.model, late, rows.embeds)
        with self.injected(prompt), start:
            return self.head.states(run, self._answers(rows, batch))

    def _answers(self, rows: Spliced, batch: Batch) -> Tensor:
        """[B, U] columns of the answers; any column where a row's answer is shorter than U."""
        return rows.columns.gather(1, answer_positions(batch)).clamp(max=rows.mask.shape[1] - 1)

    def _late(self, batch: Batch, prompt: SoftPrompt, layer: int) -> Spliced:
        """The rows' states before a layer, with the soft tokens that enter there."""
        below = self.hidden_states(batch, replace(prompt, hidden={}), layer)
        rows = splice(below, batch.mask, batch.slots, prompt.hidden[layer])
        self.check_window(rows.mask.shape[1])
        return rows

    @property
    def generation_description(self) -> str:
        """See `Backbone`."""
        return "all masks of a row are filled at once"

    @torch.no_grad()
    def generate(self, batch: Batch, prompt: SoftPrompt | None = None, **decoding: Any) -> Tensor:
        """The likeliest token at each mask [B, U]: all masks of a row are filled at once.

        Raises:
            ValueError: If decoding options are given, since there is nothing to decode step by step.
        """
        if decoding:
            raise ValueError(f"a masked language model fills its masks at once and takes no {sorted(decoding)}")
        return self(batch, prompt).argmax(-1)  # type: ignore[no-any-return]
