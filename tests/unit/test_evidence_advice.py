"""The summary of the evidence that `softprompt methods --advise` shows."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "evidence"))
import advice
import tables

ROWS = 200


def result(method, correct, seed=1, block="main", model="PromptTuning", **options):
    """Returns a result whose first `correct` test rows are correct."""
    return {
        "block": block,
        "method": method,
        "task": "sst2",
        "backbone": "model",
        "seed": seed,
        "rate": 0.1,
        "selects_rate": False,
        "metric": "accuracy",
        "mode": "max",
        "steps": 300,
        "options": {"model": model, "data": "configs/data/sst2.yaml", "data.batch_size": 16, **options},
        "path": "classification/sst2",
        "test": correct / ROWS,
        "row_scores": [1.0] * correct + [0.0] * (ROWS - correct),
        "trainable_parameters": 100,
        "train_seconds": 600.0,
        "device": "cpu",
        "peak_mb": 1000,
        "cpu": "some CPU",
        "threads": 1,
    }


def without_training(method, correct):
    untrained = result(method, correct, model="NoPrompt")
    return {name: value for name, value in untrained.items() if name not in ("trainable_parameters", "train_seconds")}


def test_methods_of_a_task_are_compared_in_pairs_with_their_costs():
    results = [
        result("A", 180),
        result("A", 182, seed=2),
        result("B", 179, model="DePT"),
        without_training("none", 100),
    ]
    (comparison,) = advice.summarize(results)
    assert [method["method"] for method in comparison["methods"]] == ["A", "B", "none"]
    assert comparison["undecided"] == [["A", "B"]]
    assert (comparison["kind"], comparison["rows"], comparison["metric"]) == ("classification", 4800, "accuracy")
    best, one_seed, untrained = comparison["methods"]
    assert best["mean"] == 0.905
    assert best["interval"] == pytest.approx([0.905 - 0.0635, 0.905 + 0.0635], abs=1e-4)  # t of one degree: 12.7
    assert (best["seeds"], best["parameters"], best["seconds_per_step"]) == (2, 100, {"cpu": 2.0})
    low, high = one_seed["interval"]
    assert 0.84 < low < 0.895 < high < 0.94  # from the test rows
    assert (untrained["parameters"], untrained["seconds_per_step"]) == (0, {})


def test_numbers_of_rows_are_separate_comparisons_and_other_variants_are_left_out():
    results = [
        result("A", 180),
        result("B", 170, model="DePT"),
        *(result(f"{name}, shots 4", 120, block="few", model=name, **{"data.shots": 4}) for name in ("A", "B")),
        result("A, length 5", 150, block="length", **{"model.length": 5}),
        result("A", 100, block="again"),
    ]
    many, few = advice.summarize(results)
    assert [method["method"] for method in few["methods"]] == ["A", "B"]
    assert (many["rows"], few["rows"]) == (4800, 8)
    assert [(method["method"], method["mean"]) for method in many["methods"]] == [("A", 0.9), ("B", 0.85)]


def test_a_difference_that_is_within_the_spread_of_seeds_is_not_shown():
    unstable = [result("A", correct, seed) for seed, correct in enumerate((200, 100, 190, 110), 1)]
    stable = [result("B", 100, seed, model="DePT") for seed in range(1, 5)]
    (comparison,) = advice.summarize([*unstable, *stable])
    assert comparison["undecided"] == [["A", "B"]]
    (comparison,) = advice.summarize([unstable[2], stable[2]])  # with one seed, only the test rows are known
    assert comparison["undecided"] == []


def test_of_several_settings_of_a_run_the_last_one_counts():
    (comparison,) = advice.summarize([result("A", 20), result("B", 170, model="DePT"), result("A", 180)])
    assert [method["mean"] for method in comparison["methods"]] == [0.9, 0.85]
    assert [method["seeds"] for method in comparison["methods"]] == [1, 1]


def test_one_method_is_no_comparison_and_searches_are_not_results():
    search = {name: value for name, value in result("B", 100, model="DePT").items() if name != "test"}
    assert advice.summarize([result("A", 180), search]) == []


def test_options_that_differ_between_methods_are_part_of_them():
    template = {"data.template": "{passages}{soft}{target}"}
    (comparison,) = advice.summarize([result("A", 180, **template), result("B", 170, model="DePT")])
    assert comparison["methods"][0]["options"] == {"model": "PromptTuning", **template}
    assert comparison["methods"][1]["options"] == {"model": "DePT"}


def test_metrics_without_scores_of_rows_and_losses():
    results = [
        {**result("A", 0), "test": 2.0, "row_scores": [], "metric": "loss"},
        {**result("B", 0, model="DePT"), "test": 1.0, "row_scores": [], "metric": "loss"},
    ]
    (comparison,) = advice.summarize(results)
    assert [method["method"] for method in comparison["methods"]] == ["B", "A"]
    assert comparison["undecided"] == [["A", "B"]]
    assert comparison["methods"][0]["interval"] == []


def test_the_command_of_the_page_writes_the_advice(tmp_path, monkeypatch):
    before = advice.ADVICE.read_text()
    results = tmp_path / "results.jsonl"
    results.write_text("".join(f"{json.dumps(result(name, 180, model=name))}\n" for name in "AB"))
    words = ["tables.py", f"--results={results}", f"--out={tmp_path / 'evidence.md'}"]
    for added in ([], [f"--advice={tmp_path / 'advice.json'}"]):
        monkeypatch.setattr(sys, "argv", [*words, *added])
        tables.main()
    assert len(json.loads((tmp_path / "advice.json").read_text())) == 1
    assert advice.ADVICE.read_text() == before


def test_the_advice_of_the_package_is_that_of_the_results():
    results = [json.loads(line) for line in Path(advice.__file__).with_name("results.jsonl").read_text().splitlines()]
    message = "run python benchmarks/evidence/tables.py"
    assert json.loads(advice.ADVICE.read_text()) == advice.summarize(results), message
