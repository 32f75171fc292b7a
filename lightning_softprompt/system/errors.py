"""Errors that commands report in one line."""

from __future__ import annotations


class CommandError(ValueError):
    """A mistake that a user can correct: commands report it in one line, without a traceback."""
