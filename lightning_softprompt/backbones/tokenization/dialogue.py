"""Encodes dialogues. Whole turns are removed from a dialogue that is too long, the oldest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lightning_softprompt.backbones.tokenization.codec import Codec, RowLengthError, TruncationSide
from lightning_softprompt.core.chat_format import SYSTEM, ChatFormat, Turn
from lightning_softprompt.core.chat_rows import INPUT, INSTRUCTION
from lightning_softprompt.core.types import Encoded


@dataclass(frozen=True)
class DialogueEncoder:
    """Converts dialogues to tokens.

    A dialogue that is too long loses its oldest exchanges, each a user turn with its answer. If the last user turn
    alone is too long, its input is truncated, and then its instruction, without the input.

    Args:
        codec: The codec of the backbone.
        chat: The format of the dialogues.
        max_tokens: Maximum tokens of a row, without soft tokens.
        truncation_side: Which part of an input or instruction to remove.
        max_target_tokens: Tokens reserved for the last answer; a longer one is truncated and does not end with EOS.
        learns_all: Whether all answers of a dialogue are predicted, not only the last one.
    """

    codec: Codec
    chat: ChatFormat
    max_tokens: int
    truncation_side: TruncationSide = "end"
    max_target_tokens: int | None = None
    learns_all: bool = False

    def encode(self, turns: Sequence[Turn], target: str) -> Encoded:
        """Encodes a dialogue.

        Args:
            turns: The turns before the answer. The last one is a user turn.
            target: The answer; empty if it is unknown.

        Raises:
            ValueError: If the last user turn is too long, and has no input or instruction that can be truncated.
        """
        surplus = 0
        for number, (shorter, columns) in enumerate(_list_shortened(turns)):
            try:
                row = self._encode(shorter, target, self.max_tokens, columns)
            except RowLengthError as error:
                surplus = error.surplus
            else:
                num_truncated = self._count_removed(turns, row, target) if number else 0
                return row._replace(num_truncated=num_truncated)
        raise ValueError(
            f"the last turn of a dialogue exceeds max_tokens by {surplus} tokens; increase max_tokens, or set "
            "on_bad_row to skip"
        )

    def _count_removed(self, turns: Sequence[Turn], row: Encoded, target: str) -> int:
        return len(self._encode(turns, target, max_tokens=None).ids) - len(row.ids)

    def _encode(
        self, turns: Sequence[Turn], target: str, max_tokens: int | None, truncate: Sequence[str] = ()
    ) -> Encoded:
        pieces = self.chat.pieces(turns, truncate, has_loss=self.learns_all and bool(target))
        return self.codec.encode(pieces, target, max_tokens, True, self.truncation_side, self.max_target_tokens)


def _list_shortened(turns: Sequence[Turn]) -> Iterator[tuple[Sequence[Turn], Sequence[str]]]:
    """Yields shorter and shorter dialogues, each with the columns of its last turn that may be truncated."""
    first = 1 if turns[0].role == SYSTEM else 0
    for start in range(first, len(turns), 2):
        yield [*turns[:first], *turns[start:]], ()
    last_exchange = [*turns[:first], turns[-1]]
    yield last_exchange, (INPUT,)
    parts = tuple(part for part in turns[-1].parts if part.column != INPUT)
    yield [*turns[:first], turns[-1]._replace(parts=parts)], (INSTRUCTION,)
