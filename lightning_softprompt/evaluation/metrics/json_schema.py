"""`JsonSchema`: whether generated texts are JSON, follow a schema and have the right values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_softprompt.system.optional_packages import import_optional


@final
class JsonSchema(Metric):
    """Fractions of generated texts that are JSON and that follow a JSON schema, and the F1 score of their values.

    Computes `valid_json`; `valid_schema`, of texts that also follow the schema; and `json_f1`, the micro-averaged F1
    score of the pairs of a name and a value in an object and in its reference, with the best reference of each text.
    Nested values are compared as a whole. A text that is no object has no pairs.

    Args:
        schema: The JSON schema.
        options: Options of `torchmetrics.Metric`.

    Raises:
        ValueError: If the schema is invalid, or the package `jsonschema` is not installed.
    """

    full_state_update = False
    higher_is_better = True
    counts: Tensor

    def __init__(self, schema: dict[str, Any], **options: Any) -> None:
        super().__init__(**options)
        package = import_optional("jsonschema")
        validator = package.validators.validator_for(schema)
        try:
            validator.check_schema(schema)
        except package.SchemaError as error:
            raise ValueError(f"schema is not a JSON schema: {error.message}") from None
        self.schema = schema
        # texts, JSON texts, texts of the schema, correct pairs, predicted pairs, pairs of references
        self.add_state("counts", default=torch.zeros(6, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Adds texts.

        Args:
            predictions: The generated texts.
            references: The references of each.
        """
        package = import_optional("jsonschema")
        validator = package.validators.validator_for(self.schema)(self.schema)
        for text, row_references in zip(predictions, references, strict=True):
            is_json, value = parse_json(text)
            is_valid = is_json and validator.is_valid(value)
            pairs = _list_pairs(value)
            expected = [_list_pairs(parse_json(reference)[1]) for reference in row_references]
            best = max(expected, key=lambda reference: _f1(len(pairs & reference), len(pairs), len(reference)))
            counts = (1, is_json, is_valid, len(pairs & best), len(pairs), len(best))
            self.counts += torch.tensor(counts, device=self.counts.device)

    def compute(self) -> dict[str, Tensor]:
        """Returns the fractions and the F1 score."""
        texts, valid_json, valid_schema, correct, predicted, expected = self.counts.tolist()
        values = {
            "valid_json": valid_json / max(1, texts),
            "valid_schema": valid_schema / max(1, texts),
            "json_f1": _f1(correct, predicted, expected),
        }
        return {name: torch.tensor(value) for name, value in values.items()}


def parse_json(text: str) -> tuple[bool, Any]:
    """Returns whether a text is JSON, and its value.

    NaN and Infinity are not JSON.

    >>> parse_json('{"a": 1}'), parse_json("{'a': 1}"), parse_json("NaN")
    ((True, {'a': 1}), (False, None), (False, None))
    """
    try:
        return True, json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False, None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _list_pairs(value: Any) -> frozenset[tuple[str, str]]:
    """Returns the names of an object with its values as text; nothing for other values."""
    if not isinstance(value, Mapping):
        return frozenset()
    return frozenset((name, json.dumps(item, sort_keys=True)) for name, item in value.items())


def _f1(correct: int, predicted: int, expected: int) -> float:
    """Returns the F1 score of numbers of pairs; 1 if there are none.

    >>> _f1(1, 2, 2), _f1(0, 0, 0)
    (0.5, 1.0)
    """
    return 2 * correct / (predicted + expected) if predicted + expected else 1.0
