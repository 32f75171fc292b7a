"""A study that extends the vocabulary, continues pre-training, merges, and tunes a prompt on the merged backbone."""

import json
import signal
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
import yaml
from row_files import write_rows

from lightning_softprompt.__main__ import main
from lightning_softprompt.checkpoints.prompt_file import read_prompt
from lightning_softprompt.studies.study import Study

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from killing import Kill, start, wait_for_exit

NEW = ("angioplasty", "cardiology")
DOCUMENTS = [f"a film about {word} is {end}" for word in NEW for end in ("good", "sad")]
LABELS = {"negative": "bad", "positive": "good"}


@pytest.fixture
def settings(tmp_path, monkeypatch, tiny_folder, rows):
    monkeypatch.chdir(tmp_path)
    base = str(tiny_folder("llama"))
    Path("corpus.txt").write_text("\n\n".join(DOCUMENTS))
    labelled = write_rows(tmp_path / "rows.jsonl", [row for row in rows if row["label"] != "neutral"])
    splits = {f"data.{split}": str(labelled) for split in ("train", "validation", "test")}
    trainer = {"accelerator": "cpu", "max_steps": 2, "enable_progress_bar": False, "logger": False}
    stages = {
        "terms": {"command": "vocabulary", "corpus": ["corpus.txt"], "base": base, "min-count": 1, "min-documents": 1},
        "adapt": {
            "backbone.name": base,
            "backbone.vocabulary": "${terms}",
            "model": "NewTokens",
            "data": "CorpusDataModule",
            "data.path": "corpus.txt",
            "data.validation_share": 0.5,
            "data.test": "corpus.txt",
        },
        "merged": {"command": "merge", "prompt": "${adapt}/prompt.safetensors"},
        "run": {
            "model": "PromptTuning",
            "model.length": 2,
            "data": "ClassificationDataModule",
            "data.labels": LABELS,
            "data.template": "{soft}{text} it is {target}",
            **splits,
        },
    }
    return {
        "common": {"trainer": trainer, "data.batch_size": 2, "data.cache": False, "run.wandb": "disabled"},
        "stages": stages,
        "compare": [{"run/backbone.name": base}, {"run/backbone.name": "${merged}"}],
        "tests": {"documents": {"stages": ["adapt"]}, "texts": {"stages": ["run"]}},
    }


def read_results(study):
    """Returns the last prompt and the metrics of all tests."""
    (prompt,) = study.glob("run.backbone.name=_merged_*/run/prompt.safetensors")
    metrics = {path.parent.name: json.loads(path.read_text())["metrics"] for path in study.glob("*/*.*.json")}
    return read_prompt(prompt).tensors["tokens"], metrics


@pytest.mark.timeout(300)
def test_a_chain_has_the_same_results_after_kills(settings, tmp_path, capsys):
    """SIGKILL before and after a file or a folder has its name, and within a checkpoint."""
    for name in ("reference", "killed"):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    assert main(["study", "reference.yaml", "--show"]) == 0
    commands = [line.split()[-3] for line in capsys.readouterr().out.splitlines() if line.endswith("to do")]
    shared = ["vocabulary", "fit", "test", "merge"]  # by both lines of the table
    assert sorted(commands) == sorted([*shared, *["fit", "test"] * 2])
    assert main(["study", "reference.yaml"]) == 0
    places = ("before a file has its name", "after a file has its name", "within a checkpoint")
    for kills in count():
        kill = Kill(places[kills % len(places)], 2 + 3 * kills)
        (code,) = wait_for_exit([start(["study", "killed.yaml"], tmp_path / "output.txt", kill)])
        if code == 0:
            break
        assert code == -signal.SIGKILL, (tmp_path / "output.txt").read_text()
    assert kills >= 4
    tokens, metrics = read_results(Path("studies/reference"))
    tokens_after_kills, metrics_after_kills = read_results(Path("studies/killed"))
    assert torch.equal(tokens, tokens_after_kills)
    assert metrics == metrics_after_kills


def test_wrong_tested_stages_are_refused():
    stages = {"merged": {"command": "merge", "prompt": "x"}, "run": {}}
    with pytest.raises(ValueError, match=r"trained stages, which are \['run'\], got \['merged'\]"):
        Study(folder=None, stages=stages, tests={"texts": {"stages": ["merged"]}})
