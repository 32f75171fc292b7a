"""Losses of training rows: under the bare backbone, stored in the user's cache, and under the prompt in training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, final

import numpy as np
import torch
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import IGNORE, Batch, Example, SoftPrompt
from lightning_softprompt.data.difficulty.base import Scores, read_encoded
from lightning_softprompt.data.prepared import Collate, PreparedRows
from lightning_softprompt.data.sampling.row_order import Indices
from lightning_softprompt.data.splits.row_encoder import RowEncoder
from lightning_softprompt.data.token_cache import content_key
from lightning_softprompt.system.atomic_files import write_if_possible
from lightning_softprompt.system.cache_dirs import cache_folder
from lightning_softprompt.system.tensor_files import read_tensors, write_tensors

log = logging.getLogger(__name__)
LOSSES = "losses"


class TrainedPrompt(Protocol):
    """The part of a method that gives its prompt during a training."""

    loaded: Backbone

    def current_prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the prompt without dropout and without gradient."""


@final
@dataclass(frozen=True)
class RowLosses:
    """Measures losses of rows with the backbone of a training; without a training, it loads the backbone.

    Args:
        trainer: The trainer of the data module, if any.
        spec: The backbone.
        encoder: Encodes rows whose columns are empty.
        batch_size: Rows per batch.
        cache: Whether losses of the bare backbone are stored in the user's cache.
    """

    trainer: Any
    spec: BackboneSpec
    encoder: RowEncoder
    batch_size: int
    cache: bool

    def bare_losses(self, rows: PreparedRows) -> Scores:
        """Returns the mean loss per target token of each row without prompt."""
        backbone = load_backbone(self.spec) if self.trainer is None else self._method.loaded
        path = cache_folder("row_losses") / f"{self._key(backbone, rows)}.safetensors"
        stored = self._share(lambda: _read_losses(path) if self.cache else None)
        if stored is not None:
            return stored
        log.info("Measuring the loss of %d training rows without prompt", len(rows))
        losses = self._measure(rows, backbone, lambda batch: None)
        if self.cache and self._ranks[0] == 0:
            tensors = {LOSSES: torch.from_numpy(losses)}
            write_if_possible(path, lambda draft: write_tensors(draft, tensors))
        return losses

    def losses_without_source(self, rows: PreparedRows) -> Scores:
        """Returns the same as `bare_losses` for rows with empty columns."""
        examples = [_empty_columns(rows.examples[row]) for row in range(len(rows))]
        encoded = [self.encoder.encode(example) for example in examples]
        return self.bare_losses(PreparedRows(examples, encoded, rows.origins))

    def current_losses(self, rows: PreparedRows) -> Scores:
        """Returns the mean loss per target token of each row with the prompt at this point of the training.

        Raises:
            ValueError: If there is no training.
        """
        if self.trainer is None:
            raise ValueError("losses with the trained prompt require a Trainer; pass the data module to trainer.fit")
        method = self._method
        return self._measure(rows, method.loaded, method.current_prompt)

    @property
    def _method(self) -> TrainedPrompt:
        method: TrainedPrompt = self.trainer.lightning_module.methods[0]
        return method

    @property
    def _ranks(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _key(self, backbone: Backbone, rows: PreparedRows) -> str:
        return content_key([backbone.fingerprint(), self.encoder.codec.fingerprint, *read_encoded(rows)])

    def _share(self, read: Callable[[], Scores | None]) -> Scores | None:
        """Returns what the first process reads, on all processes."""
        if self.trainer is None or self._ranks[1] == 1:
            return read()
        value: Scores | None = self.trainer.strategy.broadcast(read() if self._ranks[0] == 0 else None)
        return value

    @torch.no_grad()
    def _measure(self, rows: PreparedRows, backbone: Backbone, prompt: Callable[[Batch], SoftPrompt | None]) -> Scores:
        """Returns the loss of each row. Each process measures its share of the rows."""
        rank, world_size = self._ranks
        by_length = np.argsort(-np.asarray(rows.lengths), kind="stable")
        shares = [by_length[number::world_size] for number in range(world_size)]
        device = backbone.word_embeddings.device
        context = nullcontext() if self.trainer is None else self.trainer.precision_plugin.forward_context()
        parts = []
        with context:
            for batch in self._batches(rows, _lengthen(shares[rank], len(shares[0]))):
                moved = batch.to(device)
                parts.append(_mean_losses(backbone.cross_entropy(moved, prompt(moved)), moved.targets))
        losses = torch.cat(parts).double()
        of_ranks = losses[None] if world_size == 1 else self.trainer.strategy.all_gather(losses)
        result = np.empty(len(rows))
        for share, values in zip(shares, of_ranks.cpu().numpy(), strict=True):
            result[share] = values[: len(share)]
        return result

    def _batches(self, rows: PreparedRows, order: Indices) -> Iterator[Batch]:
        collate = Collate(self.encoder.codec)
        for begin in range(0, len(order), self.batch_size):
            numbers = order[begin : begin + self.batch_size].tolist()
            yield collate([(row, rows.encoded[row], rows.examples[row]) for row in numbers])


def _lengthen(order: Indices, length: int) -> Indices:
    """Repeats the last row, so that all processes run the same number of batches."""
    return np.concatenate([order, np.repeat(order[-1:], length - len(order))])


def _mean_losses(losses: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean loss per target token of each row [B].

    Raises:
        ValueError: If a row has no targets.
    """
    counts = (targets != IGNORE).sum(1)
    if bool((counts == 0).any()):
        raise ValueError("a training row has no target tokens, so that its loss is not a measure of difficulty")
    return losses.sum(1) / counts


def _empty_columns(example: Example) -> Example:
    return replace(example, fields=dict.fromkeys(example.fields, ""), words={}, template_spans={})


def _read_losses(path: Any) -> Scores | None:
    """Returns the losses in a file; None if the file does not exist or is damaged."""
    try:
        return read_tensors(path)[LOSSES].numpy() if path.is_file() else None
    except (OSError, ValueError, KeyError):
        log.warning("%s is damaged and is replaced", path)
        return None
