"""The paths by which a decoder-only model generates. All of them give the same answers; the fastest comes first.

Every path runs a row as one sequence, with its prompt in place and padding only on the left. Windows, relative
positions and recurrent states then match those of the row alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_softprompt.backbones.execution.row_batch import SOFT, RowBatch
from lightning_softprompt.backbones.generation.backbone import DecoderBackbone
from lightning_softprompt.backbones.generation.generate import DRAFTED, generate, num_sequences, uses_speculation
from lightning_softprompt.backbones.insertion.reading import Reading
from lightning_softprompt.backbones.tokenization.codec import Codec

Decoding = dict[str, Any]


class GenerationPath(ABC):
    """A path by which rows are generated.

    Args:
        backbone: The backbone whose model generates.
    """

    description: ClassVar[str]
    batches_lengths: ClassVar[bool]  # whether rows of different lengths run together
    is_forward: ClassVar[bool] = False  # whether a forward pass of the whole row gives each new token

    def __init__(self, backbone: DecoderBackbone) -> None:
        self.backbone = backbone

    def __call__(self, rows: RowBatch, decoding: Decoding) -> Tensor:
        """Answers [B * R, U], R for each row, padded at the end."""
        return self.run(rows, decoding)[:, rows.mask.shape[1] :]  # type: ignore[no-any-return]

    @abstractmethod
    def run(self, rows: RowBatch, decoding: Decoding) -> Any:
        """The result of transformers' `generate` for rows that run together: [B * R, M + U], M input columns first."""


@final
class SharedPrompt(GenerationPath):
    """Runs the prompt that all rows begin with once for all calls. Its keys and values precede each row."""

    description = "the shared prompt runs once and its keys and values are cached"
    batches_lengths = True

    def run(self, rows: RowBatch, decoding: Decoding) -> Any:
        """See `GenerationPath`."""
        left, end = rows.pad_left(), rows.prompt_end
        padding = left.mask.shape[1] - left.mask.sum(1)
        cache = self.backbone.prompts.cache_for(rows, end, padding, num_sequences(decoding))
        return generate(
            self.backbone, reading_of(self.backbone, left, past_key_values=cache), left.mask.shape[1], decoding
        )

    @staticmethod
    def applies(rows: RowBatch, decoding: Decoding) -> bool:
        """Whether all rows begin with the prompt and continue after it, and no option selects another cache."""
        requires_other_cache = (
            decoding.get("use_cache", True) is False
            or decoding.get("cache_implementation")
            or uses_speculation(decoding)
        )
        if requires_other_cache or rows.kv:
            return False
        shortest = int(rows.mask.sum(1).min())
        return 0 < rows.prompt_end < shortest


@final
class LeftPadded(GenerationPath):
    """Runs rows of all lengths together, with padding on the left of shorter rows."""

    description = "rows run together, padded on the left"
    batches_lengths = True

    def run(self, rows: RowBatch, decoding: Decoding) -> Any:
        """See `GenerationPath`."""
        left = rows.pad_left()
        with self.backbone.inject(left.kv_prompt):
            reading = reading_of(self.backbone, left)
            return generate(self.backbone, reading, left.mask.shape[1], decoding)


class EqualLengths(GenerationPath):
    """Runs rows of the same length together, without padding."""

    description = "rows run together with those of the same length only"
    batches_lengths = False

    def __call__(self, rows: RowBatch, decoding: Decoding) -> Tensor:
        """See `GenerationPath`."""
        lengths = rows.mask.sum(1).tolist()
        rows_by_length: dict[int, list[int]] = {}
        for b, length in enumerate(lengths):
            rows_by_length.setdefault(length, []).append(b)
        answers: dict[int, Tensor] = {}
        for length, group in rows_by_length.items():
            part = rows[group].trim()
            new_tokens = self.run(part, decoding)[:, length:]
            row_answers = new_tokens.chunk(len(group))
            answers |= dict(zip(group, row_answers, strict=True))
        ordered = [answer for b in range(len(lengths)) for answer in answers[b]]
        return pad_sequence(ordered, batch_first=True, padding_value=self.backbone.codec.pad_id)

    def run(self, rows: RowBatch, decoding: Decoding) -> Any:
        """See `GenerationPath`."""
        with self.backbone.inject(rows.kv_prompt):
            reading = reading_of(self.backbone, rows)
            return generate(self.backbone, reading, rows.mask.shape[1], decoding)


@final
class WithoutCache(EqualLengths):
    """Runs the whole row in a forward pass for each new token: slow, and correct wherever the forward pass is."""

    description = "rows of the same length run as a whole for each new token"
    is_forward = True

    def run(self, rows: RowBatch, decoding: Decoding) -> Any:
        """See `GenerationPath`."""
        unused = {"cache_implementation", *DRAFTED}
        plain = {name: value for name, value in decoding.items() if name not in unused}
        is_shared = len(rows.first_position) == 1
        copies = 1 if is_shared else num_sequences(decoding)
        first = rows.first_position.repeat_interleave(copies)
        reading = Reading(token_ids(rows, self.backbone.codec), rows.embeds, {})
        options = {**plain, "use_cache": False}
        inputs = forward_inputs(self.backbone.model, first if rows.kv else None)
        with self.backbone.inject(rows.kv_prompt), inputs:
            return generate(self.backbone, reading, rows.mask.shape[1], options)


@contextmanager
def forward_inputs(model: Any, first: Tensor | None) -> Iterator[None]:
    """Makes `generate` run the model on ids alone, as the forward pass does: without masks, positions and cache.

    Args:
        model: The transformers model.
        first: [B|1] position of the first token of each row; if None, the model counts positions.
    """

    def prepare(input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        return plain_inputs(input_ids, first)

    vars(model)["prepare_inputs_for_generation"] = prepare
    try:
        yield
    finally:
        del vars(model)["prepare_inputs_for_generation"]


def plain_inputs(ids: Tensor, first: Tensor | None) -> dict[str, Any]:
    """Inputs of the forward pass for ids [B, M] alone; see `forward_inputs`."""
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if first is not None:
        steps = torch.arange(ids.shape[1], device=ids.device)
        inputs["position_ids"] = first[:, None] + steps
    return inputs


def reading_of(backbone: DecoderBackbone, rows: RowBatch, **inputs: Any) -> Reading:
    """The generation input of rows without padding on the right, with further inputs such as a cache."""
    if rows.kv:
        steps = (rows.mask.cumsum(1) - 1).clamp(min=0)
        inputs["position_ids"] = steps + rows.first_position[:, None]
    inputs = {"attention_mask": rows.mask.long(), **inputs}
    return Reading(token_ids(rows, backbone.codec), rows.embeds, inputs)


def token_ids(rows: RowBatch, codec: Codec) -> Tensor:
    """[B, M] ids of text tokens, with a placeholder for every other token."""
    is_text = (rows.keys >= 0) & (rows.keys < SOFT)
    return rows.keys.where(is_text, codec.placeholder).where(rows.mask, codec.pad_id)
