"""`ChatRows`: how the columns of a row become the turns of a dialogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_softprompt.core.chat_format import (
    AFTER,
    ASSISTANT,
    BEFORE,
    SYSTEM,
    USER,
    ChatExample,
    ChatFormat,
    Part,
    Turn,
)

INSTRUCTION, INPUT = "instruction", "input"  # the parts of a user turn that may be truncated
OTHER_NAMES = {"input": "context", "output": "response"}  # as in Dolly


@dataclass(frozen=True)
class ChatRows:
    """Converts rows to dialogues.

    A row has the column of messages, or else the columns of an instruction, an optional input and an output.

    Args:
        chat: The format of the dialogues.
        instruction: Column of the instruction.
        input: Column of the text that the instruction is about. Rows may omit it, or leave it empty.
        output: Column of the answer, or of a list of equally good answers, of which the first one is trained.
        messages: Column with a list of messages `{role, content}`.
        references: Column with a list of further answers that metrics accept; rows may omit it.
        separator: Text between the instruction and the input.
        default_instruction: Instruction of rows without that column; empty if each row must have one.
    """

    chat: ChatFormat = field(default_factory=ChatFormat)
    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    messages: str = "messages"
    references: str = "references"
    separator: str = "\n\n"
    default_instruction: str = ""

    def example(self, row: str | Mapping[str, Any], labelled: bool) -> ChatExample:
        """Returns a row as a dialogue.

        Args:
            row: The row; a text is an instruction.
            labelled: Whether the row has an answer.

        Raises:
            ValueError: If a column is missing, is not text or is empty, or if the roles of messages are out of order.
        """
        if isinstance(row, str):
            row = {self.instruction: row}
        if self.messages in row and row[self.messages] is not None:
            turns, target = self._read_messages(row[self.messages], labelled)
            return self.build_example(turns, target)
        turns = [self._read_instruction(row)]
        if not labelled:
            return self.build_example(turns, "")
        answers = self._read_answers(row, self._present_name(row, "output", self.output))
        if row.get(self.references) is not None:
            answers += self._read_answers(row, self.references)
        return self.build_example(turns, answers[0], answers[1:])

    def build_example(self, turns: Sequence[Turn], target: str, references: Sequence[str] = ()) -> ChatExample:
        """Returns a dialogue.

        Args:
            turns: The turns before the answer.
            target: The answer; empty if it is unknown.
            references: Further answers that metrics accept.
        """
        before, after, spans = self.chat.columns(turns)
        return ChatExample(
            {BEFORE: before, AFTER: after},
            target,
            references=tuple(dict.fromkeys((target, *references))) if target else (),
            template_spans=spans,
            turns=tuple(turns),
        )

    def user_turn(self, instruction: str, input: str = "") -> Turn:
        """Returns a user turn with an instruction and the text that it is about."""
        parts = [Part(instruction, INSTRUCTION)]
        if input:
            parts += [Part(self.separator), Part(input, INPUT)]
        return Turn(USER, tuple(parts))

    def _read_instruction(self, row: Mapping[str, Any]) -> Turn:
        if self.default_instruction:
            row = {self.instruction: self.default_instruction, **row}
        if self.instruction not in row:
            columns = ", ".join(map(str, row))
            raise ValueError(
                f"no column {self.instruction!r} or {self.messages!r}; the row has {columns}: set data.instruction or "
                "data.messages"
            )
        instruction = self._read_text(row, self.instruction, is_required=True)
        input = self._read_text(row, self._present_name(row, "input", self.input), is_required=False)
        return self.user_turn(instruction, input)

    def _read_answers(self, row: Mapping[str, Any], column: str) -> list[str]:
        """Returns the answers in a column, without empty ones; they are a text or a list of texts."""
        value = row.get(column)
        if not isinstance(value, list | tuple):
            return [self._read_text(row, column, is_required=True)]
        if not all(isinstance(text, str) for text in value) or not any(text.strip() for text in value):
            raise ValueError(f"column {column!r} must be a text or a list of texts, got {value!r}")
        return [text.strip() for text in value if text.strip()]

    @staticmethod
    def _present_name(row: Mapping[str, Any], default: str, name: str) -> str:
        """Returns the name of a column, or its other usual name if it has the default name and is missing."""
        other = OTHER_NAMES[default]
        return other if name == default and name not in row and other in row else name

    @staticmethod
    def _read_text(row: Mapping[str, Any], column: str, is_required: bool) -> str:
        text = row.get(column)
        if text is None and not is_required:
            return ""
        if column not in row:
            raise ValueError(f"no column {column!r}; the row has {', '.join(map(str, row))}: set data.output")
        if not isinstance(text, str) or (is_required and not text.strip()):
            raise ValueError(f"column {column!r} must be non-empty text, got {text!r}")
        return text.strip()

    def _read_messages(self, messages: Any, labelled: bool) -> tuple[list[Turn], str]:
        """Returns the turns before the last answer, and the answer."""
        if not isinstance(messages, list | tuple) or not messages:
            raise ValueError(f"column {self.messages!r} must be a list of messages, got {messages!r}")
        turns = [self._read_message(message) for message in messages]
        expected = [USER, ASSISTANT] * len(turns)
        roles = [turn.role for turn in turns]
        start = 1 if roles[0] == SYSTEM else 0
        if roles[start:] != expected[: len(roles) - start] or len(roles) == start:
            raise ValueError(
                f"messages must alternate between user and assistant, after at most one system message, got {roles}"
            )
        if start and not self.chat.system_opening:
            raise ValueError("the chat format has no system turn; remove the system message, or set data.chat_format")
        has_answer = roles[-1] == ASSISTANT
        if labelled and not has_answer:
            raise ValueError("the last message must be of the assistant, whose answers are trained")
        if not has_answer:
            return turns, ""
        return turns[:-1], turns[-1].text if labelled else ""

    def _read_message(self, message: Any) -> Turn:
        role, content = (message.get(name) for name in ("role", "content")) if isinstance(message, Mapping) else (0, 0)
        if role not in (SYSTEM, USER, ASSISTANT) or not isinstance(content, str):
            raise ValueError(f"a message requires a role (system, user or assistant) and content, got {message!r}")
        if not content.strip() and role != SYSTEM:
            raise ValueError(f"a message of the {role} is empty")
        return Turn.of(role, content.strip())
