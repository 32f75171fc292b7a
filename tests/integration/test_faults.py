"""A sample of `benchmarks/faults.py`: killed and resumed runs have the results of uninterrupted ones."""

import signal
import sys
from importlib import import_module
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from faults import Faults, differing, run_points, sample_kills
from killing import PLACES, Kill
from scenarios import SCENARIOS

SAMPLE = (
    "validation while gradients add up",
    "RAG answers, Spring",
    "two processes: prompt tuning",
    "predict: summaries",
)


@pytest.mark.parametrize("part", SAMPLE)
def test_a_killed_and_resumed_run_has_the_same_results(tmp_path, part):
    scenarios = {title: scenario for title, scenario in SCENARIOS.items() if part in title}
    (record,) = run_points(Faults(tmp_path), scenarios, 1, seed=len(part))
    assert record["killed"] >= 1
    assert record["compared"] >= 3  # at least predictions, their config and a table
    assert record["differing"] == []
    assert record["running"] == 0


@pytest.mark.parametrize("place", PLACES)
def test_a_fault_point_names_a_function(place):
    module, _, path = PLACES[place].where.partition(":")
    owner = import_module(module)
    for name in path.split("."):
        owner = getattr(owner, name)
    assert callable(owner)


def test_differences_are_found(tmp_path):
    """A run with another seed differs in every file."""
    scenario = SCENARIOS["prompt tuning, dropout, random start, accumulation"]
    faults = Faults(tmp_path)
    (code,) = faults.run(scenario, "killed", Kill("within a checkpoint", 2))
    assert code == -signal.SIGKILL
    one, counts = faults.run_uninterrupted(scenario, "one")
    other, _ = faults.run_uninterrupted(type(scenario)({**scenario.options, "seed_everything": 7}), "other")
    files = {name.partition(":")[0] for name in differing(one, other)}
    assert {"checkpoints/last.ckpt", "metrics.csv", "metrics.json", "prompt.safetensors"} <= files
    sampled = sample_kills(counts, 40, seed=0)
    assert {kills[0].place for kills in sampled} == {name for name in PLACES if counts[0][name]}
    assert all(1 <= kill.number <= counts[0][kill.place] for kills in sampled for kill in kills)
