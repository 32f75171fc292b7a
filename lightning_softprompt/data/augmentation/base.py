"""The contract of augmentations, and the text of a row that they change."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from lightning_softprompt.core.types import Encoded, Example
from lightning_softprompt.data.sampling.epoch_indexed import Rng


@dataclass(frozen=True)
class Draft:
    """The text of a row, which augmentations change before it is tokenized.

    Args:
        columns: The texts of its columns.
        target: Its target.
        template: Its template; None for that of the data module.
    """

    columns: Mapping[str, str]
    target: str
    template: str | None = None


class RowText(Protocol):
    """How a data module reads and writes the text of a row."""

    @property
    def column_names(self) -> tuple[str, ...]:
        """The columns of a row."""

    @property
    def has_free_targets(self) -> bool:
        """Whether a target may be any text."""

    def check_template(self, template: str) -> None:
        """Refuses a template that cannot replace that of the data module.

        Raises:
            ValueError: With the reason.
        """

    def read(self, example: Example) -> Draft:
        """Returns the text of a row."""

    def write(self, example: Example, draft: Draft) -> tuple[Encoded, Example]:
        """Returns a row with a changed text.

        Args:
            example: The row before the change.
            draft: Its text after the change.

        Raises:
            ValueError: If the row does not fit into max_tokens.
        """


class Augmentation(ABC):
    """A random change of the text of training rows."""

    @abstractmethod
    def check(self, text: RowText) -> None:
        """Refuses rows that the augmentation cannot change.

        Raises:
            ValueError: With the reason.
        """

    @abstractmethod
    def apply(self, draft: Draft, rng: Rng, draw_other: Callable[[], Draft], fits: Callable[[Draft], bool]) -> Draft:
        """Returns the changed text of a row.

        Args:
            draft: The text.
            rng: Random numbers of the row in this epoch.
            draw_other: Returns the text of another random training row.
            fits: Whether a row with a text fits into max_tokens without truncation of its target.
        """


def check_column(column: str, text: RowText, option: str) -> None:
    """Refuses a column that rows do not have.

    Raises:
        ValueError: Naming the columns.
    """
    if column not in text.column_names:
        raise ValueError(f"{option}: {column!r} is not a column of the rows, which have {list(text.column_names)}")
