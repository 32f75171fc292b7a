"""Encoder-only masked language models such as BERT and RoBERTa."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any, final

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.execution.lm_head import States
from lightning_softprompt.backbones.insertion.attention_probe import AttentionProbe, spliced_groups, use_probe
from lightning_softprompt.backbones.insertion.key_values import injectable_attention
from lightning_softprompt.backbones.insertion.layers import starting_at
from lightning_softprompt.backbones.insertion.splice import Spliced, answer_positions, ids_of, splice
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.types import NO_TOKEN, Batch, SoftPrompt


@final
class MaskedCodec(Codec):
    """Replaces the answer with one mask token for each of its tokens, or with a single one if the answer is unknown.

    Raises:
        ValueError: If the tokenizer has no mask token.
    """

    answer_location = "inside"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, padding_side: str = "right") -> None:
        super().__init__(tokenizer, padding_side)
        if tokenizer.mask_token_id is None:
            raise ValueError("a masked language model requires a tokenizer with a mask token, and this one has none")
        self.mask_id = tokenizer.mask_token_id

    @property
    def stop(self) -> tuple[int, ...]:
        """Empty, since all masks are filled at once."""
        return ()

    def assemble(self, before: Sequence[int], after: Sequence[int], answer: Sequence[int]) -> tuple[list[int], range]:
        """Masks between the text before and after the answer."""
        count = max(1, len(answer))
        return [*before, *[self.mask_id] * count, *after], range(len(before), len(before) + count)


@final
class MaskedBackbone(Backbone):
    """A frozen encoder with its masked-language-modeling head."""

    codec_class = MaskedCodec

    @staticmethod
    def claims(config: PreTrainedConfig) -> bool:
        """Whether the architecture has a masked-LM head and is not configured as a decoder."""
        return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)

    @property
    def window(self) -> int | None:
        """See `Backbone.window`. RoBERTa counts positions from its padding id, which its tokenizer accounts for."""
        length: int = self.codec.tokenizer.model_max_length
        window = super().window
        return length if window is None else min(window or length, length)

    def states(self, batch: Batch, prompt: SoftPrompt | None = None, columns: Tensor | None = None) -> States:
        """The hidden states at the masks."""
        self.refuse_columns(columns)
        return self.row_check.run(self.run_padded, batch, prompt, self.target_logits, States.join)

    def run_padded(self, batch: Batch, prompt: SoftPrompt | None) -> States:
        """Same as `states`, in one padded batch and without a trial run."""
        prompt = prompt or SoftPrompt()
        layer = next(iter(prompt.hidden), None)
        rows = self.splice(batch, prompt) if layer is None else self._splice_at_layer(batch, prompt, layer)
        ids = self.ids_of(rows, batch)
        run = partial(self.entry.run, self.model, rows.embeds, ids, **self.stack_inputs(rows, batch, prompt))
        start = nullcontext() if layer is None else starting_at(self.model, layer, rows.embeds)
        with self.inject(prompt), start:
            return self.head.states(run, self._answer_columns(rows, batch))

    def run_probed(self, probe: AttentionProbe, batch: Batch, prompt: SoftPrompt | None, groups: Tensor) -> States:
        """See `Backbone.run_probed`.

        Raises:
            ValueError: If the prompt has soft tokens at a middle layer, which the layers below do not have.
        """
        if prompt is not None and prompt.hidden:
            raise ValueError("attention to soft tokens at a middle layer of an encoder cannot be measured")
        rows = self.splice(batch, prompt)
        columns = self._answer_columns(rows, batch)
        row = torch.arange(len(columns), device=columns.device)[:, None]
        probe.place(spliced_groups(probe, rows, groups, prompt), lambda out: out[row, columns])
        with use_probe(probe), injectable_attention(self.model):
            return self.run_padded(batch, prompt)

    def stack_inputs(self, rows: Spliced, batch: Batch, prompt: SoftPrompt | None) -> dict[str, Any]:
        """The attention mask, and the token types of pairs of texts."""
        inputs = super().stack_inputs(rows, batch, prompt)
        types = self._token_types(rows, batch)
        return inputs if types is None else {**inputs, "token_type_ids": types}

    def _token_types(self, rows: Spliced, batch: Batch) -> Tensor | None:
        """[B, M] 1 on the second text of a pair, and 0 elsewhere, as in the pre-training of BERT.

        None if no row is a pair, or the model has no second type.
        """
        starts = [row.second_start for row in batch.encoded or ()]
        num_types = getattr(self.model.config, "type_vocab_size", 0)
        if max(starts, default=NO_TOKEN) == NO_TOKEN or num_types < 2:
            return None
        if "token_type_ids" not in signature(self.stack.forward).parameters:
            return None
        start = batch.input_ids.new_tensor(starts)[:, None]
        position = batch.mask.cumsum(1) - 1
        is_second = (start != NO_TOKEN) & (position >= start) & batch.mask
        return ids_of(rows, is_second.long(), placeholder=0, pad_id=0)

    def _answer_columns(self, rows: Spliced, batch: Batch) -> Tensor:
        """[B, U] columns of the answers; arbitrary if an answer is shorter than U."""
        return rows.columns.gather(1, answer_positions(batch)).clamp(max=rows.mask.shape[1] - 1)

    def _splice_at_layer(self, batch: Batch, prompt: SoftPrompt, layer: int) -> Spliced:
        """The input states of a layer, with the soft tokens that enter there."""
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
        """The most likely token at each mask [B, U]; all masks of a row are filled at once.

        Raises:
            ValueError: If there are decoding options, since nothing is decoded step by step.
        """
        if decoding:
            raise ValueError(f"a masked language model fills all masks at once and does not support {sorted(decoding)}")
        return self(batch, prompt).argmax(-1)  # type: ignore[no-any-return]
