"""The table states for each architecture which methods and options equal plain transformers, and which are refused."""

from pathlib import Path

import pytest
from architecture_checks import EQUAL, REFUSED, run
from architecture_method_checks import METHODS
from architecture_table import COLUMNS, read
from architectures import architectures

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"
SELECTED = (
    "llama", "bert", "jetmoe", "modernbert-decoder",  # repeated keys; a head named decoder
    "got_ocr2",  # parts with other attention functions
    "deepseek_v4",  # reads token ids, also in small copies
    "nllb-moe",  # experts that read the attention mask
    "roberta", "layoutlm", "mamba",  # heads, masks and casts in half precision
    "longt5-tglobal",  # matrix products without rows
    "t5gemma2",  # a configuration without a smaller width
)  # fmt: skip


@pytest.mark.parametrize("name", SELECTED)
def test_methods_on_an_architecture_are_equal_or_refused_as_in_the_table(name, tmp_path):
    results = run(architectures()[name], tmp_path, METHODS)
    verdicts = {check: result.verdict for check, result in results.items()}
    assert set(verdicts.values()) <= {EQUAL, REFUSED}, results
    row = read(TABLE)[name]
    assert verdicts == {check: row[check].verdict for check in METHODS}


def test_the_table_has_a_column_for_every_check_and_only_equal_or_refused_results():
    loaded = {name: row for name, row in read(TABLE).items() if "load" not in row}
    assert {tuple(row) for row in loaded.values()} == {tuple(COLUMNS)}
    for name, row in loaded.items():
        for check, result in row.items():
            assert result.verdict in (EQUAL, REFUSED), (name, check)
