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
        expected: [U, V] logits of these tokens in the forward pass of each row alone.
        logits: Computes the same for other texts; see `next_logits`.
    """

    rows: RowBatch
    text: Tensor
    expected: Sequence[Tensor]
    logits: Callable[[DecoderBackbone, RowBatch, int, Tensor], Tensor]

    def only(self, b: int) -> Trial:
        """The trial of one row."""
        rows = self.rows[[b]].trim()
        expected = [self.expected[b]]
        return replace(self, rows=rows, text=self.text[[b]], expected=expected)


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
        parts = [trial]
        if not path.batches_lengths:
            parts = [trial.only(b) for b in range(len(trial.text))]
        if beams > 1:
            return max(_error_of_beams(path, part, options, beams) for part in parts)
        if uses_speculation(decoding):
            return max(_error_of_drafts(path, part, options) for part in parts)
        return max(_error_of_logits(path, part, options) for part in parts)


def trial_of(path: GenerationPath, rows: RowBatch, new: int, limit: float) -> tuple[Trial, bool]:
    """Adds `new` tokens to rows; also returns whether their first logits do not change when rows become longer."""
    backbone, count = path.backbone, len(rows.mask)
    steps = min(STEPS, new)
    tokens, embeds = some_text(backbone, count, new)
    begin = new - steps
    longer = rows.append_text(tokens[:, :begin], embeds[:, :begin])
    text = tokens[:, begin:]
    logits_of_all = [next_logits(backbone, rows, b, tokens[b]) for b in range(count)]
    first_tokens = tokens[:, :1]
    logits_of_first = [next_logits(backbone, rows, b, first_tokens[b]) for b in range(count)]
    pairs = zip(logits_of_all, logits_of_first, strict=True)
    errors = (relative_error(logits[:1], first) for logits, first in pairs)
    is_stable = all(error <= limit for error in errors)
    if is_stable and not path.is_forward:
        last_logits = [logits[-steps:] for logits in logits_of_all]
        return Trial(longer, text, last_logits, next_logits), True
    expected = [stepwise_logits(backbone, longer, b, text[b]) for b in range(count)]
    return Trial(longer, text, expected, stepwise_logits), is_stable


def _error_of_logits(path: GenerationPath, trial: Trial, options: Decoding) -> float:
    """Returns the error of the logits along a text that the path is forced to generate."""
    text, length = trial.text, trial.rows.mask.shape[1]
    forced = LogitsProcessorList([ForcedText(text, length)])
    output_options = {"output_logits": True, "return_dict_in_generate": True, "logits_processor": forced}
    output = path.run(trial.rows, {**options, **output_options, "max_new_tokens": text.shape[1]})
    logits = torch.stack(output.logits, dim=1)
    return max(relative_error(*pair) for pair in zip(logits, trial.expected, strict=True))


def _error_of_beams(path: GenerationPath, trial: Trial, options: Decoding, beams: int) -> float:
    """Returns the error of the log-likelihoods that rank beams."""
    steps = trial.text.shape[1]
    length = trial.rows.mask.shape[1]
    beam_options = {"num_beams": beams, "num_return_sequences": beams, "length_penalty": 0.0}
    length_options = {"min_new_tokens": steps, "max_new_tokens": steps}
    output_options = {"output_scores": True, "return_dict_in_generate": True}
    output = path.run(trial.rows, {**options, **beam_options, **length_options, **output_options})
    errors = []
    for number, answer in enumerate(output.sequences[:, length:]):
        logits = trial.logits(path.backbone, trial.rows, number // beams, answer)
        log_probabilities = logits.float().log_softmax(-1)
        expected = log_probabilities.gather(1, answer[:, None]).sum()
        error = (output.sequences_scores[number] - expected).abs()
        errors.append(error / logits.abs().max())
    return float(torch.stack(errors).nan_to_num(float("inf")).max())


def _error_of_drafts(path: GenerationPath, trial: Trial, options: Decoding) -> float:
    """Returns by how much the best logits exceed those of the answers, relative to the largest logit."""
    length = trial.rows.mask.shape[1]
    options = {**options, "max_new_tokens": trial.text.shape[1]}
    answers = path.run(trial.rows, options)[:, length:]
    errors = []
    for b, answer in enumerate(answers):
        logits = trial.logits(path.backbone, trial.rows, b, answer)
        answer_logits = logits.gather(1, answer[:, None])[:, 0]
        gap = logits.amax(1) - answer_logits
        errors.append((gap / logits.abs().amax(1)).max())
    return float(torch.stack(errors).nan_to_num(float("inf")).max())


def next_logits(backbone: DecoderBackbone, rows: RowBatch, b: int, text: Tensor) -> Tensor:
    """[U, V] logits of each token of a text [U] that follows a row, from one forward pass of that row alone."""
    row = rows[[b]].trim()
    reading = Reading(token_ids(row, backbone.codec), row.embeds, {})
    ids = torch.cat([reading.ids, text[None, :-1]], dim=1)
    reading = replace(reading, ids=ids)
    inputs = plain_inputs(reading.ids, row.first_position if row.kv else None)
    if "logits_to_keep" in signature(backbone.model.forward).parameters:
        inputs["logits_to_keep"] = len(text)
    with backbone.inject(row.kv_prompt), replace_embeddings(backbone.model, reading, once=True):
        return backbone.model(**inputs).logits[0, -len(text) :]  # type: ignore[no-any-return]


def stepwise_logits(backbone: DecoderBackbone, rows: RowBatch, b: int, text: Tensor) -> Tensor:
    """Same as `next_logits`, from one forward pass for each token, over the text before it."""
    logits = []
    for end in range(1, len(text) + 1):
        step_logits = next_logits(backbone, rows, b, text[:end])
        logits.append(step_logits[-1])
    return torch.stack(logits)


def some_text(backbone: GeneratingBackbone, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Returns tokens [B, length] that do not end an answer, equal in each call, and their embeddings."""
    ends = backbone.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    special = {*backbone.codec.tokenizer.all_special_ids, *ends}
    words = backbone.word_embeddings
    candidates = range(min(1000, len(words)))
    plain = torch.tensor([token for token in candidates if token not in special])
    generator = torch.Generator().manual_seed(0)
    choices = torch.randint(len(plain), (rows, max(length, 0)), generator=generator)
    tokens = plain[choices].to(words.device)
    return tokens, backbone.embed(tokens)


def relative_error(logits: Tensor, expected: Tensor) -> float:
    """Returns the largest error of logits [U, V], relative to the largest logit."""
    largest = expected.abs().max().clamp(min=1e-30)
    error = (logits - expected).abs().max() / largest
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
        """Returns the logits [B, V] of the next token."""
        step = input_ids.shape[1] - self.skip
        impossible = torch.full_like(scores, float("-inf"))
        return impossible.scatter(1, self.text[:, step, None], 0.0)
