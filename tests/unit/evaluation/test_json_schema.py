"""JSON as an output format: validity, a schema, and the values."""

import json
import sys

import pytest

from lightning_softprompt.evaluation.metrics.extra_text import ExtraTextMetrics
from lightning_softprompt.evaluation.metrics.json_schema import JsonSchema

SCHEMA = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string"}, "seats": {"type": "integer"}},
}
REFERENCE = json.dumps({"name": "Cotto", "seats": 4})


@pytest.mark.parametrize(
    ("text", "valid_json", "valid_schema", "f1"),
    [
        (REFERENCE, 1, 1, 1),
        ('{"seats": 4, "name": "Cotto"}', 1, 1, 1),
        ('{"name": "Cotto"}', 1, 1, 2 / 3),
        ('{"name": "Cotto", "seats": "4"}', 1, 0, 1 / 2),
        ('{"seats": 4}', 1, 0, 2 / 3),
        ('["Cotto", 4]', 1, 0, 0),
        ("null", 1, 0, 0),
        ('{"name": "Cotto", "seats": NaN}', 0, 0, 0),
        ("{'name': 'Cotto'}", 0, 0, 0),
        (f"Here it is: {REFERENCE}", 0, 0, 0),
        ("[" * 100_000, 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_texts_are_parsed_validated_and_compared(text, valid_json, valid_schema, f1):
    metric = JsonSchema(SCHEMA)
    metric.update([text], [[REFERENCE]])
    values = {name: pytest.approx(value) for name, value in metric.compute().items()}
    assert values == {"valid_json": valid_json, "valid_schema": valid_schema, "json_f1": f1}


def test_fractions_are_of_all_texts_and_the_best_reference_of_each_counts():
    metrics = ExtraTextMetrics([JsonSchema(SCHEMA)], {"loss"})
    results = metrics.compute([REFERENCE, "no"], [['{"name": "Ada"}', REFERENCE], [REFERENCE]])
    assert {name: round(float(value), 3) for name, value in results.items()} == {
        "valid_json": 0.5,
        "valid_schema": 0.5,
        "json_f1": 0.667,
    }
    assert set(metrics.modes.values()) == {"max"}


def test_a_schema_that_is_none_and_a_missing_package_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="schema is not a JSON schema: 'text' is not valid"):
        JsonSchema({"type": "text"})
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ValueError, match=r"JsonSchema requires the package jsonschema; pip install .*\[json-schema\]"):
        JsonSchema(SCHEMA)
