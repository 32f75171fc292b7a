"""Rows whose answers must meet constraints."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_softprompt.constraints.base import Constraint
from lightning_softprompt.core.chat_format import ChatExample
from lightning_softprompt.core.types import Example


@dataclass(frozen=True)
class ConstrainedExample(Example):
    """A row whose answer must meet constraints.

    Args:
        constraints: The constraints.
    """

    constraints: tuple[Constraint, ...] = ()


@dataclass(frozen=True)
class ConstrainedDialogue(ConstrainedExample, ChatExample):
    """A dialogue whose last answer must meet constraints."""
