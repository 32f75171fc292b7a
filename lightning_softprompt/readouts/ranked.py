"""Class scores from the probability of whole candidates."""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Batch, Classes
from lightning_softprompt.readouts.base import WordReadout


@final
class RankedChoices(WordReadout):
    """Log-probability of each class's text, however many tokens it has. The first word of a class is its text.

    Costs C times the rows of `LabelWords`.

    Args:
        codec: The backbone's.
        classes: How the classes are spoken.
        normalize: Divides the log-probability by the number of tokens (`tokens`) or of characters (`characters`), so
            that long candidates are not at a loss.
        premise: A template without columns, such as `"Sentiment:{target}"`; the score is then the log-probability
            gained over it, domain-conditional pointwise mutual information (Holtzman et al. 2021, arXiv 2104.08315).

    Raises:
        ValueError: If a candidate has no tokens, or the premise names a column.
    """

    size: Tensor

    def __init__(
        self,
        codec: Codec,
        classes: Classes,
        normalize: Literal["none", "tokens", "characters"] = "none",
        premise: str | None = None,
    ) -> None:
        super().__init__(codec, classes)
        texts = [words[0] for words in classes.words.values()]
        self.candidates = [codec.ids(text) for text in texts]
        if empty := [text for text, ids in zip(texts, self.candidates, strict=True) if not ids]:
            raise ValueError(f"every class wants a text with at least one token, got {empty}")
        sizes = {"none": [1] * len(texts), "tokens": [*map(len, self.candidates)], "characters": [*map(len, texts)]}
        self.register_buffer("size", torch.tensor(sizes[normalize]), persistent=False)
        self.premise = None if premise is None else self._premise(Template(premise))

    def _premise(self, template: Template) -> Batch:
        if template.columns:
            raise ValueError(f"the premise is the same for all rows and names no columns, got {list(template.columns)}")
        return self.codec.collate([self.codec.encode(template.pieces({}), "")])

    def forward(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Scores [B, C] in float32."""
        scores = self._log_probability(lm, batch)
        if self.premise is not None:
            scores = scores - self._log_probability(lm, self.premise.to(batch.input_ids.device))
        return scores / self.size

    def _log_probability(self, lm: PromptedLM, batch: Batch) -> Tensor:
        rows = self.codec.candidates(batch, self.candidates)  # B * C rows
        return -lm.cross_entropy(rows).sum(1).unflatten(0, (len(batch), len(self.candidates)))
