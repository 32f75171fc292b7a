"""Demonstrations as the first value of a prompt: what each token of them is, and how it may be trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.template import TARGET, Template
from lightning_softprompt.core.types import IGNORE, Batch, Text

SEPARATOR = "\n\n"
FORMAT, INPUT, LABEL, SEAM = range(4)  # what a token belongs to: the template's words, a column, the answer, neither
KINDS = {"literal": FORMAT, "column": INPUT, TARGET: LABEL, "seam": SEAM}


@dataclass(frozen=True)
class Context:
    """Demonstrations in tokens.

    Args:
        ids: [P].
        kinds: [P] what each belongs to.
        numbers: [P] the demonstration that each belongs to, counted from 0.
        start: Special tokens that open a row.
    """

    ids: Tensor
    kinds: Tensor
    numbers: Tensor
    start: tuple[int, ...]

    @classmethod
    def of(cls, codec: Codec, template: Template, demonstrations: Sequence[Mapping[str, str]]) -> Context:
        """Of rows as `Classes.demonstrations` has them, each followed by a seam."""
        spans: list[tuple[int, str, int]] = []  # end, kind and demonstration of each stretch of text
        pieces: list[Text] = []
        length = 0
        for number, row in enumerate(demonstrations):
            for kind, part in [*template.parts(row, row[TARGET]), ("seam", SEPARATOR)]:
                length += len(part)
                spans.append((length, kind, number))
                pieces.append(Text(part, template_spans=((0, len(part)),) if kind == "literal" else ()))
        ids, places = codec.tokenize(pieces)
        owners = [next(span for span in spans if end <= span[0]) for _, end in places]
        kinds = torch.tensor([KINDS[kind] for _, kind, _ in owners])
        start = () if tuple(ids[: len(codec.start)]) == codec.start else codec.start
        return cls(torch.tensor(ids), kinds, torch.tensor([n for *_, n in owners]), start)

    def weights(self, decay: float) -> Tensor:
        """[P]: the decay once for an answer's token of the last demonstration, twice for the one before; else 0."""
        return decay ** (self.numbers.max() + 1 - self.numbers) * (self.kinds == LABEL)

    def batch(self) -> Batch:
        """The demonstrations as one row whose targets are their answers."""
        ids = torch.cat([torch.tensor(self.start, dtype=torch.long), self.ids])[None]
        source = torch.arange(ids.shape[1])[None] < len(self.start)
        targets = self.ids.where(self.kinds == LABEL, IGNORE)[None]
        return Batch(ids, torch.ones_like(ids, dtype=torch.bool), source, targets, torch.zeros(1, 1, dtype=torch.long))
