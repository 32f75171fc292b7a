"""Splits the options of a command from those of the classes that it names."""

from __future__ import annotations

from collections.abc import Sequence


def join_class_options(arguments: Sequence[str]) -> list[str]:
    """Returns arguments with each option of a class and its value in one word, so that no value seems to be a file.

    >>> join_class_options(["OUT", "--writer.count", "3", "--seed", "1", "--writer.summary=true"])
    ['OUT', '--writer.count=3', '--seed', '1', '--writer.summary=true']
    """
    joined: list[str] = []
    remaining = list(arguments)
    while remaining:
        word = remaining.pop(0)
        is_class_option = word.startswith("--") and "." in word and "=" not in word
        if is_class_option and remaining:
            word = f"{word}={remaining.pop(0)}"
        joined.append(word)
    return joined
