"""How an encoder-decoder generates: by the fastest path that agrees with the forward pass of each row alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList

from lightning_softprompt.backbones.generation import DRAFTED, Reading, drafted, embedded_as, generate
from lightning_softprompt.backbones.generation_choice import FAILURES, HALF_LIMIT, LIMIT, GenerationUnsupportedError
from lightning_softprompt.backbones.generation_trial import STEPS, STRUCTURE, ForcedText, relative_error, some_text
from lightning_softprompt.backbones.linear import plain_products
from lightning_softprompt.types import SoftPrompt

if TYPE_CHECKING:
    from lightning_softprompt.backbones.seq2seq import Seq2SeqBackbone

log = logging.getLogger(__name__)
OWN_CACHE = ("cache_implementation", *DRAFTED)  # options that require a cache


@dataclass(frozen=True)
class EncoderRows:
    """Rows that an encoder reads, padded behind.

    Args:
        ids: [B, M] tokens, with placeholders on soft ones.
        embeds: [B, M, H] what they are embedded as.
        mask: [B, M] bool.
        prompt: Keys and values from outside.
    """

    ids: Tensor
    embeds: Tensor
    mask: Tensor
    prompt: SoftPrompt | None

    def only(self, rows: list[int]) -> EncoderRows:
        """Some of them, without columns that none of these has."""
        mask = self.mask[rows]
        longest = int(mask.sum(1).max())
        parts = self.ids[rows, :longest], self.embeds[rows, :longest], mask[:, :longest]
        return EncoderRows(*parts, self.prompt and self.prompt.only(rows))


@dataclass(frozen=True)
class Path:
    """A path by which rows are generated.

    Args:
        has_cache: Whether the decoder keeps its keys and values, or reads an answer again for each new token.
        is_batched: Whether rows run together, or one by one.
    """

    has_cache: bool
    is_batched: bool

    @property
    def description(self) -> str:
        """How rows run, as a person reads it."""
        rows = "rows run together, padded behind them" if self.is_batched else "rows run one by one"
        cache = "the decoder keeps its keys and values" if self.has_cache else "the decoder has no cache"
        return f"{rows}; {cache}"

    def options(self, decoding: dict[str, Any]) -> dict[str, Any]:
        """The options of decoding, without a cache where the path has none."""
        if self.has_cache:
            return decoding
        return {name: value for name, value in decoding.items() if name not in OWN_CACHE} | {"use_cache": False}


PATHS = (Path(True, True), Path(False, True), Path(True, False), Path(False, False))  # the fastest first


class Seq2SeqGenerator:
    """Generates by the fastest path that is right; a batch that goes beyond all earlier ones tries it out again.

    Args:
        backbone: Whose model generates.
    """

    def __init__(self, backbone: Seq2SeqBackbone) -> None:
        self.backbone = backbone
        self.paths: dict[tuple[Any, ...], list[Path]] = {}  # those that are left, by the options that matter
        self.tried: dict[tuple[Any, ...], tuple[int, int]] = {}  # the longest row, and the most padding
        self.reasons: list[str] = []

    @property
    def way(self) -> str:
        """The path of the first decoding, and why it is not a faster one."""
        paths = next(iter(self.paths.values()), list(PATHS))
        if not paths:
            return f"it cannot generate: {'; '.join(dict.fromkeys(self.reasons))}"
        return paths[0].description + "".join(f" ({reason})" for reason in self.reasons[-1:])

    def __call__(self, rows: EncoderRows, decoding: dict[str, Any]) -> Tensor:
        """Answers [B * R, U], R of each row.

        Raises:
            GenerationUnsupportedError: If no path gives what the forward pass of a row alone does.
        """
        path = self.path_for(rows, decoding)
        parts = [rows] if path.is_batched else [rows.only([b]) for b in range(len(rows.mask))]
        skip, options = len(self.backbone.opening), path.options(decoding)
        answers = [answer for part in parts for answer in self.run(part, options)[:, skip:]]
        return pad_sequence(answers, batch_first=True, padding_value=self.backbone.codec.pad_id)

    def run(self, rows: EncoderRows, options: dict[str, Any]) -> Any:
        """What transformers' `generate` returns for rows that run together; the decoder opens as in training."""
        opening = rows.ids.new_tensor(self.backbone.opening)
        inputs: dict[str, Any] = {"attention_mask": rows.mask.long(), "forced_bos_token_id": None}
        if len(opening) > 1:
            inputs["decoder_input_ids"] = opening.expand(len(rows.ids), -1)
        with self.backbone.injected(rows.prompt):
            return generate(self.backbone, Reading(rows.ids, rows.embeds, inputs), len(opening), options)

    def path_for(self, rows: EncoderRows, decoding: dict[str, Any]) -> Path:
        """The fastest path that is right for rows like these."""
        has_kv = rows.prompt is not None and bool(rows.prompt.kv)
        steps = min(STEPS, decoding.get("max_new_tokens") or STEPS)
        kind = (*(decoding.get(name) for name in STRUCTURE), has_kv, steps)
        paths = self.paths.setdefault(kind, list(PATHS))
        lengths = rows.mask.sum(1)
        extent = int(lengths.max()), int(lengths.max() - lengths.min())
        before = self.tried.get(kind, (-1, -1))
        if all(now <= then for now, then in zip(extent, before, strict=True)):
            return self._first(paths)
        two = rows.only(sorted({int(lengths.argmin()), int(lengths.argmax())}))
        while fault := self._fault_of(self._first(paths), two, decoding, steps):
            log.info("%s: not generated so that %s: %s", self.backbone.spec.name, paths[0].description, fault)
            self.reasons.append(fault)
            del paths[0]
            before = (-1, -1)
        self.tried[kind] = max(extent[0], before[0]), max(extent[1], before[1])
        return paths[0]

    def _first(self, paths: list[Path]) -> Path:
        if not paths:
            raise GenerationUnsupportedError(
                f"{self.backbone.spec.name} ({type(self.backbone.model).__name__}) cannot generate: "
                f"{'; '.join(dict.fromkeys(self.reasons))}. Use a task that scores texts, or another backbone"
            )
        return paths[0]

    def _fault_of(self, path: Path, rows: EncoderRows, decoding: dict[str, Any], steps: int) -> str:
        """Why a path is not right for these rows; empty where it is."""
        structure = {name: decoding[name] for name in STRUCTURE if name in decoding}
        is_exact = self.backbone.model.dtype in (torch.float32, torch.float64)
        try:
            with plain_products(), torch.autocast(rows.embeds.device.type, enabled=False):
                error = self._error_of(path, rows, path.options(structure), steps)
        except FAILURES as failure:
            return (str(failure) or type(failure).__name__).splitlines()[0]
        is_right = error <= (LIMIT if is_exact else HALF_LIMIT)
        return "" if is_right else f"results would be off by {error:.1e} if {path.description}"

    def _error_of(self, path: Path, rows: EncoderRows, options: dict[str, Any], steps: int) -> float:
        text, _ = some_text(self.backbone, len(rows.ids), steps)
        if drafted(options):  # which forces no text
            options = {name: value for name, value in options.items() if name not in DRAFTED}
        groups = [list(range(len(text)))] if path.is_batched else [[b] for b in range(len(text))]
        errors = []
        for group in groups:
            forced = LogitsProcessorList([ForcedText(text[group], len(self.backbone.opening))])
            kept = {"output_logits": True, "return_dict_in_generate": True, "logits_processor": forced}
            found = self.run(rows.only(group), {**options, **kept, "max_new_tokens": steps})
            for ours, b in zip(torch.stack(found.logits, dim=1), group, strict=True):
                errors.append(relative_error(ours, self._right(rows.only([b]), text[b])))
        return max(errors)

    def _right(self, row: EncoderRows, text: Tensor) -> Tensor:
        """[U, V] of each token of a text [U] in the forward pass of one row, up to there if what follows counts."""
        whole, begin = self._forward(row, text), self._forward(row, text[:1])
        if relative_error(whole[:1], begin) <= LIMIT:
            return whole
        return torch.cat([self._forward(row, text[: step + 1])[-1:] for step in range(len(text))])

    def _forward(self, row: EncoderRows, text: Tensor) -> Tensor:
        """[U, V] of each token of a text [U], from one forward pass."""
        read = torch.cat([text.new_tensor(self.backbone.opening), text[:-1]])[None]
        model: Any = self.backbone.model
        reading = Reading(row.ids, row.embeds, {})
        with self.backbone.injected(row.prompt), embedded_as(self.backbone.stack, reading, once=True):
            logits = model(input_ids=row.ids, decoder_input_ids=read, use_cache=False).logits
        return logits[0, -len(text) :]  # type: ignore[no-any-return]
