"""Architectures generate in a batch what each row gets alone. `benchmarks/architectures.py` runs all."""

import pytest
from architecture_checks import EQUAL, run
from architecture_generation import GENERATION
from architectures import architectures

SOME = (  # those whose caches, positions or masks differ most, and that are cheap
    *("gemma2-mixed", "gpt_oss-mixed", "llama4-mixed", "bloom", "falcon-rw", "gpt_neo", "minicpm3"),
    *("qwen3_next", "recurrent_gemma", "minimax", "moss_transcribe_diarize", "lfm2", "xlm", "bart-forced", "bert"),
)


@pytest.mark.parametrize("name", SOME)
def test_an_architecture_generates_as_its_forward_pass(name, tmp_path):
    results = run(architectures()[name], tmp_path, GENERATION)
    assert {check: result for check, result in results.items() if result.verdict != EQUAL} == {}
