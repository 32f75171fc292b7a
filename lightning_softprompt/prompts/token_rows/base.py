"""`TokenRowsInit`: creates the rows of new tokens in the embedding table and the head.

A new token replaces a sequence of existing ones, its subwords.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from lightning_softprompt.backbones.base import Backbone

Subwords = Sequence[Sequence[int]]  # ids of the existing tokens that each new token replaces


class TokenRowsInit(ABC):
    """Creates the initial rows of new tokens."""

    @abstractmethod
    def __call__(self, backbone: Backbone, table: Tensor, subwords: Subwords, is_output: bool) -> Tensor:
        """Returns rows [N, H] in float32.

        Args:
            backbone: The backbone.
            table: The rows [V, H] of existing tokens, of the embedding table or of the head.
            subwords: Ids of the existing tokens that each new token replaces.
            is_output: Whether the rows are those of the head.
        """
