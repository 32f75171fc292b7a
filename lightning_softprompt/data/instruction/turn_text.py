"""The text of the last user turn of a dialogue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from string import Formatter
from typing import cast, final

from lightning_softprompt.core.chat_format import ChatExample, Part, Turn
from lightning_softprompt.core.chat_rows import INPUT, INSTRUCTION, ChatRows
from lightning_softprompt.core.types import Encoded, Example
from lightning_softprompt.data.augmentation.base import Draft
from lightning_softprompt.data.instruction.row_encoder import ChatRowEncoder


@final
@dataclass(frozen=True)
class TurnText:
    """Reads and writes instruction and input of the last user turn. A turn of `messages` is an instruction.

    Args:
        encoder: Encodes dialogues.
        chat: How turns become dialogues.
    """

    encoder: ChatRowEncoder
    chat: ChatRows

    @property
    def column_names(self) -> tuple[str, ...]:
        """The parts of a user turn."""
        return INSTRUCTION, INPUT

    @property
    def has_free_targets(self) -> bool:
        """Whether a target may be any text."""
        return True

    def check_template(self, template: str) -> None:
        """Refuses a template without the instruction, or with other columns.

        Raises:
            ValueError: If so.
        """
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
        if INSTRUCTION not in names or set(names) - {INSTRUCTION, INPUT}:
            raise ValueError(f"template {template!r} must have {{instruction}}, and may have {{input}}; got {names}")

    def read(self, example: Example) -> Draft:
        """Returns the parts of the last user turn."""
        turn = cast(ChatExample, example).turns[-1]
        parts = {part.column: part.text for part in turn.parts if part.column in (INSTRUCTION, INPUT)}
        if INSTRUCTION not in parts:
            parts = {INSTRUCTION: turn.text}
        return Draft({INSTRUCTION: parts[INSTRUCTION], INPUT: parts.get(INPUT, "")}, example.target)

    def write(self, example: Example, draft: Draft) -> tuple[Encoded, Example]:
        """Returns the dialogue with another last user turn.

        Raises:
            ValueError: If it does not fit into max_tokens.
        """
        if draft == self.read(example):
            return self.encoder.encode(example), example
        before = cast(ChatExample, example).turns[:-1]
        turn = self.chat.user_turn(draft.columns[INSTRUCTION], draft.columns[INPUT])
        if draft.template is not None:
            turn = replace_parts(turn, draft.template, draft.columns)
        changed = self.chat.build_example([*before, turn], draft.target)
        row = replace(changed, label=example.label)
        return self.encoder.encode(row), row


def replace_parts(turn: Turn, template: str, columns: Mapping[str, str]) -> Turn:
    """Returns a turn whose parts are those of a template. White space around it, as of an empty input, is removed."""
    parts: list[Part] = []
    for literal, name, _, _ in Formatter().parse(template):
        if literal:
            parts.append(Part(literal))
        if name is not None and columns[name]:
            parts.append(Part(columns[name], name))
    while not parts[-1].text.strip():
        parts.pop()
    while not parts[0].text.strip():
        parts.pop(0)
    return turn._replace(parts=tuple(parts))
