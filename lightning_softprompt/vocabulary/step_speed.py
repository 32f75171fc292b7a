"""The speed of a model on the same text with several tokenizers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median
from time import process_time

import torch

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Batch, Encoded, SoftPrompt
from lightning_softprompt.vocabulary.corpus_texts import Piece, split_text

WINDOW = 512  # maximum characters of a row
BATCH = 8  # rows of a step
ROUNDS = 3


@dataclass(frozen=True)
class StepSpeed:
    """Forward and backward passes of a model over texts.

    Args:
        tokens: Tokens of the texts.
        num_bytes: Their bytes in UTF-8.
        words: Their words.
        seconds: CPU seconds of the passes.
    """

    tokens: int
    num_bytes: int
    words: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens per CPU second."""
        return self.tokens / self.seconds

    @property
    def words_per_second(self) -> float:
        """Words per CPU second."""
        return self.words / self.seconds

    @property
    def bytes_per_second(self) -> float:
        """Bytes per CPU second."""
        return self.num_bytes / self.seconds


def select_windows(pieces: Iterable[Piece], count: int) -> list[str]:
    """Returns the first parts of texts that the speed is measured on."""
    windows = (window for piece in pieces for window in split_text(piece.text.strip(), WINDOW) if window.strip())
    return list(islice(windows, count))


def measure_speed(backbones: Sequence[Backbone], texts: Sequence[str]) -> list[StepSpeed]:
    """Returns the speed of training steps of a soft token, for each backbone.

    Backbones alternate, and the median of some rounds counts, after a step that is not measured. A decoder predicts
    all tokens. Of other families, the part that reads the text is measured.

    Args:
        backbones: The same model with several tokenizers.
        texts: The texts.
    """
    batches = [list(_batches(backbone, texts)) for backbone in backbones]
    seconds: list[list[float]] = [[] for _ in backbones]
    for backbone, of_backbone in zip(backbones, batches, strict=True):
        _run_step(backbone, of_backbone[0])  # the first step selects the execution path
    for _ in range(ROUNDS):
        for number, backbone in enumerate(backbones):
            start = process_time()
            for batch in batches[number]:
                _run_step(backbone, batch)
            seconds[number].append(process_time() - start)
    num_bytes = sum(len(text.encode()) for text in texts)
    words = sum(len(text.split()) for text in texts)
    speeds = []
    for backbone_batches, times in zip(batches, seconds, strict=True):
        tokens = sum(int(batch.mask.sum()) for batch in backbone_batches)
        speeds.append(StepSpeed(tokens, num_bytes, words, median(times)))
    return speeds


def _batches(backbone: Backbone, texts: Sequence[str]) -> Iterable[Batch]:
    codec, pieces = backbone.codec, Template("{soft}{target}").pieces({})
    rows: list[Encoded] = []
    for text in texts:
        if backbone.is_causal:
            rows.append(codec.encode(pieces, text))
        else:
            rows.append(Encoded((*codec.start, *codec.ids(text)), answers=(), targets=(), slots=(0,)))
    for first in range(0, len(rows), BATCH):
        yield codec.collate(rows[first : first + BATCH])


def _run_step(backbone: Backbone, batch: Batch) -> None:
    """Computes a loss of the batch and its gradient with respect to one soft token."""
    with torch.enable_grad():
        token = torch.zeros(1, 1, backbone.hidden_size, device=backbone.word_embeddings.device, requires_grad=True)
        prompt = SoftPrompt(tokens=token.expand(len(batch), -1, -1))
        if backbone.is_causal and not backbone.head.headless:
            loss = backbone.cross_entropy(batch, prompt).sum()
        else:
            loss = backbone.hidden_states(batch, prompt)[batch.mask].sum()
        torch.autograd.grad(loss, [token])
