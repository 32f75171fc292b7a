"""Class scores calibrated by a content-free input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Batch, Classes
from lightning_softprompt.readouts.base import Readout, WordReadout
from lightning_softprompt.readouts.label_words import LabelWords


@final
class Calibrated(Readout):
    """Contextual calibration: probabilities over those of a content-free input (Zhao et al. 2021, arXiv 2102.09690).

    With q = softmax(W p) and W = diag(p_free)^-1, the logarithm of the input of the softmax in equation 1.

    Args:
        codec: Codec of the backbone.
        classes: The classes, their label words, and the template that is filled without content.
        inner: The readout to calibrate.
        fillers: Texts that replace every column; their class probabilities are averaged.
    """

    def __init__(
        self,
        codec: Codec,
        classes: Classes,
        inner: Callable[[Codec, Classes], WordReadout] = LabelWords,
        fillers: Sequence[str] = ("N/A", "", "[MASK]"),
    ) -> None:
        super().__init__(codec, classes)
        self.inner = inner(codec, classes)
        template = Template(classes.template)
        word = next(iter(classes.words.values()))[0]
        target = word.removeprefix(template.glue)
        rows = []
        for filler in fillers:
            values = dict.fromkeys(template.columns, filler)
            spans = dict.fromkeys(template.columns, ((0, len(filler)),))  # a filler may be a special token, as [MASK]
            rows.append(codec.encode(template.pieces(values, template_spans=spans), target))
        self.blank = codec.collate(rows)

    def forward(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Computes scores [B, C] in float32."""
        blank = self.blank.to(batch.input_ids.device)
        content_free = self._log_probability(lm, blank)  # [fillers, C]
        mean = content_free.logsumexp(0) - torch.tensor(len(content_free)).log()
        return self._log_probability(lm, batch) - mean

    def _log_probability(self, lm: PromptedLM, batch: Batch) -> Tensor:
        return torch.as_tensor(self.inner(lm, batch)).log_softmax(-1)
