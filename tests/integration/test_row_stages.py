"""Studies with stages that write, filter and predict rows."""

import json
import signal
import sys
from pathlib import Path

import pytest
import yaml
from row_files import read_rows, write_rows

from lightning_softprompt.__main__ import main
from lightning_softprompt.checkpoints.prompt_file import read_prompt
from lightning_softprompt.studies.study import Study

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import killing

LABELS = {"negative": "bad", "positive": "good"}


@pytest.fixture
def settings(tmp_path, tiny_folder, rows):
    test = write_rows(tmp_path / "test.jsonl", [row for row in rows if row["label"] != "neutral"])
    template = "{soft}{text} it is {target}"
    arguments = {"labels": LABELS, "template": template, "batch_size": 4, "cache": False, "test": str(test)}
    arguments |= {"validation": str(test), "predict": str(test)}
    write = {"writer": "LabelText", "writer.labels": LABELS, "writer.instruction": "a {label} film"}
    write |= {"frame": "{instruction} it was {target}", "count": 12, "batch_size": 5, "max_tokens": 40}
    write |= {"decoding.max_new_tokens": 4}
    common = {
        "backbone.name": str(tiny_folder("llama")),
        "model": "PromptTuning",
        "model.length": 2,
        "data": {"class_path": "ClassificationDataModule", "init_args": arguments},
        "trainer": {"accelerator": "cpu", "max_steps": 2, "enable_progress_bar": False, "log_every_n_steps": 1},
        "run.wandb": "disabled",
    }
    stages = {
        "write": {"command": "write", **write},
        "clean": {"command": "filter", "rows": "${write}/rows.jsonl", "filters": ["Duplicates", "Balance"]},
        "fit": {"data.train": "${clean}/rows.jsonl"},
        "label": {"command": "predict", "data.train": "${clean}/rows.jsonl", "init_from": "${fit}/prompt.safetensors"},
    }
    return {"common": common, "stages": stages}


@pytest.fixture
def run_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run_study(settings, name, *options):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        code = main(["study", str(path), *options])
        return code, tmp_path / "studies" / name

    return run_study


def read_files(folder):
    """The files of each stage that depend on the results alone."""
    names = ("write/rows.jsonl", "clean/rows.jsonl", "clean/rows.dropped.jsonl", "clean.json")
    files = {name: (folder / "all" / name).read_bytes() for name in names}
    tensors = read_prompt(folder / "all" / "fit" / "prompt.safetensors").tensors
    files["prompt"] = {name: tensor.tolist() for name, tensor in tensors.items()}
    records = read_rows(folder / "all" / "label" / "predictions.jsonl")
    files["label"] = [(record["prediction"], record["scores"]) for record in records]
    files["test"] = json.loads((folder / "all" / "fit.test.json").read_text())["metrics"]["test/accuracy"]
    return files


KILLS = {  # by the stage that is interrupted
    "write": killing.Kill("within written rows", 2),
    "clean": killing.Kill("within the files of filtered rows", 2),
    "fit": killing.Kill("within a checkpoint", 1),
    "fit.test": killing.Kill("end of a test", 1),
    "label": killing.Kill("after rows are predicted", 1),
}


def test_a_study_killed_in_each_stage_gives_the_same_files(settings, run_study, tmp_path):
    code, reference = run_study(settings, "reference")
    assert code == 0
    assert 2 <= len(read_rows(reference / "all" / "clean" / "rows.jsonl")) <= 12
    argv = ["study", str(tmp_path / "killed.yaml")]
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    folder, log = tmp_path / "studies" / "killed", tmp_path / "log.txt"
    for stage, kill in KILLS.items():
        (code,) = killing.wait_for_exit([killing.start(argv, log, kill)])
        assert code == -signal.SIGKILL, log.read_text()
        record = json.loads((folder / "all" / f"{stage}.json").read_text())
        assert record["metrics"] is None, f"the kill is not in the stage {stage}"
    assert run_study(settings, "killed")[0] == 0
    assert read_files(folder) == read_files(reference)


def test_rows_are_written_once_for_all_variants_that_do_not_change_them(settings, run_study, capsys):
    stages = {name: settings["stages"][name] for name in ("write", "clean", "fit")}
    compare = [
        {"data.train": "${write}/rows.jsonl"},
        {"data.train": "${clean}/rows.jsonl", "clean/filters": ["Balance"]},
    ]
    stages["fit"] = {}
    study = {"common": settings["common"], "stages": stages, "compare": compare, "repeat": {"seed_everything": [1, 2]}}
    assert run_study(study, "shared", "--show")[0] == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [line.split()[-3] for line in lines if line.endswith("to do")]
    assert sorted(commands) == ["filter", "filter", *["fit"] * 4, *["test"] * 4, "write"]
    assert sum("clean.filters=" in line and "/clean" in line for line in lines) == 1


def study_of(stages, **options):
    return Study(folder=None, stages=stages, **options)


@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        ({"a": {"command": "wrte"}}, {}, "has the command 'wrte'; known are"),
        ({"a": {"command": "filter", "rows": "${b}/x"}, "b": {}}, {}, "refers to"),
        ({"a": {}}, {"compare": [{"data.train": "${b}/rows.jsonl"}]}, "refers to"),
        ({"a": {}}, {"compare": [{"write/count": 3}]}, "options of"),
    ],
)
def test_wrong_stages_are_refused(stages, options, message):
    with pytest.raises(ValueError, match=message):
        study_of(stages, **options)
