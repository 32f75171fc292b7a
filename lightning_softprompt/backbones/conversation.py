"""Several turns on one kept cache."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from lightning_softprompt.backbones.causal import CausalBackbone
from lightning_softprompt.backbones.generation import drafted, generated, sequences
from lightning_softprompt.backbones.rows import Rows
from lightning_softprompt.types import Batch, SoftPrompt, Text


@final
class Conversation:
    """A row that goes on: what was heard and said stays in a cache, the soft prompt with it, and is not run again.

    Args:
        backbone: A decoder-only one.
        batch: One row, as its template opens the conversation.
        prompt: Its soft prompt.

    Raises:
        ValueError: If there is more than one row.
    """

    def __init__(self, backbone: CausalBackbone, batch: Batch, prompt: SoftPrompt | None = None) -> None:
        if len(batch) != 1:
            raise ValueError(f"a conversation has one row, got {len(batch)}")
        self.backbone = backbone
        asked, prompt = backbone.asked(batch), backbone.with_late_keys(prompt)
        self._rows = Rows.of(backbone.splice(asked, prompt), asked, prompt)
        self._cache = DynamicCache(config=backbone.model.config)
        self._text = torch.zeros(0, dtype=torch.long, device=asked.input_ids.device)  # behind the first turn

    def add(self, text: str, before: str = "", after: str = "") -> None:
        """Further text, tokenized by itself, which the next answer follows.

        Args:
            text: The text. Control tokens that it spells stay text.
            before: What a template writes before it, such as `<|im_start|>user`, with the tokens that it spells.
            after: The same behind it.

        Raises:
            ValueError: If nothing was said yet: the first turn is the batch's.
        """
        if not len(self._text):
            raise ValueError("the first turn is the batch; let it be answered before more is added")
        turn = [Text(before, template_spans=((0, len(before)),)), Text(text)]
        ids, _ = self.backbone.codec.tokenize([*turn, Text(after, template_spans=((0, len(after)),))])
        self._text = torch.cat([self._text, torch.tensor(ids, device=self._text.device)])

    @torch.no_grad()
    def answer(self, **decoding: Any) -> Tensor:
        """The next answer [1, U], greedy unless the options say otherwise.

        Raises:
            ValueError: If the conversation outgrows the backbone's window, or the options want a cache of their own.
        """
        if sequences(decoding) > 1 or drafted(decoding):
            raise ValueError("a conversation goes on from one answer, word by word; beams and drafts are not for it")
        backbone, pad_id = self.backbone, self.backbone.codec.pad_id
        opening, first = self._rows.mask.shape[1], int(self._rows.first_position)
        positions = first + torch.arange(opening + len(self._text), device=self._text.device)[None]
        backbone.check_window(first + positions.shape[1] + decoding.get("max_new_tokens", 0))
        given: dict[str, Any] = {"attention_mask": torch.ones_like(positions), "position_ids": positions}
        given["past_key_values"] = self._cache
        if len(self._text):
            given["input_ids"] = pad(self._text, (opening, 0), value=pad_id)[None]  # what is cached is not looked at
        skip = positions.shape[1] if len(self._text) else 0
        with backbone.injected(self._rows.injection):
            said = generated(backbone, self._rows.embeds, given, skip, decoding)
        self._text = torch.cat([self._text, said[0]])
        return said
