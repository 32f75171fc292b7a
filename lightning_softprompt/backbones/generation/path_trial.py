"""Compares a generation path with the forward pass of each row alone, which training optimizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from lightning_softprompt.backbones.execution.row_batch import RowBatch
from lightning_softprompt.backbones.generation.backbone import DecoderBackbone, GeneratingBackbone
from lightning_softprompt.backbones.generation.generate import DRAFTED, uses_speculation
from lightning_softprompt.backbones.generation.paths import (
    Decoding,
    GenerationPath,
    plain_inputs,
    token_ids,
)
from lightning_softprompt.backbones.insertion.reading import Reading, replace_embeddings
from lightning_softprompt.backbones.kernels.prepacked_linear import plain_products

STEPS = 3  # generated tokens that a trial compares: one from the first pass, two that use the cache
STRUCTURE = ("use_cache", "cache_implementation", *DRAFTED)  # options that determine how the model runs


class LengthDependenceError(NotImplementedError):
    """A model whose results for a token depend on the number of later tokens, as with length-scaled positions."""


@dataclass(frozen=True)
class Trial:
    """Rows on which a path is compared with the forward pass.

    Args:
        rows: One or two rows, including all generated tokens but the last ones.
        text: [B, U] the last tokens, which the path is forced to generate.
        right: [U, V] logits of these tokens in the forward pass of each row alone.
        logits: Computes the same for other texts; see `next_logits`.
    """

    rows: RowBatch
    text: Tensor
    right: Sequence[Tensor]
    logits: Callable[[DecoderBackbone, RowBatch, int, Tensor], Tensor]

    def only(self, b: int) -> Trial:
        """The trial of one row."""
        return replace(self, rows=self.rows[[b]].trim(), text=self.text[b : b + 1], right=self.right[b : b + 1])


def error_of(path: GenerationPath, rows: RowBatch, new: int, decoding: Decoding, limit: float) -> float:
    """The error of a path, relative to the logits of the forward pass; infinite if a number is not finite.

    Args:
        path: The path.
        rows: One or two rows.
        new: Number of tokens to generate.
        decoding: The options; only those that determine how the model runs are used.
        limit: Largest rounding error.

    Raises:
        LengthDependenceError: If the path cannot run these rows together.
    """
    options = {name: decoding[name] for name in STRUCTURE if name in decoding}
    beams = decoding.get("num_beams") or 1
    with plain_products(), torch.autocast(rows.embeds.device.type, enabled=False):
        trial, is_stable = trial_of(path, rows, new, limit)
        if path.batches_lengths and not is_stable and len(trial.text) > 1:
            raise LengthDependenceError("its logits of a token depend on the length of the sequence")
        parts = [trial] if path.batches_lengths else [trial.only(b) for b in range(len(trial.text))]
        measure = _of_beams if beams > 1 else _of_drafts if uses_speculation(decoding) else _of_logits
        return max(measure(path, part, options, beams) for part in parts)


def trial_of(path: GenerationPath, rows: RowBatch, new: int, limit: float) -> tuple[Trial, bool]:
    """Rows with `new` more tokens, and whether their first logits stay the same as the rows grow."""
    backbone, steps, count = path.backbone, min(STEPS, new), len(rows.mask)
    tokens, embeds = some_text(backbone, count, new)
    longer = rows.append_text(tokens[:, : new - steps], embeds[:, : new - steps])
    text = tokens[:, new - steps :]
    whole = [next_logits(backbone, rows, b, tokens[b]) for b in range(count)]
    begin = [next_logits(backbone, rows, b, tokens[b, :1]) for b in range(count)]
    is_stable = all(relative_error(grown[:1], first) <= limit for grown, first in zip(whole, begin, strict=True))
    if is_stable and not path.is_forward:
        return Trial(longer, text, [logits[-steps:] for logits in whole], next_logits), True
    right = [stepwise_logits(backbone, longer, b, text[b]) for b in range(count)]
    return Trial(longer, text, right, stepwise_logits), is_stable


def _of_logits(path: GenerationPath, trial: Trial, options: Decoding, beams: int) -> float:
    """Error of the logits along a text that the path is forced to generate."""
    text, length = trial.text, trial.rows.mask.shape[1]
    forced = LogitsProcessorList([ForcedText(text, length)])
    kept = {"output_logits": True, "return_dict_in_generate": True, "logits_processor": forced}
    found = path.run(trial.rows, {**options, **kept, "max_new_tokens": text.shape[1]})
    ours = torch.stack(found.logits, dim=1)
    return max(relative_error(*pair) for pair in zip(ours, trial.right, strict=True))


def _of_beams(path: GenerationPath, trial: Trial, options: Decoding, beams: int) -> float:
    """Error of the log-likelihoods that rank beams."""
    steps, length = trial.text.shape[1], trial.rows.mask.shape[1]
    shaped = {"num_beams": beams, "num_return_sequences": beams, "min_new_tokens": steps, "length_penalty": 0.0}
    kept = {"output_scores": True, "return_dict_in_generate": True}
    found = path.run(trial.rows, {**options, **shaped, **kept, "max_new_tokens": steps})
    errors = []
    for number, answer in enumerate(found.sequences[:, length:]):
        logits = trial.logits(path.backbone, trial.rows, number // beams, answer)
        right = logits.float().log_softmax(-1).gather(1, answer[:, None]).sum()
        errors.append((found.sequences_scores[number] - right).abs() / logits.abs().max())
    return float(torch.stack(errors).nan_to_num(float("inf")).max())


def _of_drafts(path: GenerationPath, trial: Trial, options: Decoding, beams: int) -> float:
    """How much more likely other tokens are than those of the answers."""
    length = trial.rows.mask.shape[1]
    answers = path.run(trial.rows, {**options, "max_new_tokens": trial.text.shape[1]})[:, length:]
    errors = []
    for b, answer in enumerate(answers):
        logits = trial.logits(path.backbone, trial.rows, b, answer)
        behind = logits.amax(1) - logits.gather(1, answer[:, None])[:, 0]
        errors.append((behind / logits.abs().amax(1)).max())
    return float(torch.stack(errors).nan_to_num(float("inf")).max())


def next_logits(backbone: DecoderBackbone, rows: RowBatch, b: int, text: Tensor) -> Tensor:
    """[U, V] logits of each token of a text [U] that follows a row, from one forward pass of that row alone."""
    row = rows[[b]].trim()
    reading = Reading(token_ids(row, backbone.codec), row.embeds, {})
    reading = replace(reading, ids=torch.cat([reading.ids, text[None, :-1]], dim=1))
    inputs = plain_inputs(reading.ids, row.first_position if row.kv else None)
    if "logits_to_keep" in signature(backbone.model.forward).parameters:
        inputs["logits_to_keep"] = len(text)
    with backbone.injected(row.kv_prompt), replace_embeddings(backbone.model, reading, once=True):
        return backbone.model(**inputs).logits[0, -len(text) :]  # type: ignore[no-any-return]


def stepwise_logits(backbone: DecoderBackbone, rows: RowBatch, b: int, text: Tensor) -> Tensor:
    """The same from one forward pass for each token, over the text before it."""
    each = [next_logits(backbone, rows, b, text[: step + 1])[-1] for step in range(len(text))]
    return torch.stack(each)


def some_text(backbone: GeneratingBackbone, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, length] that end no answer, the same for each call, and their embeddings."""
    ends = backbone.model.generation_config.eos_token_id
    special = {*backbone.codec.tokenizer.all_special_ids, *(ends if isinstance(ends, list) else [ends])}
    words = backbone.word_embeddings
    plain = torch.tensor([token for token in range(min(1000, len(words))) if token not in special])
    choices = torch.randint(len(plain), (rows, max(length, 0)), generator=torch.Generator().manual_seed(0))
    tokens = plain[choices].to(words.device)
    return tokens, backbone.embed(tokens)


def relative_error(ours: Tensor, right: Tensor) -> float:
    """The largest error of logits [U, V], relative to the largest logit."""
    error = (ours - right).abs().max() / right.abs().max().clamp(min=1e-30)
    return float(error.float().nan_to_num(float("inf")))


class ForcedText(LogitsProcessor):  # type: ignore[misc]
    """Forces rows to generate a text.

    Args:
        text: [B, U] tokens.
        skip: Tokens before the text.
    """

    def __init__(self, text: Tensor, skip: int) -> None:
        self.text, self.skip = text, skip

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """The logits [B, V] of the next token."""
        step = input_ids.shape[1] - self.skip
        return torch.full_like(scores, float("-inf")).scatter(1, self.text[:, step, None], 0.0)
