"""Decoder-only language models: Llama, GPT-2, Qwen, SmolLM and their like."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast, final

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_softprompt.backbones.attention import NAME, PackingUnsupportedError, register
from lightning_softprompt.backbones.base import Backbone, BackboneSpec, answer_positions
from lightning_softprompt.backbones.codec import Codec
from lightning_softprompt.backbones.packing import pack, packed, shared_head
from lightning_softprompt.backbones.splice import Spliced
from lightning_softprompt.types import Batch, Piece, Slot, SoftPrompt

log = logging.getLogger(__name__)
LIMITS = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative error of packed rows, where rounding is fine
register()


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

    def heard_after(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        """Nothing: a causal model has said its answer by then.

        Raises:
            ValueError: If a soft block stands there, since it could never learn.
        """
        if any(isinstance(piece, Slot) for piece in pieces):
            raise ValueError("a causal backbone never hears {soft} behind {target}; put it before")
        return ()

    def assemble(self, before: Sequence[int], after: Sequence[int], answer: Sequence[int]) -> tuple[list[int], range]:
        """What stands before the answer, then the answer."""
        return [*before, *answer], range(len(before), len(before) + len(answer))


@final
class CausalBackbone(Backbone):
    """A frozen decoder-only model.

    Rows run as one packed row where the model's attention allows it, tried out on the first batch; else padded.
    """

    codec_class = CausalCodec

    def __init__(self, model: PreTrainedModel, codec: Codec, spec: BackboneSpec) -> None:
        super().__init__(model, codec, spec)
        self.why_padded: str | None = None if spec.packed else "packed rows are switched off"
        self._tried = False

    @staticmethod
    def claims(config: PreTrainedConfig) -> bool:
        """Whatever no other family claims."""
        return True

    def forward(self, batch: Batch, prompt: SoftPrompt | None = None) -> Tensor:
        """Logits [B, U, V] of the targets."""
        rows = self.splice(batch, prompt)
        columns = (rows.columns.gather(1, answer_positions(batch)) - 1).clamp(min=0)
        if not self._tried and self.why_padded is None:
            self._try(rows, columns, batch, prompt)
        if self.why_padded is not None:
            return self._padded(rows, columns)
        try:
            return self._packed(rows, columns, shared_head(self._keys(rows, batch, prompt), rows.mask))
        except PackingUnsupportedError as reason:  # such as a first batch longer than a sliding window
            self._give_up(str(reason))
            return self._padded(rows, columns)

    def _padded(self, rows: Spliced, columns: Tensor) -> Tensor:
        """Rows are padded at the end, where a causal model never looks: no mask is needed, and fast kernels run."""
        positions = torch.arange(rows.mask.shape[1], device=rows.mask.device)[None]
        with self.head_on(columns):
            return cast(Tensor, self.model(inputs_embeds=rows.embeds, position_ids=positions, use_cache=False).logits)

    def _packed(self, rows: Spliced, columns: Tensor, head: int) -> Tensor:
        packing = pack(rows.mask, head)
        no_mask = rows.embeds.new_zeros(1, 1, 1, 1)  # keeps transformers from making one
        with self.head_on(packing.columns(columns)):
            logits = self.model(
                inputs_embeds=packed(rows.embeds, packing),
                position_ids=packing.positions,
                attention_mask=no_mask,
                use_cache=False,
                packing=packing,
            ).logits
        return logits.view(*columns.shape, -1)  # type: ignore[no-any-return]

    @staticmethod
    def _keys(rows: Spliced, batch: Batch, prompt: SoftPrompt | None) -> Tensor:
        """[B, M] numbers that are equal only where rows have the same token."""
        count, vocabulary = rows.order.shape[0], 2**31
        own = -torch.arange(1, count + 1, device=rows.order.device)[:, None]  # [B, 1] never equal
        length = 0 if prompt is None or prompt.tokens is None else prompt.tokens.shape[1]
        soft = vocabulary + torch.arange(length, device=own.device).expand(count, -1)
        soft = soft if prompt is None or prompt.tokens is None or len(prompt.tokens) == 1 else own.expand_as(soft)
        text = batch.input_ids if prompt is None or prompt.shift is None else own.expand_as(batch.input_ids)
        return torch.cat([soft, text], dim=1).gather(1, rows.order)

    @torch.no_grad()
    def _try(self, rows: Spliced, columns: Tensor, batch: Batch, prompt: SoftPrompt | None) -> None:
        """Compares packed with padded rows on two of the first batch: some models have an attention of their own."""
        self._tried = len(batch) > 1  # a single row shares nothing, and says nothing of what others would share
        two = Spliced(*(t[:2] for t in (rows.embeds, rows.mask, rows.columns, rows.order)))
        plain = self._padded(two, columns[:2]).float()
        head = shared_head(self._keys(rows, batch, prompt)[:2], two.mask)
        self.model.set_attn_implementation(NAME)
        try:
            ours = self._packed(two, columns[:2], head).float()
        except (NotImplementedError, TypeError, ValueError, RuntimeError) as reason:
            return self._give_up(str(reason).splitlines()[0])
        error = float((ours - plain).abs().max() / plain.abs().max())
        if not error <= LIMITS.get(self.model.dtype, 5e-2):  # also where it is not a number
            return self._give_up(f"packed rows would be off by {error:.1e}")
        log.info("rows run packed, and what they share runs once")
        return None

    def _give_up(self, reason: str) -> None:
        self.why_padded = reason
        self.model.set_attn_implementation(self.spec.attention)
        log.info("rows run padded: %s", reason)

    @torch.no_grad()
    def generate(self, batch: Batch, prompt: SoftPrompt | None = None, **decoding: Any) -> Tensor:
        """Greedy continuations [B, U]."""
        rows = self.splice(self.codec.questions(batch), prompt, pad_left=True)
        self.check_window(rows.mask.shape[1] + decoding.get("max_new_tokens", 0))
        return self.model.generate(  # type: ignore[no-any-return, operator]
            inputs_embeds=rows.embeds,
            attention_mask=rows.mask.long(),
            **{"do_sample": False, "num_beams": 1, "pad_token_id": self.codec.pad_id, **decoding},
        )
