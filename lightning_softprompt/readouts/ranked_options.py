"""Scores of options that differ from row to row."""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Batch, Classes, options_of
from lightning_softprompt.readouts.base import Readout


@final
class RankedOptions(Readout):
    """Log-probability of the text of each option of a row, of any number of tokens and options.

    The scores [B, C] of rows with fewer than C options end with minus infinity, which gives them no probability. Costs
    as many rows as there are options.

    Args:
        codec: Codec of the backbone.
        classes: Classes without names, whose template has the spaces before an option.
        normalize: Divide the log-probability by the number of `tokens` or `characters` of the option, to compare
            options of different lengths (Brown et al. 2020, arXiv 2005.14165, section 2.4).
    """

    def __init__(
        self, codec: Codec, classes: Classes, normalize: Literal["none", "tokens", "characters"] = "none"
    ) -> None:
        super().__init__(codec, classes)
        self.normalize = normalize
        self.glue = Template(classes.template).glue

    def forward(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Computes scores [B, C] in float32, where C is the largest number of options of a row."""
        options = options_of(batch)
        ids = [[self.codec.ids(self.glue + text) for text in of_row] for of_row in options]
        rows = self.codec.with_answers(batch, ids)
        sizes = {
            "none": [[1] * len(of_row) for of_row in options],
            "tokens": [[len(tokens) for tokens in of_row] for of_row in ids],
            "characters": [[len(text) for text in of_row] for of_row in options],
        }
        log_probabilities = -lm.cross_entropy(rows).sum(1)  # one for each option of each row
        flat_sizes = [size for of_row in sizes[self.normalize] for size in of_row]
        normalized = log_probabilities / torch.tensor(flat_sizes, device=log_probabilities.device)
        counts = torch.tensor([len(of_row) for of_row in options], device=normalized.device)
        is_option = torch.arange(int(counts.max()), device=normalized.device) < counts[:, None]
        scores = normalized.new_full(is_option.shape, float("-inf"))
        return scores.masked_scatter(is_option, normalized)
