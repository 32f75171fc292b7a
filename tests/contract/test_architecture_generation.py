"""Architectures generate the same answers in a batch and row by row. `benchmarks/architectures.py` checks all."""

import pytest
from architecture_checks import EQUAL, run
from architecture_generation import GENERATION
from architectures import architectures

SELECTED = (  # architectures with different caches, positions or masks that run fast
    *("gemma2-mixed", "gpt_oss-mixed", "llama4-mixed", "bloom", "falcon-rw", "gpt_neo", "minicpm3"),
    *("qwen3_next", "recurrent_gemma", "minimax", "moss_transcribe_diarize", "lfm2", "xlm", "bart-forced", "bert"),
)


@pytest.mark.parametrize("name", SELECTED)
def test_an_architecture_generates_the_tokens_of_its_forward_pass(name, tmp_path):
    results = run(architectures()[name], tmp_path, GENERATION)
    assert {check: result for check, result in results.items() if result.verdict != EQUAL} == {}
