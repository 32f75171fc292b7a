"""Soft tokens as tokens of a vocabulary: their names, and the rows of text in which they occur."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_softprompt.backbones.causal import CausalBackbone
from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.checkpoints.folding import fold_task
from lightning_softprompt.core.types import Encoded, Slot, SoftPrompt, Text
from lightning_softprompt.inference.prompt import Prompt

OTHER_TEXT = "a short text"  # of further columns of rows that are compared
UNLIMITED = 1 << 30  # tokens
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class SoftRows:
    """The soft tokens of one prompt as tokens of a vocabulary.

    Args:
        name: Name of the prompt.
        prompt: The prompt as trained.
        soft: Its soft tokens, the same for every row.
        row_format: How its rows are written.
        blocks: The tokens at each slot of the template.
    """

    name: str
    prompt: Prompt
    soft: SoftPrompt
    row_format: RowFormat
    blocks: tuple[tuple[str, ...], ...]

    @property
    def tokens(self) -> list[str]:
        """The names of all tokens, in the order of the rows of `embeddings`."""
        return [token for block in self.blocks for token in block]

    @property
    def embeddings(self) -> Tensor:
        """[P, H] what the embedding module must return for each token."""
        assert self.soft.tokens is not None
        return self.soft.tokens[0].detach().float().cpu()

    @property
    def message_column(self) -> str:
        """The column that a chat message fills: the first one that may be truncated, or else the last one."""
        template = self.row_format.parsed
        columns = [name for name in template.columns if name in template.truncate] or list(template.columns[-1:])
        return columns[0]

    def parts(self, codec: Codec) -> list[tuple[str, bool]]:
        """Returns the text of a row until its answer, as literals and names of columns.

        Args:
            codec: The codec of the backbone.

        Returns:
            Texts, each with whether it is the name of a column. The start token and the soft tokens are literals.
        """
        template = self.row_format.parsed
        pieces = template.pieces(dict.fromkeys(template.columns, ""))
        blocks = iter(self.blocks)
        parts: list[tuple[str, bool]] = []
        for piece, column in zip(pieces, template.piece_columns, strict=True):
            if column is not None:
                parts.append((column, True))
            elif isinstance(piece, Slot):
                parts.append(("".join(next(blocks, ())), False))
            elif isinstance(piece, Text):
                parts.append((piece.text, False))
            else:
                break
        first_text = "".join(text for text, is_column in parts if not is_column)
        start = "".join(codec.tokenizer.convert_ids_to_tokens(list(codec.start)))
        opening = "" if first_text.startswith(start) else start
        return [(opening, False), *parts]

    def text(self, codec: Codec, fields: Mapping[str, str]) -> str:
        """Returns a row until its answer as one text with the names of soft tokens."""
        texts = []
        for text, is_column in self.parts(codec):
            texts.append(fields[text] if is_column else text)
        return "".join(texts)

    def encode(self, codec: Codec, fields: Mapping[str, str], answer: str = "") -> Encoded:
        """Returns a row as the package writes it, without truncation."""
        return replace(self.row_format, max_tokens=UNLIMITED).encode(codec, fields, answer)

    def fields(self, text: str) -> dict[str, str]:
        """Returns the columns of a row with a text in its main column."""
        return {**dict.fromkeys(self.row_format.parsed.columns, OTHER_TEXT), self.message_column: text}

    def splice(self, row: Encoded, token_ids: Sequence[int]) -> list[int]:
        """Returns the tokens of a row with those of its soft tokens at their slots.

        Args:
            row: The row.
            token_ids: Ids of the soft tokens, in the order of `tokens`.
        """
        spliced: list[int] = []
        first = start = 0
        for slot, block in zip(row.slots, self.blocks, strict=False):
            spliced += [*row.ids[start:slot], *token_ids[first : first + len(block)]]
            first, start = first + len(block), slot
        return [*spliced, *row.ids[start:]]


def soft_rows(name: str, prompt: Prompt, task: str | None = None) -> SoftRows:
    """Returns a prompt as rows of a vocabulary.

    Args:
        name: Name of the prompt, a part of the names of its tokens.
        prompt: The prompt.
        task: The task of a prompt that was trained on several.

    Raises:
        ValueError: If the prompt is more than soft tokens, depends on the row, or its rows are not a template.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"a name of a prompt consists of letters, digits, '.', '_' and '-', got {name!r}")
    check_decoder_without_head(prompt, "rows of the vocabulary", "a vocabulary")
    row_format = prompt.row_format(task)
    _refuse_other_rows(row_format)
    soft = fold_task(prompt.method, task)
    if soft.kv or soft.hidden or soft.tokens is None:
        raise ValueError("only soft tokens at the input become rows of the vocabulary, not keys, values or layers")
    lengths: Sequence[int] = soft.blocks or (soft.tokens.shape[1],)
    num_slots = sum(isinstance(piece, Slot) for piece in _pieces_before_answer(row_format))
    if num_slots < len(lengths):
        raise ValueError(f"the prompt has {len(lengths)} blocks, but the template has {num_slots} before {{target}}")
    blocks, first = [], 0
    for length in lengths:
        blocks.append(tuple(f"<|{name}:{index}|>" for index in range(first, first + length)))
        first += length
    return SoftRows(name, prompt, soft, row_format, tuple(blocks))


def _refuse_other_rows(row_format: RowFormat) -> None:
    """Refuses rows that are not one template of text with columns."""
    for what, value in (("dialogues", row_format.chat), ("words", row_format.words), ("options", row_format.options)):
        if value is not None:
            raise ValueError(f"rows with {what} cannot be written as one template of text")
    if not row_format.parsed.columns:
        raise ValueError("the template has no column, so there is no text to answer")


def _pieces_before_answer(row_format: RowFormat) -> list[Any]:
    template = row_format.parsed
    pieces = template.pieces(dict.fromkeys(template.columns, ""))
    types = [type(piece).__name__ for piece in pieces]
    return list(pieces[: types.index("Answer")])


def check_decoder_without_head(prompt: Prompt, content: str, holder: str) -> None:
    """Refuses prompts of other families, and prompts with a trained head.

    Args:
        prompt: The prompt.
        content: What is written, for the message.
        holder: What would have to contain the head, for the message.

    Raises:
        ValueError: If the backbone is not a decoder, or the readout has parameters.
    """
    if type(prompt.backbone) is not CausalBackbone:
        raise ValueError(f"{content} are written for decoders only")
    if any(parameter.startswith("readout.") for parameter in prompt.method.state_dict()):
        raise ValueError(f"the prompt has a trained classification head, which {holder} cannot hold")
