"""The text of rows that a template writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Encoded, Example, Slot
from lightning_softprompt.data.augmentation.base import Draft
from lightning_softprompt.data.splits.row_encoder import RowEncoder


@final
@dataclass(frozen=True)
class TemplateText:
    """Reads and writes the columns of a template.

    Args:
        encoder: Encodes rows.
        has_classes: Whether targets are label words.
    """

    encoder: RowEncoder
    has_classes: bool

    @property
    def column_names(self) -> tuple[str, ...]:
        """The columns of the template."""
        return self.encoder.template.columns

    @property
    def has_free_targets(self) -> bool:
        """Whether a target may be any text."""
        return not self.has_classes

    def check_template(self, template: str) -> None:
        """Refuses a template with other columns, another number of soft blocks, or other spaces before the target.

        Raises:
            ValueError: With the difference.
        """
        other, usual = Template(template), self.encoder.template
        if unknown := set(other.columns) - set(usual.columns):
            raise ValueError(f"template {template!r} has the columns {sorted(unknown)}, which data.template lacks")
        if other.glue != usual.glue:
            raise ValueError(
                f"template {template!r} has {len(other.glue)} spaces before {{target}}, but data.template has "
                f"{len(usual.glue)}; they belong to the target"
            )
        slots = [count_slots(other), count_slots(usual)]
        if slots[0] != slots[1]:
            raise ValueError(f"template {template!r} has {slots[0]} soft blocks, but data.template has {slots[1]}")

    def read(self, example: Example) -> Draft:
        """Returns the columns of a row."""
        return Draft(dict(example.fields), example.target)

    def write(self, example: Example, draft: Draft) -> tuple[Encoded, Example]:
        """Returns a row with changed columns.

        Raises:
            ValueError: If it does not fit, or a column whose words have classes was changed.
        """
        same = {name for name, text in draft.columns.items() if text == example.fields[name]}
        if changed := set(example.words) - same:
            raise ValueError(f"the words of the columns {sorted(changed)} have classes, so that they cannot be changed")
        spans = {name: spans for name, spans in example.template_spans.items() if name in same}
        row = replace(example, fields=dict(draft.columns), target=draft.target, template_spans=spans)
        encoder = self.encoder
        if draft.template is not None:
            encoder = replace(encoder, template=self._templates[draft.template])
        return encoder.encode(row), row

    @cached_property
    def _templates(self) -> ParsedTemplates:
        return ParsedTemplates(self.encoder.template.truncate)


class ParsedTemplates(dict[str, Template]):
    """Templates by their text, each of which is parsed once.

    Args:
        truncate: Columns that may be truncated.
    """

    def __init__(self, truncate: frozenset[str]) -> None:
        super().__init__()
        self.truncate = truncate

    def __missing__(self, text: str) -> Template:
        self[text] = Template(text, self.truncate & set(Template(text).columns))
        return self[text]

    def __reduce__(self) -> tuple[type[ParsedTemplates], tuple[frozenset[str]]]:
        return ParsedTemplates, (self.truncate,)


def count_slots(template: Template) -> int:
    """Returns the number of soft blocks of a template."""
    pieces = template.pieces(dict.fromkeys(template.columns, ""))
    return sum(isinstance(piece, Slot) for piece in pieces)
