"""`ChatFormat`: how the turns of a dialogue become the text of a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lightning_softprompt.core.types import Answer, Example, PastAnswer, Piece, Slot, Spans, Text

SoftPosition = Literal["start", "system", "user"]
BEFORE, AFTER = "before", "after"  # the text before and after the soft tokens, without the answer
TEMPLATE = f"{{{BEFORE}}}{{soft}}{{{AFTER}}}{{target}}"  # of all rows
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


class Part(NamedTuple):
    """A part of a turn.

    Args:
        text: Its text, in which spellings of control tokens remain text.
        column: The column that it comes from, for truncation; empty for other text.
    """

    text: str
    column: str = ""


class Turn(NamedTuple):
    """A turn of a dialogue.

    Args:
        role: `system`, `user` or `assistant`.
        parts: Its text.
    """

    role: str
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, role: str, text: str) -> Turn:
        """Returns a turn of a single part."""
        return cls(role, (Part(text),))

    @property
    def text(self) -> str:
        """The text of all parts."""
        return "".join(part.text for part in self.parts)


@dataclass(frozen=True)
class ChatExample(Example):
    """A row of a dialogue. `target` is the last answer.

    Args:
        turns: The turns before it. The last one is a user turn.
    """

    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class ChatFormat:
    r"""How the turns of a dialogue become text.

    The default is a plain format for backbones that were not trained on dialogues. An answer ends with its control
    tokens, which have a loss, and the text of `assistant_closing` follows only if there is another turn.

    Args:
        begin: Text at the start of a row, such as a BOS token.
        system_opening: Text before the content of a system turn.
        system_closing: Text after it.
        user_opening: Text before the content of a user turn.
        user_closing: Text after it.
        assistant_opening: Text before an answer.
        assistant_stop: Control tokens that end an answer; empty for the tokenizer's EOS.
        assistant_closing: Text between the end of an answer and the next turn.
        system: Content of the system turn of dialogues that have none; None omits it.
        soft: Position of the soft tokens: before the first turn (`start`), at the start of the content of the system
            turn (`system`), or at the start of the content of the last user turn (`user`).

    >>> turns = [Turn.of("user", "Hi"), Turn.of("assistant", "Hello."), Turn.of("user", "Bye")]
    >>> ChatFormat().render(turns)
    'User: Hi\nAssistant: Hello.\nUser: Bye\nAssistant: '
    """

    begin: str = ""
    system_opening: str = ""
    system_closing: str = "\n\n"
    user_opening: str = "User: "
    user_closing: str = "\n"
    assistant_opening: str = "Assistant: "
    assistant_stop: str = ""
    assistant_closing: str = "\n"
    system: str | None = None
    soft: SoftPosition = "start"

    def __post_init__(self) -> None:
        if self.soft == "system" and self.system is None:
            raise ValueError(
                "soft=system requires a system turn in each row; set system to a text, which may be empty, or soft to "
                "start or user"
            )

    @property
    def glue(self) -> str:
        """The spaces before an answer, which belong to it."""
        return self.assistant_opening[len(self.assistant_opening.rstrip(" ")) :]

    def render(self, turns: Sequence[Turn]) -> str:
        """Returns the text of a row, which ends with the opening of an answer after a user turn."""
        last_answer = turns[-1].text + self.assistant_stop + self.assistant_closing
        if turns[-1].role == ASSISTANT:
            return self.render(turns[:-1]) + last_answer
        before, after, _ = self.columns(turns)
        return before + after + self.glue

    def columns(self, turns: Sequence[Turn]) -> tuple[str, str, dict[str, Spans]]:
        """Returns the text before and after the soft tokens, and the spans in both that come from the format."""
        texts = ["", ""]
        spans: list[list[tuple[int, int]]] = [[], []]
        side = 0
        for piece in self.pieces(turns):
            if isinstance(piece, Slot):
                side = 1
            elif isinstance(piece, PastAnswer):
                start = len(texts[side]) + len(piece.text)
                texts[side] += piece.text + piece.closing
                spans[side].append((start, start + len(piece.closing)))
            elif isinstance(piece, Text):
                start = len(texts[side])
                spans[side] += [(start + first, start + last) for first, last in piece.template_spans]
                texts[side] += piece.text
        return texts[0], texts[1], {BEFORE: tuple(spans[0]), AFTER: tuple(spans[1])}

    def pieces(self, turns: Sequence[Turn], truncate: Sequence[str] = (), has_loss: bool = False) -> tuple[Piece, ...]:
        """Returns the pieces of a row up to the answer that follows its turns.

        Args:
            turns: The turns. The last one is a user turn.
            truncate: Columns of the last turn that are truncated when the row is too long.
            has_loss: Whether the answers among the turns are predicted.

        Raises:
            ValueError: If a predicted answer cannot attend to the soft tokens.
        """
        has_past_answer = any(turn.role == ASSISTANT for turn in turns)
        if has_loss and has_past_answer and self.soft == "user":
            raise ValueError(
                "answers before {soft} cannot attend to it; set loss_turns to last, or soft to start or system"
            )
        pieces: list[Piece] = [_markup(self.begin)]
        if self.soft == "start":
            pieces.append(Slot())
        if turns[0].role != SYSTEM and self.system is not None:
            pieces += [_markup(self.system_opening), *self._slot("system"), _markup(self.system + self.system_closing)]
        for number, turn in enumerate(turns, start=1):
            is_last = number == len(turns)
            columns = truncate if is_last else ()
            parts = [Text(part.text, truncatable=part.column in columns) for part in turn.parts]
            if turn.role == SYSTEM:
                pieces += [_markup(self.system_opening), *self._slot("system"), *parts, _markup(self.system_closing)]
            elif turn.role == ASSISTANT:
                pieces.append(PastAnswer(self.glue + turn.text, self.assistant_stop, has_loss))
                pieces.append(_markup(self.assistant_closing))
            else:
                slot = self._slot("user") if is_last else []
                opening = self.assistant_opening.removesuffix(self.glue)
                pieces += [_markup(self.user_opening), *slot, *parts, _markup(self.user_closing + opening)]
        visible = [piece for piece in pieces if not isinstance(piece, Text) or piece.text]
        return (*visible, Answer(self.glue, self.assistant_stop))

    def _slot(self, position: SoftPosition) -> list[Slot]:
        return [Slot()] if self.soft == position else []


def _markup(text: str) -> Text:
    """Returns text of the format, in which control tokens are recognized."""
    return Text(text, template_spans=((0, len(text)),))
