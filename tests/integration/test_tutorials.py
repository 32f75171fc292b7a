"""The tutorials run as printed, with fewer steps."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from row_files import read_rows
from runs import read_metrics

from lightning_softprompt.__main__ import main
from lightning_softprompt.runs.run_spec import last_folder

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
TICKETS = [("I was charged twice", "billing"), ("I cannot log in", "account"), ("The parcel is late", "delivery")]
SHORT = ["--trainer.max_steps=2", "--trainer.check_val_every_n_epoch=1", "--trainer.log_every_n_steps=1"]
SHORT += ["--run.wandb=disabled"]
TRAINING = ("fit", "test", "predict")


def read_page(name):
    return (TUTORIALS / f"{name}.md").read_text()


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def save_files(page, folder):
    """Saves each block of text or YAML under the name that the sentence before it gives: "Save this as `NAME`:"."""
    pattern = r"Save this as `([^`]+)`[^\n]*\n\n```\w+\n(.*?)```"
    for name, content in re.findall(pattern, page, flags=re.DOTALL):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def commands(page):
    """The commands of a page as lists of words, without the name of the program."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    programs = r"^(softprompt|python -m lightning_softprompt) "
    return [shlex.split(re.sub(programs, "", line)) for line in lines if re.match(programs, line)]


def run_commands(page, *options):
    """Runs the commands of a page in order; TIME-ID is the folder of the latest run of an experiment.

    Returns:
        The folders of the runs, in order.
    """
    folders, runs = [], {}
    for words in commands(page):
        words = [re.sub(r"runs/([\w-]+)/TIME-ID", lambda match: str(runs[match[1]]), word) for word in words]
        is_training = words[0] in TRAINING
        assert main([*words, *(options if is_training else ())]) in (0, None)
        if is_training:
            runs[last_folder().parent.name] = last_folder()
            folders.append(last_folder())
    return folders


def read_metrics(folder):
    return read_metrics(folder)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder that is the current one, from which modules can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_a_new_method_trains_and_its_prompt_is_saved_and_loaded(folder):
    page = read_page("new_method")
    save_files(page, folder)
    (folder / "tickets.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in TICKETS * 4))
    names = {}
    for block in blocks(page, "python")[1:]:  # the first block is the file
        exec(re.sub(r"max_steps=\d+", "max_steps=2", block), names)
    trained = [parameter for parameter in names["model"].parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == 10 + 576
    assert names["prompt"].method.direction.abs().max() > 0
    fit, predict = run_commands(page, *SHORT)
    assert "shifted_text.ShiftedText" in (fit / "config.yaml").read_text()
    records = read_rows(predict / "predictions.jsonl")
    assert {record["prediction"] for record in records} <= {"billing", "account", "delivery"}
    assert len(records) == 12
    sys.modules.pop("shifted_text")


@pytest.mark.slow
def test_a_study_compares_methods_over_seeds(folder, capsys, tiny_folder):
    page = read_page("compare_methods")
    save_files(page, folder)
    show, run, zero_shot = commands(page)
    assert main(show) == 0
    assert capsys.readouterr().out.count("to do") == 18
    labels = "{billing: good, account: bad, delivery: long, product: dull}"  # words of the tiny backbone
    options = [f"--backbone.name={tiny_folder('llama')}", f"--data.labels={labels}"]
    study = (folder / "compare.yaml").read_text()
    shorter = {"[1, 2, 3]": "[1, 2]", "max_steps: 60, val_check_interval: 20": "max_steps: 1, val_check_interval: 1"}
    smaller = {"  - {model: PTuningV2}\n": "", "model.length: 20": "model.length: 12"}
    for old, new in (shorter | smaller).items():
        assert old in study
        study = study.replace(old, new)
    (folder / "compare.yaml").write_text(study)
    assert main([*run, *options]) == 0
    rows = json.loads((folder / "studies" / "compare" / "results.json").read_text())
    accuracies = {row["compare"]["model"]: row for row in rows if row["metric"] == "accuracy"}
    assert list(accuracies) == ["PromptTuning", "DPT"]
    assert all(len(row["values"]) == 2 and row["interval"] >= 0 for row in accuracies.values())
    assert "±" in capsys.readouterr().out
    assert main([*zero_shot, *options, "--run.wandb=disabled"]) == 0
