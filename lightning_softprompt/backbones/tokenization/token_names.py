"""Names the part of a row that each of its tokens belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.types import Answer, Encoded, Piece, Slot, Text

START, TEMPLATE, ANSWER = "start", "template", "answer"  # special tokens at the start, other text, and the answer


class NamedPiece(NamedTuple):
    """A piece of a row, and the part of the row that its tokens belong to."""

    piece: Piece
    name: str = TEMPLATE


def name_tokens(codec: Codec, pieces: Sequence[NamedPiece], row: Encoded) -> list[str]:
    """Returns the part that each token of `row.ids` belongs to.

    A token that spans several pieces belongs to the piece of its first character that is not white space. Special
    tokens at the start of a row are `START`, those at its end `TEMPLATE`, and the tokens of the answer `ANSWER`.

    Args:
        codec: The codec that has encoded the row.
        pieces: The pieces of the row.
        row: The row, without truncation.

    Raises:
        ValueError: If the row was truncated.
    """
    if row.num_truncated:
        raise ValueError(f"the parts of a truncated row are not known; {row.num_truncated} of its tokens were removed")
    index = next(i for i, named in enumerate(pieces) if isinstance(named.piece, Answer))
    before, after = pieces[:index], pieces[index + 1 :]
    num_read = len(codec.pieces_after_answer([named.piece for named in after]))
    names = _name_text(codec, before) + _name_text(codec, after[:num_read])
    names += [TEMPLATE] * len(codec.end)
    num_start = len(row.ids) - len(row.answers) - len(names)
    remaining = iter([START] * num_start + names)
    answers = set(row.answers)
    return [ANSWER if position in answers else next(remaining) for position in range(len(row.ids))]


def _name_text(codec: Codec, pieces: Sequence[NamedPiece]) -> list[str]:
    """Returns the part of each token of consecutive pieces. Text between slots is tokenized as one."""
    names: list[str] = []
    texts: list[Text] = []
    names_of_characters: list[str] = []
    for piece, name in [*pieces, NamedPiece(Slot())]:
        if isinstance(piece, Text):
            texts.append(piece)
            names_of_characters += [name] * len(piece.text)
            continue
        text = "".join(text.text for text in texts)
        _, spans = codec.tokenize(texts)
        for first, last in spans:
            num_spaces = len(text[first:last]) - len(text[first:last].lstrip())
            first_visible = min(first + num_spaces, last - 1)
            names.append(names_of_characters[first_visible])
        texts, names_of_characters = [], []
    return names
