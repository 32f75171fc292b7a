"""The base class of constraints, and how a constraint is read from a row."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from inspect import isabstract

from lightning_softprompt.core.plugin_modules import import_modules

KIND = "kind"  # the key of the class of a constraint in a row
MARKUP = re.compile(r"[*_`#]+")  # emphasis, code and headings of Markdown


class Constraint(ABC):
    """A property of an answer that a program can check. A subclass is a frozen dataclass in a file of this folder.

    The name of a constraint in a row is the name of its class in snake case, such as `word_count`.
    """

    @property
    @abstractmethod
    def instruction(self) -> str:
        """The sentence that asks for the property."""

    @abstractmethod
    def is_met(self, answer: str) -> bool:
        """Returns whether a non-empty answer has the property."""

    @property
    def label(self) -> str:
        """The name under which results are reported."""
        return kind_of(type(self))

    def passes(self, answer: str, is_loose: bool = False) -> bool:
        """Returns whether an answer has the property. An empty answer has none.

        Args:
            answer: The answer.
            is_loose: Whether it is enough that the answer has the property without its first line, its last line, or
                its markup (Zhou et al. 2023, arXiv 2311.07911).
        """
        variants = loose_variants(answer) if is_loose else [answer]
        return any(self.is_met(variant) for variant in variants if variant.strip())


def loose_variants(answer: str) -> list[str]:
    r"""Returns an answer, its parts without the first or the last line or both, and each of them without markup.

    >>> loose_variants("Sure:\n*yes*")
    ['Sure:\n*yes*', '*yes*', 'Sure:', '', 'Sure:\nyes', 'yes', 'Sure:', '']
    """
    lines = answer.strip().split("\n")
    parts = [lines, lines[1:], lines[:-1], lines[1:-1]]
    texts = ["\n".join(part).strip() for part in parts]
    plain = [MARKUP.sub("", text).strip() for text in texts]
    return [*texts, *plain]


def kind_of(cls: type[Constraint]) -> str:
    """Returns the name of a class of constraints in rows."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()


def constraint_classes() -> dict[str, type[Constraint]]:
    """Returns the classes of constraints by name, in alphabetical order."""
    import_modules(__package__)
    classes = {kind_of(cls): cls for cls in _subclasses(Constraint) if not isabstract(cls)}  # type: ignore[type-abstract]
    return dict(sorted(classes.items()))


def _subclasses(cls: type[Constraint]) -> Iterator[type[Constraint]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def read_constraint(value: object) -> Constraint:
    """Creates a constraint from a row, such as `{"kind": "word_count", "low": 20, "high": 40}`.

    Raises:
        ValueError: If the kind is unknown, or an argument is unknown, missing or out of range.
    """
    if not isinstance(value, Mapping) or not isinstance(value.get(KIND), str):
        raise ValueError(f"a constraint must be a mapping with a {KIND}, such as {{kind: no_commas}}, got {value!r}")
    classes = constraint_classes()
    kind = value[KIND]
    if kind not in classes:
        close = get_close_matches(kind, classes)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {list(classes)}"
        raise ValueError(f"unknown constraint {kind!r}; {hint}")
    cls = classes[kind]
    arguments = {name: argument for name, argument in value.items() if name != KIND and argument is not None}
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise ValueError(f"constraint {kind!r} has no argument {unknown[0]!r}; its arguments are {known}")
    try:
        return cls(**arguments)
    except TypeError as error:  # an argument is missing or has another type
        raise ValueError(f"constraint {kind!r}: {error}") from error


def read_constraints(value: object) -> tuple[Constraint, ...]:
    """Creates the constraints of a row.

    Raises:
        ValueError: If the value is not a non-empty list of constraints.
    """
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ValueError(f"constraints must be a non-empty list of mappings, got {value!r}")
    return tuple(read_constraint(item) for item in value)


def check_range(name: str, low: int, high: int) -> None:
    """Checks the bounds of a count.

    Raises:
        ValueError: If they are not whole numbers, or the lower one is negative or above the upper one.
    """
    are_numbers = all(isinstance(bound, int) and not isinstance(bound, bool) for bound in (low, high))
    if not are_numbers or not 0 <= low <= high:
        raise ValueError(f"{name} requires whole numbers 0 <= low <= high, got low={low!r} and high={high!r}")


def describe_range(low: int, high: int) -> str:
    """Describes the bounds of a count.

    >>> describe_range(2, 4), describe_range(3, 3)
    ('between 2 and 4', 'exactly 3')
    """
    return f"exactly {low}" if low == high else f"between {low} and {high}"
