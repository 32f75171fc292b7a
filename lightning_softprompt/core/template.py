"""`Template`: the positions of columns, soft blocks and the answer in the text of a row.

A template does not depend on tokens, nor on the length of a soft block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from string import Formatter

from lightning_softprompt.core.types import Answer, Piece, Slot, Spans, Text

COLUMN = re.compile(r"\w(?:[^{}\[\]:!\"'\\\n\r\t]*[^{}\[\]:!\"'\\\s])?")
SOFT, TARGET = "soft", "target"


class Template:
    r"""A text with placeholders, such as `"{soft}{review}\nSentiment: {target}"`.

    `{soft}` is a slot for soft tokens, `{target}` the position of the answer, and every other name a column of the row.
    Names of columns can contain spaces and hyphens, such as `{Review Text}`. The text is parsed once, so that `{soft}`
    in a document remains text. Without `{soft}`, the only slot is at the start. Literal braces are written `{{` and
    `}}`.

    Args:
        text: The template.
        truncate: Columns that are truncated when a row is too long, the last part of the text first.

    Raises:
        ValueError: If the text does not contain `{target}` exactly once, contains a name that is not valid for a
            column, or `truncate` names a column that the text does not contain.

    >>> template = Template("{soft}{review} It was {target}", truncate=["review"])
    >>> template.columns
    ('review',)
    >>> template.pieces({"review": "Fun!"})[:2]
    (Slot(), Text(text='Fun!', truncatable=True, words=()))
    >>> template.pieces({"review": "Fun!"})[2:]
    (Text(text=' It was', truncatable=False, words=()), Answer(glue=' ', closing=''))
    """

    def __init__(self, text: str, truncate: Iterable[str] = ()) -> None:
        self.text = text
        self.truncate = frozenset(truncate)
        self._parts = self._parse(text)
        self.columns = tuple(dict.fromkeys(name for kind, name in self._parts if kind == "column"))
        if missing := self.truncate - set(self.columns):
            raise ValueError(f"truncate names {sorted(missing)}, but the template has the columns {list(self.columns)}")

    @staticmethod
    def _parse(text: str) -> list[tuple[str, str]]:
        parts: list[tuple[str, str]] = []
        try:
            parsed = list(Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"template {text!r} cannot be read: {error}; write a literal brace twice") from None
        for literal, name, spec, conversion in parsed:
            if literal:
                parts.append(("literal", literal))
            if name is None:
                continue
            if spec or conversion or not COLUMN.fullmatch(name):
                raise ValueError(
                    f"template {text!r}: {{{name}}} must be the name of a column, {{soft}} or {{target}}; give columns "
                    "of other names a new one with rename_columns"
                )
            parts.append((name, "") if name in (SOFT, TARGET) else ("column", name))
        if (targets := sum(kind == TARGET for kind, _ in parts)) != 1:
            raise ValueError(f"template {text!r} must contain {{target}} once, got {targets} times")
        if all(kind != SOFT for kind, _ in parts):
            parts.insert(0, (SOFT, ""))
        return parts

    @property
    def glue(self) -> str:
        """The spaces before `{target}`, which belong to the target."""
        before = [name for kind, name in self._parts[: self._target] if kind == "literal"]
        literal = before[-1] if before and self._parts[self._target - 1][0] == "literal" else ""
        return literal[len(literal.rstrip(" ")) :]

    @property
    def _target(self) -> int:
        return next(i for i, (kind, _) in enumerate(self._parts) if kind == TARGET)

    def parts(self, fields: Mapping[str, str], target: str) -> list[tuple[str, str]]:
        """Returns the row and its answer as stretches of text, each with its kind: `literal`, `column` or `target`."""
        parts: list[tuple[str, str]] = []
        for piece, kind in zip(self.pieces(fields), self._kinds, strict=True):
            text = ""
            if isinstance(piece, Text):
                text = piece.text
            elif isinstance(piece, Answer):
                text = piece.glue + target
            if text:
                parts.append((kind, text))
        return parts

    @property
    def _kinds(self) -> list[str]:
        """The kind of each piece."""
        return [kind for kind, _ in self._piece_parts]

    @property
    def _piece_parts(self) -> list[tuple[str, str]]:
        """The part of the template that each piece comes from. A literal of glue only gives no piece."""
        parts = []
        for index, part in enumerate(self._parts):
            is_glue = index == self._target - 1 and part == ("literal", self.glue)
            if not is_glue:
                parts.append(part)
        return parts

    @property
    def piece_columns(self) -> list[str | None]:
        """The column that each piece of a row comes from; None for literals, slots and the answer."""
        return [name if kind == "column" else None for kind, name in self._piece_parts]

    def pieces(
        self,
        fields: Mapping[str, str],
        words: Mapping[str, Spans] | None = None,
        template_spans: Mapping[str, Spans] | None = None,
    ) -> tuple[Piece, ...]:
        """Returns the pieces of a row in order.

        Args:
            fields: The columns.
            words: Spans of the words in a column, if they have classes.
            template_spans: Spans in a column that come from another template, so that control tokens are recognized.

        Raises:
            KeyError: If a column of the template is not among the fields.
        """
        pieces: list[Piece] = []
        for index, (kind, name) in enumerate(self._parts):
            if kind == SOFT:
                pieces.append(Slot())
            elif kind == TARGET:
                pieces.append(Answer(self.glue))
            elif kind == "column":
                spans = [(of or {}).get(name, ()) for of in (words, template_spans)]
                pieces.append(Text(fields[name], name in self.truncate, *spans))
            else:
                text = name[: len(name) - len(self.glue)] if index == self._target - 1 else name
                pieces.extend([Text(text, template_spans=((0, len(text)),))] if text else [])
        return tuple(pieces)
