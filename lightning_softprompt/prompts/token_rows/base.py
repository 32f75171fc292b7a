"""`TokenRowsInit`: creates the rows of new tokens in the embedding table and the head.

A new token replaces a sequence of existing ones, its subwords.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.tokenization.added_rows import AddedRow


class TokenRowsInit(ABC):
    """Creates the initial rows of new tokens."""

    @abstractmethod
    def __call__(self, backbone: Backbone, tables: Sequence[Tensor], tokens: Sequence[AddedRow]) -> list[Tensor]:
        """Returns rows [N, H] in float32 for each table.

        Args:
            backbone: The backbone, whose tables also have rows for the new tokens.
            tables: The rows [V, H] of existing tokens: those of the embedding table, and those of the head if its new
                rows are separate parameters.
            tokens: The new tokens; `base` of a token are the ids of its subwords.
        """


def subwords_of(tokens: Sequence[AddedRow]) -> list[tuple[int, ...]]:
    """Returns the ids of the existing tokens that each new token replaces."""
    return [token.base for token in tokens]
