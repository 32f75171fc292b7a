"""Durations as text."""

from __future__ import annotations


def describe_seconds(seconds: float) -> str:
    """Returns a duration for people.

    >>> describe_seconds(0.2), describe_seconds(42), describe_seconds(200), describe_seconds(9000)
    ('less than 1 s', '42 s', '3 min', '2.5 h')
    """
    if seconds < 1:
        return "less than 1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
