"""In-context learning: demonstrations in front of each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.demonstrations import Context


class InContext(SoftPromptModule):
    """Demonstrations in front of each row, without training (in-context learning), as a baseline.

    The demonstrations are `data.demonstrations` training rows of each class, or a text. They are computed once per
    batch, and `softprompt fold` makes a prompt of them.

    Paper: Brown et al. 2020, arXiv 2005.14165
    Enters: word embeddings at the template's first slot
    Parameters: 0

    Args:
        text: Demonstrations as text, up to and including the separator before the row (default: rows of the data).
            Like a template, it can contain control tokens.
        common: Arguments of every method.
    """

    trains = False
    words: Tensor

    def __init__(self, text: str | None = None, **common: Any) -> None:
        super().__init__(**common)
        self.text = text

    def build(self, backbone: Backbone) -> None:
        """Looks up the embeddings of the demonstrations [P, H]."""
        if self.text is not None:
            ids = torch.tensor(backbone.codec.template_ids(self.text))
        elif self.classes is not None and self.classes.demonstrations:
            template = Template(self.classes.template)
            ids = Context.from_rows(backbone.codec, template, self.classes.demonstrations).ids
        else:
            raise ValueError(
                "InContext requires demonstrations; set data.demonstrations to their number per class, or model.text"
            )
        embeddings = backbone.embed(ids.to(backbone.word_embeddings.device))
        self.register_buffer("words", embeddings.detach(), persistent=False)

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the same demonstrations for every row."""
        return SoftPrompt(tokens=self.words[None])
