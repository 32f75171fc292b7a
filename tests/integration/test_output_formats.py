"""Translation and JSON as tasks of generated text, with the options of their configs."""

import json

import pytest
from row_files import write_splits
from runs import read_metrics

from lightning_softprompt.cli.app import main
from lightning_softprompt.cli.commands.configs import configs_folder
from lightning_softprompt.runs.run_spec import last_folder

SMALL = ["--data.max_tokens=40", "--data.max_target_tokens=8", "--data.batch_size=2", "--run.wandb=disabled"]


@pytest.fixture
def run_test(tmp_path, monkeypatch, tiny_folder):
    """Returns a function that tests the bare tiny backbone on rows, and returns the metrics."""
    monkeypatch.chdir(tmp_path)

    def run_test(config, template, rows, *options):
        folder = write_splits(tmp_path / "data", test=rows)
        path = configs_folder() / "data" / f"{config}.yaml"
        arguments = [f"--data={path}", f"--data.path={folder}", f"--data.template={template}", *SMALL, *options]
        assert main(["test", "--model=NoPrompt", f"--backbone.name={tiny_folder('llama')}", *arguments]) in (0, None)
        return read_metrics(last_folder())["test"]

    return run_test


def test_a_translation_is_scored_by_bleu_and_chrf(run_test):
    rows = [
        {"source": "ein Hund", "translation": "a dog"},
        {"source": "gut", "translation": "good", "references": ["well"]},
    ]
    metrics = run_test("translation", "{soft}{source} : {target}", rows)
    for name in ("bleu", "chrf"):
        assert metrics[f"test/{name}_low"] <= metrics[f"test/{name}"] <= metrics[f"test/{name}_high"]
    assert "test/rougeL" not in metrics


def test_an_answer_is_checked_against_a_json_schema(run_test):
    rows = [
        {"text": "a dog", "facts": json.dumps({"name": "dog"})},
        {"text": "a film", "facts": json.dumps({"name": "film"})},
    ]
    metrics = run_test("e2e_json", "{soft}{text} : {target}", rows)
    assert metrics["test/valid_json"] == metrics["test/valid_schema"] == metrics["test/json_f1"] == 0
