"""Methods and options on an architecture are equal to plain transformers, or refused, as the table says."""

from pathlib import Path

import pytest
from architecture_checks import EQUAL, REFUSED, run
from architecture_method_checks import METHODS
from architecture_table import COLUMNS, read
from architectures import architectures

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"
SOME = (
    "llama", "bert", "jetmoe", "modernbert-decoder",  # keys that are repeated; a head that is called a decoder
    "got_ocr2",  # parts with attention functions of their own
    "deepseek_v4",  # reads token ids: small copies must, too
    "nllb-moe",  # experts that read the attention mask
    "roberta", "layoutlm", "mamba",  # heads, masks and casts in half precision
    "longt5-tglobal",  # products of no rows
    "t5gemma2",  # a configuration that cannot be made narrower
)  # fmt: skip


@pytest.mark.parametrize("name", SOME)
def test_methods_on_an_architecture_are_equal_or_refused_as_the_table_says(name, tmp_path):
    results = run(architectures()[name], tmp_path, METHODS)
    assert {check: result for check, result in results.items() if result.verdict not in (EQUAL, REFUSED)} == {}
    row = read(TABLE)[name]
    assert {check: result.verdict for check, result in results.items()} == {
        check: row[check].verdict for check in METHODS
    }


def test_the_table_has_a_column_for_every_check_and_nothing_that_is_neither_equal_nor_refused():
    loaded = {name: row for name, row in read(TABLE).items() if "load" not in row}
    assert {tuple(row) for row in loaded.values()} == {tuple(COLUMNS)}
    wrong = {
        (name, check): result
        for name, row in loaded.items()
        for check, result in row.items()
        if result.verdict not in (EQUAL, REFUSED)
    }
    assert wrong == {}
