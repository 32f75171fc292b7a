"""An architecture is equal to plain transformers, or refused by name when it is loaded.

`benchmarks/architectures.py` checks all of them. These tests check a selection that differs most and runs fast.
"""

from pathlib import Path

import pytest
from architecture_checks import CHECKS, EQUAL, REFUSED, run
from architecture_table import read
from architectures import architectures

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"
SELECTED = (
    "llama", "gpt2", "t5", "bert", "bart-forced", "m2m_100", "gemma3_text", "bamba", "fnet", "roberta-decoder",
    "phi3-longrope", "llama4_text", "gemma4_text", "xlnet", "fuyu", "mra", "fsmt", "perceiver", "prophetnet", "ibert",
)  # fmt: skip


@pytest.mark.parametrize("name", SELECTED)
def test_an_architecture_is_equal_or_refused_as_in_the_table(name, tmp_path):
    results = run(architectures()[name], tmp_path, CHECKS)
    assert {result.verdict for result in results.values()} <= {EQUAL, REFUSED}, results
    row = read(TABLE)[name]
    assert results == {check: row[check] for check in results}


def test_the_table_has_every_architecture():
    assert set(read(TABLE)) == set(architectures())
