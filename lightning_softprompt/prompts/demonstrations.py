"""Tokenized demonstrations as the initial value of a prompt, with the kind of each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.template import TARGET, Template
from lightning_softprompt.core.types import IGNORE, Batch, Text

SEPARATOR = "\n\n"
FORMAT, INPUT, LABEL, SEAM = range(4)  # kinds of tokens: template text, a column, the answer, a separator
KINDS = {"literal": FORMAT, "column": INPUT, TARGET: LABEL, "seam": SEAM}


@dataclass(frozen=True)
class Context:
    """Tokenized demonstrations.

    Args:
        ids: Token ids [P].
        kinds: The kind of each token [P].
        numbers: The index of each token's demonstration [P].
        start: Special tokens at the start of a row.
    """

    ids: Tensor
    kinds: Tensor
    numbers: Tensor
    start: tuple[int, ...]

    @classmethod
    def from_rows(cls, codec: Codec, template: Template, demonstrations: Sequence[Mapping[str, str]]) -> Context:
        """Tokenizes rows in the form of `Classes.demonstrations`, each followed by a separator."""
        spans: list[tuple[int, str, int]] = []  # end, kind and demonstration of each piece of text
        pieces: list[Text] = []
        length = 0
        for number, row in enumerate(demonstrations):
            for kind, part in [*template.parts(row, row[TARGET]), ("seam", SEPARATOR)]:
                length += len(part)
                spans.append((length, kind, number))
                template_spans = ((0, len(part)),) if kind == "literal" else ()
                pieces.append(Text(part, template_spans=template_spans))
        ids, places = codec.tokenize(pieces)
        token_kinds, token_numbers = [], []
        for _, end in places:
            _, kind, number = next(span for span in spans if end <= span[0])
            token_kinds.append(KINDS[kind])
            token_numbers.append(number)
        has_start = tuple(ids[: len(codec.start)]) == codec.start
        start = () if has_start else codec.start
        return cls(torch.tensor(ids), torch.tensor(token_kinds), torch.tensor(token_numbers), start)

    def weights(self, decay: float) -> Tensor:
        """Weights [P] of answer tokens: decay for the last demonstration, decay^2 for the previous one; 0 elsewhere."""
        distance = self.numbers.max() + 1 - self.numbers
        return decay**distance * (self.kinds == LABEL)

    def batch(self) -> Batch:
        """Returns the demonstrations as one row whose targets are their answers."""
        start = torch.tensor(self.start, dtype=torch.long)
        ids = torch.cat([start, self.ids])[None]
        mask = torch.ones_like(ids, dtype=torch.bool)
        source = torch.arange(ids.shape[1])[None] < len(self.start)
        targets = self.ids.where(self.kinds == LABEL, IGNORE)[None]
        return Batch(ids, mask, source, targets, torch.zeros(1, 1, dtype=torch.long))
