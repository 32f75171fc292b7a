"""Chooses the generation path of a model by comparing paths with the forward pass of each row alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_softprompt.backbones.execution.row_batch import RowBatch
from lightning_softprompt.backbones.generation.backbone import DecoderBackbone
from lightning_softprompt.backbones.generation.path_trial import STEPS, STRUCTURE, error_of
from lightning_softprompt.backbones.generation.paths import (
    Decoding,
    EqualLengths,
    GenerationPath,
    LeftPadded,
    SharedPrompt,
    WithoutCache,
)

log = logging.getLogger(__name__)
TOLERANCE = 1e-4  # relative error of logits in float32
# In half precision, rounding alone causes errors of some percent. Rows of one length run exactly as in transformers.
HALF_TOLERANCE, HALF_TOLERANCE_EQUAL_LENGTHS = 0.03, 0.3
FAILURES = (NotImplementedError, TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError)


class GenerationUnsupportedError(ValueError):
    """A model whose generation does not agree with its forward pass."""


@dataclass
class Attempt:
    """The trials of one kind of decoding.

    Args:
        structure: The options that determine how the model runs.
        paths: Remaining paths, the fastest first.
        length: Tokens of the longest sequence for which the first path passed.
        padding: Most columns of padding for which it passed.
        reasons: Why earlier paths failed.
    """

    structure: tuple[Any, ...]
    paths: list[GenerationPath]
    length: int = -1
    padding: int = -1
    reasons: list[str] = field(default_factory=list)

    def covers(self, length: int, padding: int) -> bool:
        """Whether earlier trials cover rows of this length and padding."""
        return length <= self.length and padding <= self.padding


class Generator:
    """Generates by the fastest correct path, and repeats the trial for batches that exceed all earlier ones.

    Args:
        backbone: The backbone whose model generates.
    """

    def __init__(self, backbone: DecoderBackbone) -> None:
        self.backbone = backbone
        self.attempts: dict[tuple[Any, ...], Attempt] = {}
        self.rejected: dict[tuple[Any, ...], set[type[GenerationPath]]] = {}  # by structure

    def __call__(self, rows: RowBatch, decoding: Decoding) -> Tensor:
        """Answers [B * R, U] to rows.

        Raises:
            GenerationUnsupportedError: If no path agrees with the forward pass of each row alone.
        """
        return self.path_for(rows, decoding)(rows, decoding)

    @property
    def execution_description(self) -> str:
        """The path of the first kind of decoding, and why faster ones failed."""
        if not self.attempts:
            return "the first batch determines how rows are generated"
        attempt = next(iter(self.attempts.values()))
        if not attempt.paths:
            return f"it cannot generate: {'; '.join(dict.fromkeys(attempt.reasons))}"
        return attempt.paths[0].description + "".join(f" ({reason})" for reason in attempt.reasons[-1:])

    def path_for(self, rows: RowBatch, decoding: Decoding) -> GenerationPath:
        """The fastest correct path for these rows."""
        attempt = self._attempt_for(rows, decoding)
        lengths = rows.mask.sum(1)
        longest, padding = int(lengths.argmax()), int(lengths.max() - lengths.min())
        new = decoding.get("max_new_tokens") or STEPS
        length = int(rows.first_position.max()) + int(lengths.max()) + new
        if attempt.covers(length, padding):
            return attempt.paths[0]
        extremes = sorted({int(lengths.argmin()), longest})
        while not self._passes(attempt, rows[extremes], new, decoding):
            attempt.length = attempt.padding = -1
        attempt.length, attempt.padding = max(attempt.length, length), max(attempt.padding, padding)
        return attempt.paths[0]

    def _attempt_for(self, rows: RowBatch, decoding: Decoding) -> Attempt:
        has_shared_prompt = SharedPrompt.applies(rows, decoding)
        uses_beams = (decoding.get("num_beams") or 1) > 1
        steps = min(STEPS, decoding.get("max_new_tokens") or STEPS)
        structure = (*(decoding.get(name) for name in STRUCTURE), bool(rows.kv), uses_beams)
        kind = (structure, has_shared_prompt, steps)
        if kind not in self.attempts:
            paths: list[type[GenerationPath]] = [LeftPadded, EqualLengths, WithoutCache]
            if has_shared_prompt:
                paths = [SharedPrompt, *paths]
            self.attempts[kind] = Attempt(structure, [path(self.backbone) for path in paths])
        return self.attempts[kind]

    def _passes(self, attempt: Attempt, rows: RowBatch, new: int, decoding: Decoding) -> bool:
        """Tries the first remaining path, and drops it if it fails."""
        rejected = self.rejected.setdefault(attempt.structure, set())
        attempt.paths = [path for path in attempt.paths if type(path) not in rejected]
        if not attempt.paths:
            raise GenerationUnsupportedError(
                f"{self.backbone.spec.name} ({type(self.backbone.model).__name__}) cannot generate: "
                f"{'; '.join(dict.fromkeys(attempt.reasons))}. Use a task that scores texts, or another backbone"
            )
        path = attempt.paths[0]
        if isinstance(path, SharedPrompt):  # the position of the cached prompt depends on the padding of a row
            rows = rows.append_shorter_copy()
        reason = self._failure(path, rows, new, decoding)
        if reason:
            log.info("%s: rejected the path by which %s: %s", self.backbone.spec.name, path.description, reason)
            attempt.reasons.append(reason)
            rejected.add(type(path))
        return not reason

    def _failure(self, path: GenerationPath, rows: RowBatch, new: int, decoding: Decoding) -> str:
        """Why a path fails for these rows; empty if it passes."""
        try:
            limit = self._limit(path)
            error = error_of(path, rows, new, decoding, limit)
        except FAILURES as failure:
            return (str(failure) or type(failure).__name__).splitlines()[0]
        return "" if error <= limit else f"results would differ by {error:.1e} if {path.description}"

    def _limit(self, path: GenerationPath) -> float:
        if self.backbone.model.dtype in (torch.float32, torch.float64):
            return TOLERANCE
        return HALF_TOLERANCE if path.batches_lengths else HALF_TOLERANCE_EQUAL_LENGTHS
