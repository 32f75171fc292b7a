"""Class scores from the probabilities of candidate texts."""

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
    """Log-probability of the text of each class, of any number of tokens. The first label word of a class is its text.

    Costs C times the rows of `LabelWords`.

    Args:
        codec: Codec of the backbone.
        classes: The classes and their label words.
        normalize: Divide the log-probability by the number of `tokens` or `characters`, to compare candidates of
            different lengths.
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
            raise ValueError(f"every class requires a text with at least one token, got {empty}")
        sizes = {
            "none": [1] * len(texts),
            "tokens": [len(ids) for ids in self.candidates],
            "characters": [len(text) for text in texts],
        }
        self.register_buffer("size", torch.tensor(sizes[normalize]), persistent=False)
        self.premise = None if premise is None else self._premise(Template(premise))

    def _premise(self, template: Template) -> Batch:
        if template.columns:
            raise ValueError(
                f"the premise is the same for all rows and must not name columns, got {list(template.columns)}"
            )
        return self.codec.collate([self.codec.encode(template.pieces({}), "")])

    def forward(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Computes scores [B, C] in float32."""
        scores = self._log_probability(lm, batch)
        if self.premise is not None:
            scores = scores - self._log_probability(lm, self.premise.to(batch.input_ids.device))
        return scores / self.size

    def _log_probability(self, lm: PromptedLM, batch: Batch) -> Tensor:
        rows = self.codec.candidates(batch, self.candidates)  # B * C rows
        log_probabilities = -lm.cross_entropy(rows).sum(1)  # [B * C]
        return log_probabilities.unflatten(0, (len(batch), len(self.candidates)))
