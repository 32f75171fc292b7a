import json
import re

import pytest
import yaml
from scipy.stats import permutation_test

from lightning_softprompt.__main__ import main
from lightning_softprompt.evaluation.metrics.paired_tests import adjust_holm, sign_flip_test
from lightning_softprompt.reports import comparison, run_table
from lightning_softprompt.reports.comparison import (
    differing_settings,
    disagreeing_rows,
    load_runs,
    paired_differences,
)
from lightning_softprompt.reports.comparison_plots import cost_figures, curve_figures
from lightning_softprompt.reports.experiments import Comparison
from lightning_softprompt.reports.run_table import find_runs

ATTACK = "<script>alert(1)</script>\x1b[31m"
TARGETS = ["a", "b"] * 20


def write_tested_run(folder, predictions, method="PromptTuning", seed=1, length=5, minutes=1.0):
    """Writes a run with training, validation and test of 40 rows in one folder."""
    folder.mkdir(parents=True)
    config = {
        "seed_everything": seed,
        "model": {"class_path": f"x.{method}", "init_args": {"length": length, "lr": None}},
        "data": {"class_path": "x.ClassificationDataModule", "init_args": {"path": "rows"}},
        "backbone": {"name": "tiny"},
        "run": {"folder": str(folder)},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    correct = sum(prediction == target for prediction, target in zip(predictions, TARGETS, strict=True))
    report = {
        "best": {"metric": "val/accuracy", "value": 0.5},
        "test": {"test/accuracy": correct / len(TARGETS)},
        "global_step": 4,
        "seconds": 60 * minutes,
        "trainable_parameters": length,
    }
    (folder / "metrics.json").write_text(json.dumps(report))
    (folder / "metrics.csv").write_text("step,val/accuracy\n1,0.25\n2,\n3,0.5\n")
    records = [
        {"row": row, "input": f"{ATTACK} {row}", "prediction": prediction, "target": target}
        for row, (prediction, target) in enumerate(zip(predictions, TARGETS, strict=True))
    ]
    (folder / "test_predictions.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))


@pytest.fixture
def runs(tmp_path):
    half_right, all_right = ["a"] * 40, TARGETS
    write_tested_run(tmp_path / "runs" / "0", half_right, "NoPrompt", length=0)
    write_tested_run(tmp_path / "runs" / "1", all_right)
    write_tested_run(tmp_path / "runs" / "2", [*all_right[:-1], "a"], seed=2)
    write_tested_run(tmp_path / "runs" / "3", half_right, length=9)
    return tmp_path / "runs"


def test_differences_are_paired_by_row_and_adjusted_for_their_number(runs):
    baseline, *others = load_runs(find_runs(runs))
    scores = {run.folder: run.scores for run in others}
    better, nearly, equal = paired_differences(scores, baseline.scores)
    assert (better.name, better.mean, better.rows) == ("1", 0.5, 40)
    assert better.interval[0] > 0.3
    assert better.adjusted == pytest.approx(3 * better.p)
    assert nearly.mean == pytest.approx(0.475)
    assert (equal.mean, equal.interval, equal.adjusted) == (0.0, (0.0, 0.0), 1.0)


def test_a_test_on_other_rows_is_not_compared(runs):
    path = runs / "1" / "test_predictions.jsonl"
    path.write_text(path.read_text().replace(f'"row": {len(TARGETS) - 1},', '"row": 77,'))
    baseline, *others = load_runs(find_runs(runs))
    scores = {run.folder: run.scores for run in others}
    assert [difference.name for difference in paired_differences(scores, baseline.scores)] == ["2", "3"]


def test_settings_that_are_equal_in_all_runs_are_left_out(runs):
    assert differing_settings(load_runs(find_runs(runs))) == {
        "seed_everything": [1, 1, 2, 1],
        "model": ["NoPrompt", "PromptTuning", "PromptTuning", "PromptTuning"],
        "model.length": [0, 5, 5, 9],
    }


def test_runs_that_differ_in_their_seeds_are_one_experiment(runs):
    comparison = Comparison(load_runs(find_runs(runs)))
    repeated, *single = comparison.experiments
    assert (repeated.name, [run.folder for run in repeated.runs]) == ("PromptTuning, length=5", ["1", "2"])
    assert repeated.mean == pytest.approx((1.0 + 0.975) / 2)
    assert repeated.half_width > 0
    assert [experiment.name for experiment in single] == ["NoPrompt", "PromptTuning, length=9"]
    scores = repeated.scores.values()
    assert sorted(set(scores)) == [0.5, 1.0]
    assert sum(scores) / len(scores) == pytest.approx(repeated.mean)
    names = {"1": "PromptTuning, length=5, seed 1", "2": "PromptTuning, length=5, seed 2"}
    assert comparison.names == {**names, "0": "NoPrompt", "3": "PromptTuning, length=9"}


def test_repetitions_with_one_seed_are_named_by_their_folders(runs):
    write_tested_run(runs / "4", TARGETS)
    comparison = Comparison(load_runs(find_runs(runs)))
    expected = ["PromptTuning, length=5, 1", "PromptTuning, length=5, 2", "PromptTuning, length=5, 4"]
    assert [comparison.names[folder] for folder in "124"] == expected


def test_an_experiment_on_several_data_sets_names_the_data_and_not_all_their_settings(runs):
    config = yaml.safe_load((runs / "3" / "config.yaml").read_text())
    config["data"]["init_args"] = {"path": "other", **{f"option_{i}": i for i in range(9)}}
    (runs / "3" / "config.yaml").write_text(yaml.safe_dump(config))
    names = [experiment.name for experiment in Comparison(load_runs(find_runs(runs))).experiments]
    assert names == ["PromptTuning on rows", "NoPrompt on rows", "PromptTuning on other"]


def test_rows_with_equal_predictions_of_all_runs_are_omitted(runs):
    rows = disagreeing_rows(load_runs(find_runs(runs)), limit=3)
    assert [record["row"] for record, _ in rows] == [1, 3, 5]
    assert rows[0][1] == ["a", "b", "b", "a"]


def test_runs_with_the_same_name_are_distinguished_by_their_folders(runs, tmp_path):
    write_tested_run(tmp_path / "other" / "1", TARGETS)
    names = [run.folder for run in load_runs([*find_runs(runs), *find_runs(tmp_path / "other")])]
    assert names == ["0", "runs/1", "2", "3", "other/1"]


def test_the_page_needs_no_other_file_and_shows_no_markup_of_rows(runs, tmp_path, capsys):
    path = tmp_path / "report.html"
    assert main(["report", str(runs), "--out", str(path)]) == 0
    assert "4 runs, baseline NoPrompt" in capsys.readouterr().out
    page = path.read_text()
    assert "<script" not in page
    assert "\x1b" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    for target in re.findall(r"href=\"#([^\"]*)\"", page):
        assert page.count(f'id="{target}"') == 1
    for title in (
        "Runs",
        "Experiments",
        "Paired differences",
        "Learning curves",
        "Score and cost",
        "Settings that differ",
    ):
        assert f">{title}</h2>" in page
    assert page.count("<img ") == 2


def test_a_report_reads_the_predictions_of_a_test_once_and_shows_the_interval(runs, tmp_path, monkeypatch):
    paths = []
    read = comparison.read_predictions
    for module in (comparison, run_table):
        monkeypatch.setattr(module, "read_predictions", lambda path: paths.append(path) or read(path))
    path = tmp_path / "report.html"
    assert main(["report", str(runs), "--out", str(path)]) == 0
    assert sorted(paths) == sorted(runs.glob("*/test_predictions.jsonl"))
    for run in find_runs(runs):
        assert run.test.interval is not None
        assert str(run.test) in path.read_text()


def test_a_report_accepts_a_baseline_and_requires_runs(runs, tmp_path, capsys):
    out = ["--out", str(tmp_path / "report.html")]
    assert main(["report", str(runs), "--baseline", str(runs / "3"), *out]) == 0
    assert "baseline PromptTuning, length=9" in capsys.readouterr().out
    for wrong, message in (
        ([str(runs), "--baseline", str(tmp_path)], "is not one of the runs"),
        ([str(tmp_path / "missing")], "no folder"),
        ([str(tmp_path / "runs" / "0" / "plots")], "no folder"),
        ([str(runs), "--examples", "-1"], "--examples must be at least 0"),
    ):
        assert main(["report", *wrong, *out]) == 2
        assert message in capsys.readouterr().err


def test_the_sign_flip_test_agrees_with_scipy():
    differences = [0.5, -0.25, 0.75, 0.0, 0.1, 0.2, -0.1]
    exact = permutation_test(
        (differences,), lambda values, axis: values.sum(axis=axis), permutation_type="samples", vectorized=True
    ).pvalue
    assert sign_flip_test(differences) == pytest.approx(exact, abs=0.015)


def test_holm_adjusts_as_its_step_down_procedure_rejects():
    p_values = [0.001, 0.04, 0.03, 0.013]
    adjusted = adjust_holm(p_values)
    for level in (0.01, 0.05, 0.1):
        rejected = set()
        for rank, p in enumerate(sorted(p_values)):
            if p * (len(p_values) - rank) > level:
                break
            rejected.add(p)
        assert {p for p, value in zip(p_values, adjusted, strict=True) if value <= level} == rejected


def test_a_page_of_many_runs_names_methods_in_plots_and_limits_the_columns_of_predictions(tmp_path):
    for number in range(24):
        predictions = ["a" if row % (number + 2) else "b" for row in range(40)]
        write_tested_run(tmp_path / "runs" / f"{number:02}", predictions, length=number // 2, seed=number % 2)
    path = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "runs"), "--out", str(path)]) == 0
    page = path.read_text()
    assert "Comparison of 24 runs" in page
    assert "8 of the 24 tested runs answer differently" in page
    comparison = Comparison(load_runs(find_runs(tmp_path / "runs")))
    (_, curves), (_, cost) = next(curve_figures(comparison)), next(cost_figures(comparison))
    for figure in (curves, cost):
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["PromptTuning"]
    assert len(curves.axes[0].lines) == 24
    assert list(curves.axes[0].lines[0].get_xdata()) == [2, 4]  # steps are logged from 0


def test_few_runs_with_many_settings_are_columns(runs, tmp_path):
    config = yaml.safe_load((runs / "3" / "config.yaml").read_text())
    config["trainer"] = {f"option_{i}": i for i in range(9)}
    (runs / "3" / "config.yaml").write_text(yaml.safe_dump(config))
    path = tmp_path / "report.html"
    assert main(["report", str(runs), "--out", str(path)]) == 0
    page = path.read_text()
    assert "<th>setting</th><th>PromptTuning" in page
    assert '<td class="short" dir="auto">trainer.option_8</td>' in page


def test_predictions_are_side_by_side_for_each_data_set(runs, tmp_path):
    for name in ("2", "3"):
        config = yaml.safe_load((runs / name / "config.yaml").read_text())
        config["data"]["init_args"]["path"] = "other"
        (runs / name / "config.yaml").write_text(yaml.safe_dump(config))
    path = tmp_path / "report.html"
    assert main(["report", str(runs), "--out", str(path), "--examples", "3"]) == 0
    section = path.read_text().partition(">Predictions side by side</h2>")[2]
    heads = re.findall(r"<thead><tr>(.*?)</tr>", section)
    columns = [
        "<th>row</th><th>input</th><th>target</th>",
        *(f"<th>{run}</th>" for run in ("PromptTuning on rows", "NoPrompt on rows")),
    ]
    assert heads[0] == "".join(columns)
    assert len(heads) == 2
    assert section.count("b ✓") == 6
    assert "The first 3 test rows of other" in section


def test_a_run_without_a_test_is_not_counted_in_the_mean_of_its_experiment(runs, tmp_path):
    report = json.loads((runs / "2" / "metrics.json").read_text())
    del report["test"]
    (runs / "2" / "metrics.json").write_text(json.dumps(report))
    path = tmp_path / "report.html"
    assert main(["report", str(runs), "--out", str(path)]) == 0
    assert ">1 of 2 tested</td>" in path.read_text()
    (repeated,) = (each for each in Comparison(load_runs(find_runs(runs))).experiments if len(each.runs) == 2)
    assert repeated.mean == 1.0
