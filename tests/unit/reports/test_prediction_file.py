import re

import pytest

from lightning_softprompt.reports.prediction_file import PREDICTIONS, read_predictions
from lightning_softprompt.system.errors import CommandError


def test_only_line_feeds_separate_records(tmp_path):
    path = tmp_path / PREDICTIONS
    path.write_text('{"prediction": "one\u2028two\x85three"}\n{"prediction": "four"}\n', encoding="utf-8")
    assert [record["prediction"] for record in read_predictions(path)] == ["one\u2028two\x85three", "four"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prediction": "o', """got '{"prediction": "o' (Unterminated string"""),
        (b"[1]", "got '[1]'; run the test again"),
        (b'{"prediction": "\xff"}', """got '{"prediction": "\ufffd"}' ('utf-8' codec"""),
        (b"[" * 100_000, "recursion depth"),
    ],
    ids=["incomplete", "a list", "not UTF-8", "nested too deeply"],
)
def test_an_invalid_record_is_reported_with_its_line(tmp_path, line, message):
    path = tmp_path / PREDICTIONS
    path.write_bytes(b"{}\n" + line)
    with pytest.raises(CommandError, match=re.escape(f"{path}:2: expected a JSON object, got ")) as error:
        read_predictions(path)
    assert message in str(error.value)
