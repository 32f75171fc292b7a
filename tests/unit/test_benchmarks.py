"""What a machine cannot run is left out of the benchmarks, which say so."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import generation


@pytest.mark.parametrize("supported", [True, False])
def test_generation_leaves_out_what_the_cpu_cannot_run(monkeypatch, capsys, tmp_path, supported):
    monkeypatch.setattr(generation, "is_supported", lambda _: supported)
    monkeypatch.setattr(generation, "DEVICE", generation.torch.device("cpu"))
    names = generation.side_names()
    assert ("ours_prepacked" in names) == supported
    assert ("skipped: ours prepacked" in capsys.readouterr().out) != supported
    values = dict.fromkeys(names, 1.0)
    found = {"rates": values, "ratios": values, "peaks": values, "equal": True}
    assert generation.line(20, 1, found).count("|") == len(generation.COLUMNS) + 1
    generation.draw([(20, 1, found)], tmp_path / "generation.png")
    assert (tmp_path / "generation.png").is_file()
