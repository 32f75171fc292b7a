"""Encoder-decoder language models such as T5 and BART. Soft tokens are inserted into the encoder's input."""

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
from lightning_softprompt.backbones.insertion.attention_probe import AttentionProbe, spliced_groups, use_probe
from lightning_softprompt.backbones.insertion.key_values import injectable_attention
from lightning_softprompt.backbones.insertion.positions import DECODER_NAMES, max_positions
from lightning_softprompt.backbones.insertion.splice import Spliced
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import IGNORE, Batch, SoftPrompt

NO_LATE_TOKENS = "encoder-decoders do not support soft tokens at a middle layer; use a decoder or an encoder"


@final
class Seq2SeqCodec(Codec):
    """The encoder reads the text of the template, and the decoder generates the target."""

    answer_location = "decoder"

    def assemble(self, before: Sequence[int], after: Sequence[int], answer: Sequence[int]) -> tuple[list[int], range]:
        """The source only, since the answer belongs to the decoder."""
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
        """Whether the configuration describes an encoder and a decoder."""
        return bool(config.is_encoder_decoder)

    @property
    def stack(self) -> PreTrainedModel:
        """The encoder."""
        return self.model.get_encoder()  # type: ignore[no-any-return]

    def splice(self, batch: Batch, prompt: SoftPrompt | None) -> Spliced:
        """The encoder's rows with the prompt inserted.

        Raises:
            ValueError: As in `Backbone.splice`, and if soft tokens enter at a middle layer.
        """
        if prompt is not None and prompt.hidden:
            raise ValueError(NO_LATE_TOKENS)
        return super().splice(batch, prompt)

    @property
    def opening(self) -> tuple[int, ...]:
        """Tokens at the start of the decoder's input, in training, scoring and generation. They have no loss.

        Raises:
            ValueError: If the model's generation configuration does not define them.
        """
        config = self.model.generation_config
        start = config.bos_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id
        start = start[0] if isinstance(start, list) else start
        if start is None:
            raise ValueError(
                f"{self.spec.name} has no decoder start token; set decoder_start_token_id in its generation_config.json"
            )
        return (start,) if config.forced_bos_token_id is None else (start, config.forced_bos_token_id)

    def check_late_tokens(self) -> None:
        """Refuses soft tokens at a middle layer.

        Raises:
            ValueError: Always.
        """
        raise ValueError(NO_LATE_TOKENS)

    def decoder_ids(self, targets: Tensor) -> Tensor:
        """The decoder's input [B, O + U - 1]: the opening [O], then the targets [B, U] without the last one."""
        opening = targets.new_tensor(self.opening).expand(len(targets), -1)
        previous = targets[:, :-1]
        return torch.cat([opening, previous.masked_fill(previous == IGNORE, self.codec.pad_id)], dim=1)

    def states(self, batch: Batch, prompt: SoftPrompt | None = None, columns: Tensor | None = None) -> States:
        """The decoder's hidden states after its opening, one for each target."""
        self.refuse_columns(columns)
        return self.row_check.run(self.run_padded, batch, prompt, self.target_logits, States.join)

    def run_padded(self, batch: Batch, prompt: SoftPrompt | None) -> States:
        """Same as `states`, in one padded batch and without a trial run."""
        rows = self.splice(batch, prompt)
        ids, decoder_ids = self.ids_of(rows, batch), self.decoder_ids(batch.targets)
        inputs = {"attention_mask": rows.mask.long(), "decoder_input_ids": decoder_ids, "use_cache": False}
        run = partial(self.entry.run, self.model, rows.embeds, ids, stack=self.stack, **inputs)
        self.check_window(decoder_ids.shape[1], max_positions(self.model.config, DECODER_NAMES))
        columns = torch.arange(len(self.opening) - 1, decoder_ids.shape[1], device=decoder_ids.device)
        with self.inject(prompt):
            return self.head.states(run, columns.expand_as(batch.targets))

    probed_attentions = "cross"

    def run_probed(self, probe: AttentionProbe, batch: Batch, prompt: SoftPrompt | None, groups: Tensor) -> States:
        """See `Backbone.run_probed`. The attention of the decoder to the input is measured."""
        rows = self.splice(batch, prompt)
        first = len(self.opening) - 1
        probe.place(spliced_groups(probe, rows, groups, prompt), lambda out: out[:, first:])
        with use_probe(probe), injectable_attention(self.model):
            return self.run_padded(batch, prompt)

    @torch.no_grad()
    def generate(self, batch: Batch, prompt: SoftPrompt | None = None, **decoding: Any) -> Tensor:
        """The decoder's output without its opening."""
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
