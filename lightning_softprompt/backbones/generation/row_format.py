"""`RowFormat`: how a trained prompt expects its rows, stored with the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.backbones.tokenization.codec import Codec, TruncationSide
from lightning_softprompt.backbones.tokenization.dialogue import DialogueEncoder
from lightning_softprompt.core.chat_rows import ChatRows
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Encoded, Spans


@dataclass(frozen=True)
class RowFormat:
    """How a row is written and answered.

    Args:
        template: The template of a row.
        truncate: Columns that are truncated when a row is too long; None for all.
        max_tokens: Maximum number of tokens of a row, without soft tokens.
        truncation_side: Which part of the columns is removed.
        max_target_tokens: Tokens reserved for the answer; None reserves none.
        decoding: How answers are generated; None for tasks with classes.
        defaults: Values of columns that a row may omit.
        words: The column that holds a list of words with a class each; None for other tasks.
        options: The column that holds the list of options, or the columns of the options; None for other tasks.
        chat: How rows become dialogues; None for rows that are not dialogues.
    """

    template: str
    truncate: tuple[str, ...] | None = None
    max_tokens: int = 512
    truncation_side: TruncationSide = "end"
    max_target_tokens: int | None = None
    decoding: Decoding | None = None
    defaults: Mapping[str, str] = field(default_factory=dict)
    words: str | None = None
    options: tuple[str, ...] | None = None
    chat: ChatRows | None = None

    @property
    def parsed(self) -> Template:
        """The template with its columns."""
        columns = Template(self.template).columns
        return Template(self.template, columns if self.truncate is None else self.truncate)

    @property
    def required_columns(self) -> tuple[str, ...]:
        """Columns that each row must have."""
        return tuple(name for name in self.parsed.columns if name not in self.defaults)

    def fields(self, row: str | Mapping[str, Any]) -> dict[str, Any]:
        """The columns of a row, which is a mapping, or a text where the template has a single column.

        Raises:
            ValueError: If a column is missing or does not hold text.
        """
        required = self.required_columns
        if isinstance(row, str) and len(required) == 1:
            row = {required[0]: row}
        if not isinstance(row, Mapping):
            kind = type(row).__name__
            raise ValueError(f"the template has the columns {list(required)}, so rows must be mappings, got {kind}")
        values = {**self.defaults, **row}
        for name in self.parsed.columns:
            if name not in values:
                raise ValueError(f"no column {name!r}; the row has {sorted(map(str, row))}")
            if name != self.words and not isinstance(values[name], str):
                raise ValueError(f"column {name!r} must be text, got {type(values[name]).__name__}")
        return {name: values[name] for name in self.parsed.columns}

    def dialogue_encoder(self, codec: Codec, chat: ChatRows) -> DialogueEncoder:
        """Encodes the dialogues of rows whose answers are unknown.

        Args:
            codec: The codec of the backbone.
            chat: How rows become dialogues.
        """
        return DialogueEncoder(codec, chat.chat, self.max_tokens, self.truncation_side, self.max_target_tokens)

    def encode(
        self, codec: Codec, fields: Mapping[str, str], target: str = "", words: Mapping[str, Spans] | None = None
    ) -> Encoded:
        """A row in tokens.

        Args:
            codec: The codec of the backbone.
            fields: The columns of the row.
            target: A text at the place of the answer.
            words: Where the words stand in the column that holds them.

        Raises:
            ValueError: If the row does not fit into `max_tokens`.
        """
        pieces = self.parsed.pieces(fields, words)
        return codec.encode(
            pieces,
            target,
            self.max_tokens,
            truncation_side=self.truncation_side,
            target_tokens=self.max_target_tokens,
        )
