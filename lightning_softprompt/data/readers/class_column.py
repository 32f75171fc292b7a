"""The column of a row that contains its class, and draws of rows by class."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lightning_softprompt.core.types import Example, Label
from lightning_softprompt.data.labels import NUMERAL, ClassNumbers, is_missing, is_written_list, trim
from lightning_softprompt.data.readers.sources import Rows, first_columns

log = logging.getLogger(__name__)
DEFAULT_LABEL = "label"
LABEL_COLUMNS = ("class", "category", "intent", "topic", "sentiment", "target")  # read if there is no other label


class ClassColumn:
    """The column of the class of a row.

    Args:
        name: The name of the column. Without a column `label`, the only one with another usual name is used.
        others: Columns that contain no class.
    """

    def __init__(self, name: str, others: Collection[str]) -> None:
        self.name = name
        self.others = others

    def infer_names(self, rows: Rows) -> list[str]:
        """Returns the sorted classes of rows. Rows without a class are reported later.

        Raises:
            ValueError: If there is no such column, or one class has two spellings.
        """
        if not any(self.name in row for row in rows):
            self._use_other_name(rows[0])
        values = (row.get(self.name) for row in rows)
        scalars = (value for value in values if not isinstance(value, list | tuple | Mapping))
        labels = (value for value in scalars if not is_missing(value) and not is_written_list(value))
        names = sorted({trim(str(label)) for label in labels})
        floats = [name for name in names if name.endswith(".0") and NUMERAL.fullmatch(name)]
        duplicates = [name for name in floats if name.removesuffix(".0") in names]
        if duplicates:
            number = duplicates[0]
            raise ValueError(
                f"the training rows have both labels {number.removesuffix('.0')!r} and {number!r}, which are one "
                "number: use one spelling, or set data.labels"
            )
        return names

    def _use_other_name(self, row: Mapping[str, Any]) -> None:
        """Sets `name` to the only column of a row that has a usual name of a class.

        Raises:
            ValueError: If there is no such column, or several.
        """
        found = [name for name in row if name.strip().lower() in LABEL_COLUMNS and name not in self.others]
        if self.name != DEFAULT_LABEL or len(found) != 1:
            others = [name for name in row if name not in self.others]
            raise ValueError(
                f"no column {self.name!r}; the row has {first_columns(row)}: set data.label to the column of the "
                f"class, such as --data.label {others[0] if others else 'COLUMN'}"
            )
        self.name = found[0]
        log.info("Classes are read from the column %r; data.label sets another one", self.name)

    def number(self, row: Mapping[str, Any], numbers: ClassNumbers) -> int:
        """Returns the class of a row.

        Raises:
            ValueError: If it has none of the classes.
        """
        if self.name not in row:
            self._use_other_name(row)
        value = row[self.name]
        if is_missing(value):
            raise ValueError(f"column {self.name!r} has no label, got {value!r}; labels are {numbers.accepted}")
        number = numbers.find(value)
        if number is None:
            raise ValueError(f"unknown label {value!r}; labels are {numbers.accepted}")
        return number


def sample_per_class(
    examples: Sequence[Example], names: Sequence[str], count: int, option: str, seed: int
) -> list[int]:
    """Returns the sorted indices of `count` random rows of each class.

    Args:
        examples: The rows.
        names: The classes in order.
        count: Number of rows of each class.
        option: The option that requests them, for messages.
        seed: Seed of the draw.

    Raises:
        ValueError: If a class has fewer rows.
    """
    by_class: dict[Label | None, list[int]] = defaultdict(list)
    for i in np.random.default_rng(seed).permutation(len(examples)).tolist():
        by_class[examples[i].label].append(i)
    sizes = {name: len(by_class[number]) for number, name in enumerate(names)}
    too_small = {name: size for name, size in sizes.items() if size < count}
    if too_small:
        raise ValueError(f"{option}={count} rows of each class requested, but there are only {too_small}")
    return sorted(i for rows in by_class.values() for i in rows[:count])


def inverse_frequencies(examples: Sequence[Example]) -> list[float]:
    """Returns the inverse frequency of the class of each row."""
    counts = Counter(example.label for example in examples)
    return [1 / counts[example.label] for example in examples]
