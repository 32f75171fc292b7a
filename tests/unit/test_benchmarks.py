"""Benchmarks skip what a machine cannot run, and print that they do."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import generation


@pytest.mark.parametrize("supported", [True, False])
def test_generation_skips_what_the_cpu_cannot_run(monkeypatch, capsys, tmp_path, supported):
    monkeypatch.setattr(generation, "is_supported", lambda _: supported)
    monkeypatch.setattr(generation, "DEVICE", generation.torch.device("cpu"))
    names = generation.select_sides()
    assert ("ours_prepacked" in names) == supported
    assert ("skipped: ours prepacked" in capsys.readouterr().out) != supported
    values = dict.fromkeys(names, 1.0)
    result = {"rates": values, "ratios": values, "peaks": values, "equal": True}
    assert generation.format_row(20, 1, result).count("|") == len(generation.COLUMNS) + 1
    generation.draw([(20, 1, result)], tmp_path / "generation.png")
    assert (tmp_path / "generation.png").is_file()
