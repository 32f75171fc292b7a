import json

import pytest
import yaml

from lightning_softprompt.__main__ import main
from lightning_softprompt.evaluation.metrics.intervals import share_interval
from lightning_softprompt.reports.run_table import Score, find_runs

METHOD = "lightning_softprompt.methods.PromptTuning"
DATA = "lightning_softprompt.data.classification.ClassificationDataModule"
COMMIT = "0123456789abcdef-dirty"
CHECKPOINT = "../01/checkpoints/best.ckpt"  # of the trained run, from the folder of its test


def write_run(folder, report, source=None, predictions=(), method=METHOD, data=None):
    """Writes the files of a run that are read."""
    folder.mkdir(parents=True)
    config = {
        "model": {"class_path": method, "init_args": {}},
        "data": {"class_path": DATA, "init_args": data or {"path": "/rows/sst2"}},
        "backbone": {"name": "models/tiny"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.json").write_text(json.dumps(report))
    record = {"started": f"2026-01-01 {folder.name}", "commit": COMMIT, "source": source or ""}
    (folder / "run.json").write_text(json.dumps(record))
    if predictions:
        lines = [json.dumps(record) for record in predictions]
        (folder / "test_predictions.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def runs(tmp_path):
    training = {
        "best": {"metric": "val/accuracy", "value": 0.75, "global_step": 8},
        "global_step": 10,
        "seconds": 90.0,
        "trainable_parameters": 1234,
    }
    folder = write_run(tmp_path / "runs" / "a" / "01", training)
    (folder / "wandb" / "files").mkdir(parents=True)
    (folder / "wandb" / "files" / "config.yaml").write_text("[]")
    right, wrong = {"prediction": "x", "target": "x"}, {"prediction": "x", "target": "y"}
    test = {"test": {"test/loss": 0.5, "test/accuracy": 0.75}}
    write_run(tmp_path / "runs" / "a" / "02", test, source=CHECKPOINT, predictions=[right, right, right, wrong])
    answers = [{"scores": {"f1": score}} for score in (0.25, 0.5, 1.0)]
    untrained = {"test": {"test/f1": 1.75 / 3}}
    write_run(
        tmp_path / "runs" / "b" / "03", untrained, predictions=answers, method="x.NoPrompt", data={"tasks": {"q": 1}}
    )
    return tmp_path / "runs"


def test_a_run_has_the_scores_of_its_files_and_the_test_of_its_checkpoint(runs):
    trained, untrained = find_runs(runs)
    assert (trained.method, trained.data, trained.backbone) == ("PromptTuning", "sst2", "models/tiny")
    assert (trained.trainable_parameters, trained.steps, trained.minutes) == (1234, 10, 1.5)
    assert trained.validation == Score("accuracy", 0.75)
    assert trained.test == Score("accuracy", 0.75, share_interval(0.75, 4))
    assert (untrained.method, untrained.data, untrained.steps) == ("NoPrompt", "q", None)
    low, high = untrained.test.interval
    assert 0.25 <= low < untrained.test.value < high <= 1.0


def test_the_interval_is_the_one_that_the_test_computed(tmp_path):
    metrics = {"test/f1": 0.5, "test/f1_low": 0.125, "test/f1_high": 0.75}
    records = [{"scores": {"f1": score}} for score in (0.25, 0.75)]
    write_run(tmp_path / "01", {"test": metrics}, predictions=records)
    assert [run.test for run in find_runs(tmp_path)] == [Score("f1", 0.5, (0.125, 0.75))]


def test_a_run_has_the_last_test_on_its_own_data(runs):
    later = write_run(runs / "a" / "04", {"test": {"test/accuracy": 0.5}}, source=CHECKPOINT)
    other = write_run(runs / "a" / "05", {"test": {"test/accuracy": 0.1}}, CHECKPOINT, data={"path": "/rows/other"})
    write_run(runs / "a" / "06", {"val": {"val/accuracy": 0.2}}, source=CHECKPOINT)
    trained, on_other, _ = find_runs(runs)
    assert (trained.test, trained.test_folder) == (Score("accuracy", 0.5), later)
    assert (on_other.folder, on_other.test) == (other, Score("accuracy", 0.1))
    assert on_other.source == runs / "a" / "01" / "checkpoints" / "best.ckpt"


def test_runs_can_be_moved_together(runs, tmp_path):
    moved = runs.rename(tmp_path / "moved")
    trained, _ = find_runs(moved)
    assert trained.test_folder == moved / "a" / "02"


def test_a_metric_that_is_no_mean_over_rows_has_no_interval(tmp_path):
    records = [{"prediction": "x", "target": "x", "scores": {"f1": 0.5}}] * 4
    write_run(tmp_path / "01", {"test": {"test/f1": 0.9}}, predictions=records)
    write_run(tmp_path / "02", {"test": {"test/macro_f1": 0.9}}, predictions=records)
    assert [run.test for run in find_runs(tmp_path)] == [Score("f1", 0.9), Score("macro_f1", 0.9)]


def test_runs_are_listed_sorted_and_filtered(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["runs", str(runs), "--sort", "test"]) == 0
    _, _, first, second = capsys.readouterr().out.splitlines()
    assert first.split()[:6] == ["a/01", "PromptTuning", "sst2", "tiny", "1,234", "10"]
    assert "accuracy 0.75 [0.3006, 0.9544]" in first
    assert second.split()[:2] == ["b/03", "NoPrompt"]
    assert main(["runs", str(runs / "b" / "03")]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[:2] == ["03", "NoPrompt"]
    assert main(["runs", str(runs), "--filter", "method=PROMPTTUNING", "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert run["validation"]["value"] == 0.75
    assert main(["runs", str(runs), "--filter", "data=other"]) == 0
    assert "none of the 2 runs matches data=other" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "no folder missing"),
        (["--filter", "name=x"], "--filter must be COLUMN=TEXT with one of the columns run, method"),
    ],
)
def test_wrong_arguments_are_refused(runs, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(runs.parent)
    assert main(["runs", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_a_damaged_file_is_named(runs, content, capsys):
    (runs / "b" / "03" / "metrics.json").write_text(content)
    assert main(["runs", str(runs)]) == 2
    assert "03/metrics.json" in capsys.readouterr().err


def test_the_table_shows_the_commit_of_a_run_in_short(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    assert main(["runs", str(runs)]) == 0
    assert "0123456-dirty" in capsys.readouterr().out
    assert main(["runs", str(runs), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["commit"] == COMMIT


def test_the_likelihood_of_documents_is_listed_by_bits_per_byte(tmp_path):
    metrics = {
        "loss": 3.0,
        "perplexity": 20.0,
        "bits_per_byte": 1.2,
        "bits_per_byte_low": 1.1,
        "bits_per_byte_high": 1.3,
    }
    write_run(tmp_path / "01", {"test": {f"test/{name}": value for name, value in metrics.items()}})
    (run,) = find_runs(tmp_path)
    assert (run.test.metric, run.test.value, run.test.interval) == ("bits_per_byte", 1.2, (1.1, 1.3))
