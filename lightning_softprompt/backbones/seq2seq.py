"""Encoder-decoder language models: T5, BART and their like. Soft tokens stand in the encoder's input."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.execution.lm_head import States
from lightning_softprompt.backbones.generation.generate import uses_speculation
from lightning_softprompt.backbones.generation.seq2seq import EncoderRows, Seq2SeqGenerator
from lightning_softprompt.backbones.insertion.positions import DECODER_NAMES, configured_positions
from lightning_softprompt.backbones.insertion.splice import Spliced
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import IGNORE, Batch, SoftPrompt

NO_LATE_TOKENS = "encoder-decoders take no soft tokens at a middle layer; take a decoder or an encoder"


@final
class Seq2SeqCodec(Codec):
    """All text of the template is the encoder's, the target the decoder's. Rows end as the tokenizer ends them."""

    def assemble(self, before: Sequence[int], after: Sequence[int], answer: Sequence[int]) -> tuple[list[int], range]:
        """The source alone; the answer is the decoder's."""
        return [*before, *after], range(0)


@final
class Seq2SeqBackbone(Backbone):
    """A frozen encoder-decoder model."""

    codec_class = Seq2SeqCodec

    def __init__(self, model: PreTrainedModel, codec: Codec, spec: BackboneSpec) -> None:
        super().__init__(model, codec, spec)
        self.generator = Seq2SeqGenerator(self)

    @staticmethod
    def claims(config: PreTrainedConfig) -> bool:
        """Models that say of themselves that they have an encoder and a decoder."""
        return bool(config.is_encoder_decoder)

    @property
    def stack(self) -> PreTrainedModel:
        """The encoder."""
        return self.model.get_encoder()  # type: ignore[no-any-return]

    def splice(self, batch: Batch, prompt: SoftPrompt | None) -> Spliced:
        """The encoder's rows with the prompt in place.

        Raises:
            ValueError: As elsewhere, and if soft tokens are to enter at a middle layer.
        """
        if prompt is not None and prompt.hidden:
            raise ValueError(NO_LATE_TOKENS)
        return super().splice(batch, prompt)

    @property
    def opening(self) -> tuple[int, ...]:
        """Tokens that the decoder begins with, in training, scoring and generation alike. None of them has a loss.

        Raises:
            ValueError: If the model's generation configuration names none.
        """
        config = self.model.generation_config
        start = config.bos_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id
        start = start[0] if isinstance(start, list) else start
        if start is None:
            raise ValueError(
                f"{self.spec.name} has no token that starts its decoder; set decoder_start_token_id in its "
                f"generation_config.json"
            )
        return (start,) if config.forced_bos_token_id is None else (start, config.forced_bos_token_id)

    def check_late_tokens(self) -> None:
        """Refuses them.

        Raises:
            ValueError: Always.
        """
        raise ValueError(NO_LATE_TOKENS)

    def decoder_ids(self, targets: Tensor) -> Tensor:
        """[B, O + U - 1] what the decoder reads: the opening [O], then the targets [B, U] without the last."""
        opening = targets.new_tensor(self.opening).expand(len(targets), -1)
        return torch.cat([opening, targets[:, :-1].masked_fill(targets[:, :-1] == IGNORE, self.codec.pad_id)], dim=1)

    def states(self, batch: Batch, prompt: SoftPrompt | None = None) -> States:
        """All of the decoder from the end of its opening: every position of it is a target's."""
        return self.row_check.run(self.run_padded, batch, prompt, self.known_logits, States.join)

    def run_padded(self, batch: Batch, prompt: SoftPrompt | None) -> States:
        """As `states`, all rows in one batch."""
        rows = self.splice(batch, prompt)
        ids, decoder_ids = self.ids_of(rows, batch), self.decoder_ids(batch.targets)
        run = partial(
            self.entry.run, self.model, rows.embeds, ids, stack=self.stack,
            attention_mask=rows.mask.long(), decoder_input_ids=decoder_ids, use_cache=False,
        )  # fmt: skip
        self.check_window(decoder_ids.shape[1], configured_positions(self.model.config, DECODER_NAMES))
        columns = torch.arange(len(self.opening) - 1, decoder_ids.shape[1], device=decoder_ids.device)
        with self.injected(prompt):
            return self.head.states(run, columns.expand_as(batch.targets))

    @torch.no_grad()
    def generate(self, batch: Batch, prompt: SoftPrompt | None = None, **decoding: Any) -> Tensor:
        """Outputs, without the tokens that the decoder opens with."""
        if uses_speculation(decoding) and len(batch) > 1:
            return self.generate_row_by_row(batch, prompt, decoding)
        rows = self.splice(batch, prompt)
        reading = EncoderRows(self.token_ids(rows, batch, prompt), rows.embeds, rows.mask, prompt)
        return self.generator(reading, decoding)

    @property
    def generation_description(self) -> str:
        """See `Backbone`."""
        return self.generator.execution_description

    def token_ids(self, rows: Spliced, batch: Batch, prompt: SoftPrompt | None) -> Tensor:
        """[B, M] ids of the encoder's input, with a placeholder for each soft token."""
        length = 0 if prompt is None or prompt.tokens is None else prompt.tokens.shape[1]
        soft = batch.input_ids.new_full((len(batch), length), self.codec.placeholder)
        ids = torch.cat([soft, batch.input_ids], dim=1).gather(1, rows.order)
        return ids.where(rows.mask, self.codec.pad_id)
