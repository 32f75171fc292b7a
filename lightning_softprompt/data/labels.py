"""Names of classes in configs and rows: converted to text, checked, and compared in one Unicode form."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

# What configs give. YAML reads unquoted words such as `no` and `1` as other types than text, which are checked here.
# Texts come first, and `Any` is no choice: jsonargparse would read a quoted "no" as a value again.
GivenWord = str | int | float | bool | None
GivenLabels = dict[str, GivenWord | list[GivenWord]] | list[GivenWord]
NUMERAL = re.compile(r"[+-]?\d+([.,]\d+)?")
WRITTEN_LIST = re.compile(
    r"""(array\()?\[\s*(['"].*['"])?\s*\](, dtype=\w+)?\)?"""  # a list, or NumPy's array
    r"""|\(\s*(['"])[^'"]*\4\s*,(.*['"],?)?\s*\)"""  # a tuple, which has a comma, as no text in brackets does
    r"""|\{\s*(['"])[^'"]*\6\s*(,.*['"])?\s*\}""",  # a set
    re.DOTALL,
)
INVISIBLE = "\u200b\u200e\u200f\u2060\ufeff"  # such as the byte order marks of files that were joined


class ClassNumbers:
    """Finds the number of a class from its name, or from its position where no name is a numeral.

    Args:
        names: The classes in order.

    Raises:
        ValueError: If two names are the same text in Unicode's composed form.

    >>> ClassNumbers(["bad", "good"]).find("good"), ClassNumbers(["bad", "good"]).find(1)
    (1, 1)
    >>> ClassNumbers(["1", "2"]).find(1), ClassNumbers(["1", "2"]).find(0)
    (0, None)
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._numbers = {compose_accents(name): number for number, name in enumerate(self.names)}
        if len(self._numbers) < len(self.names):
            raise ValueError(f"each class needs a name of its own, got {list(self.names)}")
        self.accepts_positions = not any(NUMERAL.fullmatch(name.strip()) for name in self.names)

    def find(self, value: object) -> int | None:
        """The number of the class that a row names, or None if there is no such class."""
        if isinstance(value, list | tuple | Mapping) or is_missing(value):
            return None
        number = self.find_name(str(value))
        return self._position(value) if number is None else number

    def find_name(self, name: str) -> int | None:
        """The number of the class of this name, spaces around it aside, or None if there is no such class."""
        number = self._numbers.get(compose_accents(name))
        return self._numbers.get(trim(name)) if number is None else number

    def _position(self, value: object) -> int | None:
        number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
        if not self.accepts_positions or not isinstance(number, int) or isinstance(number, bool):
            return None
        return number if 0 <= number < len(self.names) else None

    @property
    def accepted(self) -> str:
        """What rows may contain, for messages."""
        return f"{list(self.names)}{', or their numbers' if self.accepts_positions else ''}"


def compose_accents(text: str) -> str:
    """Converts a text to the composed form of Unicode (NFC), so that equal accents have equal encodings."""
    return unicodedata.normalize("NFC", text)


def trim(text: str) -> str:
    r"""Composes accents and removes white space and zero-width characters at the start and end.

    >>> trim("\ufeffgood ")
    'good'
    """
    return compose_accents(text).strip().strip(INVISIBLE).strip()


def is_missing(value: object) -> bool:
    """Whether a cell contains no label: null, NaN, or white space.

    >>> [is_missing(value) for value in (None, float("nan"), " ", 0, "no")]
    [True, True, True, False, False]
    """
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not trim(value))


def is_written_list(value: object) -> bool:
    """Whether a text is a list that a table could not hold, such as `['Paris', 'London']`."""
    return isinstance(value, str) and WRITTEN_LIST.fullmatch(value.strip()) is not None


def words_by_name(labels: Mapping[Any, Any] | Sequence[Any], option: str) -> dict[str, list[str]]:
    """Returns the label words of each class, from a mapping of names to words, or from names that are also words.

    Args:
        labels: What a config gives. YAML makes numbers of unquoted names such as `1`; they become text again.
        option: The name of the option, for messages.

    Raises:
        ValueError: If a name or word is empty or no text, or two names are the same.

    >>> words_by_name({1: "good", 0: ["bad", "awful"]}, "labels")
    {'1': ['good'], '0': ['bad', 'awful']}
    """
    pairs = list(labels.items()) if isinstance(labels, Mapping) else [(name, name) for name in labels]
    words: dict[str, list[str]] = {}
    for name, given in pairs:
        listed = given if isinstance(given, list | tuple) else [given]
        key = as_text(name, option)
        if key in words:
            raise ValueError(f"{option} names the class {key!r} twice")
        words[key] = [as_text(word, f"{option}, class {key!r}") for word in listed]
    return words


def as_text(value: object, where: str) -> str:
    """Converts a name or word to text.

    Raises:
        ValueError: If it is empty, or a value that YAML makes of an unquoted word.
    """
    if isinstance(value, bool) or value is None:
        raise ValueError(
            f"{where}: a name or word is expected, got {value!r}. YAML reads unquoted yes, no, on, off, true, false "
            "and null as values; put the word in quotes, such as 'no'"
        )
    if is_missing(value):
        raise ValueError(f"{where}: a name or word is empty, got {value!r}; give a text")
    return str(value)
