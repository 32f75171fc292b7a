"""Class scores from the logits of label words."""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.types import Batch, Classes
from lightning_softprompt.readouts.base import WordReadout


@final
class LabelWords(WordReadout):
    """The logit of a class's label word at the position of the answer; one forward pass scores all classes.

    Every label word must be a single token. Use `RankedChoices` for longer ones.

    Args:
        codec: Codec of the backbone.
        classes: The classes and their label words.
        aggregate: How the words of a class are combined: `sum` adds their probabilities, `mean` averages their logits,
            `max` uses the most probable word.

    Raises:
        ValueError: If a label word is not a single token, or two classes share one.
    """

    ids: Tensor
    pad: Tensor

    def __init__(self, codec: Codec, classes: Classes, aggregate: Literal["sum", "mean", "max"] = "sum") -> None:
        super().__init__(codec, classes)
        self.aggregate = aggregate
        ids = [[self._token(word) for word in words] for words in classes.words.values()]
        self._check_distinct(ids)
        longest = max(len(row) for row in ids)
        padded, pad = [], []
        for row in ids:
            missing = longest - len(row)
            padded.append(row + row[:1] * missing)
            pad.append([False] * len(row) + [True] * missing)
        self.register_buffer("ids", torch.tensor(padded), persistent=False)
        self.register_buffer("pad", torch.tensor(pad), persistent=False)

    def _token(self, word: str) -> int:
        ids = self.codec.ids(word)
        if len(ids) != 1:
            split = self.codec.tokenizer.convert_ids_to_tokens(ids)
            raise ValueError(
                f"label word {word!r} is {len(ids)} tokens {split}; use a single-token word, or --model.readout "
                f"RankedChoices to score longer ones"
            )
        return ids[0]

    def _check_distinct(self, ids: list[list[int]]) -> None:
        seen: dict[int, str] = {}
        for name, row in zip(self.classes.names, ids, strict=True):
            for token in row:
                if seen.setdefault(token, name) != name:
                    word = self.codec.tokenizer.convert_ids_to_tokens([token])[0]
                    raise ValueError(
                        f"classes {seen[token]!r} and {name!r} share the label word {word!r}; set distinct words with "
                        f"data.labels"
                    )

    def forward(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Computes scores [B, C] in float32."""
        logits = lm(batch, words=self.ids.flatten())[:, 0]  # [B, C * words]
        words = logits.float().unflatten(1, self.ids.shape)  # [B, C, words]
        if self.aggregate == "mean":
            counts = (~self.pad).sum(-1)
            return words.masked_fill(self.pad, 0).sum(-1) / counts
        words = words.masked_fill(self.pad, float("-inf"))
        return words.logsumexp(-1) if self.aggregate == "sum" else words.amax(-1)
