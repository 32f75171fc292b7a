"""Generation of encoder-decoders by the fastest path that agrees with the forward pass of each row alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList

from lightning_softprompt.backbones.generation.backbone import EncoderDecoderBackbone
from lightning_softprompt.backbones.generation.generate import DRAFTED, generate, uses_speculation
from lightning_softprompt.backbones.generation.path_choice import (
    FAILURES,
    HALF_TOLERANCE,
    TOLERANCE,
    GenerationUnsupportedError,
)
from lightning_softprompt.backbones.generation.path_trial import STEPS, STRUCTURE, ForcedText, relative_error, some_text
from lightning_softprompt.backbones.insertion.reading import Reading, replace_embeddings
from lightning_softprompt.backbones.kernels.prepacked_linear import plain_products
from lightning_softprompt.core.types import SoftPrompt

log = logging.getLogger(__name__)
OWN_CACHE = ("cache_implementation", *DRAFTED)  # options that require a cache


@dataclass(frozen=True)
class EncoderRows:
    """Rows for an encoder, padded on the right.

    Args:
        ids: [B, M] token ids, with placeholders for soft tokens.
        embeds: [B, M, H] embeddings.
        mask: [B, M] bool, False on padding.
        prompt: The prompt, for its keys and values.
    """

    ids: Tensor
    embeds: Tensor
    mask: Tensor
    prompt: SoftPrompt | None

    def only(self, rows: list[int]) -> EncoderRows:
        """Some of the rows, without columns in which all of them have padding."""
        mask = self.mask[rows]
        longest = int(mask.sum(1).max())
        ids = self.ids[rows, :longest]
        embeds = self.embeds[rows, :longest]
        prompt = self.prompt and self.prompt.only(rows)
        return EncoderRows(ids, embeds, mask[:, :longest], prompt)


@dataclass(frozen=True)
class Path:
    """A path by which rows are generated.

    Args:
        has_cache: Whether the decoder caches keys and values; if not, it reads the answer again for each new token.
        is_batched: Whether rows run together or one by one.
    """

    has_cache: bool
    is_batched: bool

    @property
    def description(self) -> str:
        """A description for users."""
        rows = "rows run together, padded on the right" if self.is_batched else "rows run one by one"
        cache = "the decoder caches keys and values" if self.has_cache else "the decoder has no cache"
        return f"{rows}; {cache}"

    def options(self, decoding: dict[str, Any]) -> dict[str, Any]:
        """The decoding options, without a cache if the path has none."""
        if self.has_cache:
            return decoding
        options = {name: value for name, value in decoding.items() if name not in OWN_CACHE}
        return options | {"use_cache": False}


PATHS = (  # the fastest first
    Path(True, True),
    Path(False, True),
    Path(True, False),
    Path(False, False),
)


class Seq2SeqGenerator:
    """Generates by the fastest correct path, and repeats the trial for batches that exceed all earlier ones.

    Args:
        backbone: The backbone whose model generates.
    """

    def __init__(self, backbone: EncoderDecoderBackbone) -> None:
        self.backbone = backbone
        self.paths: dict[tuple[Any, ...], list[Path]] = {}  # remaining paths by options
        self.tried: dict[tuple[Any, ...], tuple[int, int]] = {}  # the longest row and the most padding that passed
        self.reasons: list[str] = []

    @property
    def execution_description(self) -> str:
        """The path of the first kind of decoding, and why faster ones failed."""
        paths = next(iter(self.paths.values()), list(PATHS))
        if not paths:
            return f"it cannot generate: {'; '.join(dict.fromkeys(self.reasons))}"
        description = paths[0].description
        return f"{description} ({self.reasons[-1]})" if self.reasons else description

    def __call__(self, rows: EncoderRows, decoding: dict[str, Any]) -> Tensor:
        """Answers [B * R, U], R for each row.

        Raises:
            GenerationUnsupportedError: If no path agrees with the forward pass of each row alone.
        """
        path = self.path_for(rows, decoding)
        parts = [rows]
        if not path.is_batched:
            parts = [rows.only([b]) for b in range(len(rows.mask))]
        skip, options = len(self.backbone.opening), path.options(decoding)
        answers: list[Tensor] = []
        for part in parts:
            answers += self.run(part, options)[:, skip:]
        return pad_sequence(answers, batch_first=True, padding_value=self.backbone.codec.pad_id)

    def run(self, rows: EncoderRows, options: dict[str, Any]) -> Any:
        """The result of transformers' `generate` for rows that run together; the decoder starts as in training."""
        opening = rows.ids.new_tensor(self.backbone.opening)
        inputs: dict[str, Any] = {"attention_mask": rows.mask.long(), "forced_bos_token_id": None}
        if len(opening) > 1:
            inputs["decoder_input_ids"] = opening.expand(len(rows.ids), -1)
        with self.backbone.inject(rows.prompt):
            reading = Reading(rows.ids, rows.embeds, inputs)
            return generate(self.backbone, reading, len(opening), options)

    def path_for(self, rows: EncoderRows, decoding: dict[str, Any]) -> Path:
        """The fastest correct path for these rows."""
        has_kv = rows.prompt is not None and bool(rows.prompt.kv)
        steps = min(STEPS, decoding.get("max_new_tokens") or STEPS)
        kind = (*(decoding.get(name) for name in STRUCTURE), has_kv, steps)
        paths = self.paths.setdefault(kind, list(PATHS))
        lengths = rows.mask.sum(1)
        difference = lengths.max() - lengths.min()
        extent = int(lengths.max()), int(difference)
        before = self.tried.get(kind, (-1, -1))
        if all(now <= then for now, then in zip(extent, before, strict=True)):
            return self._first(paths)
        extremes = {int(lengths.argmin()), int(lengths.argmax())}
        two = rows.only(sorted(extremes))
        while fault := self._fault_of(self._first(paths), two, decoding, steps):
            log.info("%s: rejected the path by which %s: %s", self.backbone.spec.name, paths[0].description, fault)
            self.reasons.append(fault)
            del paths[0]
            before = (-1, -1)
        length, padding = (max(pair) for pair in zip(extent, before, strict=True))
        self.tried[kind] = length, padding
        return paths[0]

    def _first(self, paths: list[Path]) -> Path:
        if not paths:
            raise GenerationUnsupportedError(
                f"{self.backbone.spec.name} ({type(self.backbone.model).__name__}) cannot generate: "
                f"{'; '.join(dict.fromkeys(self.reasons))}. Use a task that scores texts, or another backbone"
            )
        return paths[0]

    def _fault_of(self, path: Path, rows: EncoderRows, decoding: dict[str, Any], steps: int) -> str:
        """Why a path fails for these rows; empty if it passes."""
        structure = {name: decoding[name] for name in STRUCTURE if name in decoding}
        is_exact = self.backbone.model.dtype in (torch.float32, torch.float64)
        try:
            with plain_products(), torch.autocast(rows.embeds.device.type, enabled=False):
                error = self._error_of(path, rows, path.options(structure), steps)
        except FAILURES as failure:
            return (str(failure) or type(failure).__name__).splitlines()[0]
        is_right = error <= (TOLERANCE if is_exact else HALF_TOLERANCE)
        return "" if is_right else f"results would be off by {error:.1e} if {path.description}"

    def _error_of(self, path: Path, rows: EncoderRows, options: dict[str, Any], steps: int) -> float:
        text, _ = some_text(self.backbone, len(rows.ids), steps)
        if uses_speculation(options):  # speculative decoding cannot force a text
            options = {name: value for name, value in options.items() if name not in DRAFTED}
        numbers = list(range(len(text)))
        groups = [numbers] if path.is_batched else [[b] for b in numbers]
        errors = []
        for group in groups:
            forced = LogitsProcessorList([ForcedText(text[group], len(self.backbone.opening))])
            output_options = {"output_logits": True, "return_dict_in_generate": True, "logits_processor": forced}
            output = self.run(rows.only(group), {**options, **output_options, "max_new_tokens": steps})
            for logits, b in zip(torch.stack(output.logits, dim=1), group, strict=True):
                expected = self._expected_logits(rows.only([b]), text[b])
                errors.append(relative_error(logits, expected))
        return max(errors)

    def _expected_logits(self, row: EncoderRows, text: Tensor) -> Tensor:
        """[U, V] logits of each token of a text [U] in the forward pass of one row.

        A model whose logits depend on later tokens reads the text up to each token only.
        """
        logits = self._forward(row, text)
        first = self._forward(row, text[:1])
        if relative_error(logits[:1], first) <= TOLERANCE:
            return logits
        stepwise = []
        for end in range(1, len(text) + 1):
            logits = self._forward(row, text[:end])
            stepwise.append(logits[-1:])
        return torch.cat(stepwise)

    def _forward(self, row: EncoderRows, text: Tensor) -> Tensor:
        """[U, V] logits of each token of a text [U], from one forward pass."""
        opening = text.new_tensor(self.backbone.opening)
        read = torch.cat([opening, text[:-1]])[None]
        model: Any = self.backbone.model
        reading = Reading(row.ids, row.embeds, {})
        with self.backbone.inject(row.prompt), replace_embeddings(self.backbone.stack, reading, once=True):
            logits = model(input_ids=row.ids, decoder_input_ids=read, use_cache=False).logits
        return logits[0, -len(text) :]  # type: ignore[no-any-return]
