"""How a row is written: where its columns, the soft blocks and the answer stand.

Pure text: a template knows neither tokens nor how long a soft block is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from string import Formatter

from lightning_softprompt.core.types import Answer, Piece, Slot, Spans, Text

COLUMN = re.compile(r"\w(?:[^{}\[\]:!\"'\\\n\r\t]*[^{}\[\]:!\"'\\\s])?")
SOFT, TARGET = "soft", "target"


class Template:
    r"""A text with places, such as `"{soft}{review}\nSentiment: {target}"`.

    `{soft}` is a slot for soft tokens, `{target}` the place of the answer, every other name a column of the row, which
    may have spaces and hyphens within, such as `{Review Text}`. The text is parsed once: a document that happens to
    contain `{soft}` stays text. Without `{soft}` the one slot is the start. Literal braces are written `{{` and `}}`.

    Args:
        text: The template.
        truncate: Columns that give way when a row is too long, the last part of the text first.

    Raises:
        ValueError: If the text has no `{target}` or more than one, names something that is no column, or `truncate`
            names a column that the text lacks.

    >>> template = Template("{soft}{review} It was {target}", truncate=["review"])
    >>> template.columns
    ('review',)
    >>> template.pieces({"review": "Fun!"})[:2]
    (Slot(), Text(text='Fun!', truncatable=True, words=()))
    >>> template.pieces({"review": "Fun!"})[2:]
    (Text(text=' It was', truncatable=False, words=()), Answer(glue=' '))
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
            raise ValueError(f"template {text!r} must name {{target}} once, but does so {targets} times")
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
        """The row with its answer as stretches of text, each with its kind: `literal`, `column` or `target`."""
        said: list[tuple[str, str]] = []
        for piece, kind in zip(self.pieces(fields), self._kinds, strict=True):
            text = piece.text if isinstance(piece, Text) else piece.glue + target if isinstance(piece, Answer) else ""
            said.extend([(kind, text)] if text else [])
        return said

    @property
    def _kinds(self) -> list[str]:
        """Of the pieces: a literal that is all glue makes none."""
        glued = [i == self._target - 1 and part == ("literal", self.glue) for i, part in enumerate(self._parts)]
        return [kind for (kind, _), all_glue in zip(self._parts, glued, strict=True) if not all_glue]

    def pieces(
        self,
        fields: Mapping[str, str],
        words: Mapping[str, Spans] | None = None,
        template_spans: Mapping[str, Spans] | None = None,
    ) -> tuple[Piece, ...]:
        """The row's pieces in reading order.

        Args:
            fields: The columns.
            words: Where in a column its words stand, if they have classes.
            template_spans: Where in a column a template of its own wrote the text, so that control tokens are meant.

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
