"""Conversations of several turns, with one cache."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from transformers import DynamicCache

from lightning_softprompt.backbones.causal import CausalBackbone
from lightning_softprompt.backbones.execution.row_batch import RowBatch
from lightning_softprompt.backbones.generation.generate import generate, num_sequences, uses_speculation
from lightning_softprompt.backbones.generation.paths import WithoutCache, reading_of
from lightning_softprompt.core.types import Batch, SoftPrompt, Text


@final
class Conversation:
    """A row to which turns are added. The soft prompt and all text of earlier turns are cached.

    A model that caches more than the keys and values of its tokens reads the complete conversation for each answer.

    Args:
        backbone: A decoder-only backbone.
        batch: One row with the first turn of the conversation.
        prompt: Its soft prompt.

    Raises:
        ValueError: If there is more than one row.
    """

    def __init__(self, backbone: CausalBackbone, batch: Batch, prompt: SoftPrompt | None = None) -> None:
        if len(batch) != 1:
            raise ValueError(f"a conversation has one row, got {len(batch)}")
        self.backbone = backbone
        questions, prompt = backbone.without_answers(batch), backbone.hidden_to_kv(prompt)
        self._rows = RowBatch.of(backbone.splice(questions, prompt), questions, prompt)
        self._cache: DynamicCache | None = None
        self._has_cache: bool | None = None  # determined by the first answer
        self._text = torch.zeros(0, dtype=torch.long, device=questions.input_ids.device)  # after the first turn

    def add(self, text: str, before: str = "", after: str = "") -> None:
        """Adds a turn, which is tokenized separately. The next answer follows it.

        Args:
            text: The text. Control tokens in it are tokenized as text.
            before: Text of a template before it, such as `<|im_start|>user`, with control tokens.
            after: Text of a template after it, with control tokens.

        Raises:
            ValueError: If no answer was generated yet, since the batch is the first turn.
        """
        if not len(self._text):
            raise ValueError("the batch is the first turn; generate its answer before adding another turn")
        turn = [Text(before, template_spans=((0, len(before)),)), Text(text)]
        ids, _ = self.backbone.codec.tokenize([*turn, Text(after, template_spans=((0, len(after)),))])
        self._text = torch.cat([self._text, torch.tensor(ids, device=self._text.device)])

    @torch.no_grad()
    def answer(self, **decoding: Any) -> Tensor:
        """The next answer [1, U], greedy unless the options set something else.

        Raises:
            ValueError: If the conversation outgrows the backbone's window, or the options require another cache.
        """
        if num_sequences(decoding) > 1 or uses_speculation(decoding):
            raise ValueError("a conversation has one answer; it does not support beams or speculative decoding")
        text = self._text[None]
        rows = self._rows.append_text(text, self.backbone.embed(text))
        self.backbone.check_window(rows.longest + decoding.get("max_new_tokens", 0))
        run = self._continue_answer if self._keeps_cache(rows, decoding) else self.backbone.generator
        answer = run(rows, decoding)
        self._text = torch.cat([self._text, answer[0]])
        return answer

    def _keeps_cache(self, rows: RowBatch, decoding: dict[str, Any]) -> bool:
        if self._has_cache is None:
            is_cached = not isinstance(self.backbone.generator.path_for(rows, decoding), WithoutCache)
            self._has_cache = is_cached and self.backbone.prompts.is_supported
            self._cache = self.backbone.prompts.new_cache() if self._has_cache else None
        return self._has_cache

    def _continue_answer(self, rows: RowBatch, decoding: dict[str, Any]) -> Tensor:
        """Generates an answer. The model reads only the text that is not in its cache."""
        reading = reading_of(self.backbone, rows, past_key_values=self._cache)
        length = rows.mask.shape[1]
        with self.backbone.inject(rows.kv_prompt):
            return generate(self.backbone, reading, length, decoding)[:, length:]  # type: ignore[no-any-return]
