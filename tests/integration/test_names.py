"""Names from data are printed and written without effect as terminal control characters or markup."""

import csv
import json

import pytest
from row_files import read_rows, write_rows

from lightning_softprompt.cli.app import main
from lightning_softprompt.runs.run_spec import last_folder
from lightning_softprompt.system.printable import HIDDEN

ESCAPES = "\x1b[2J\u202e"
NAMES = [f"bad{ESCAPES}", "[/red] $x_$ :dog:", "<b>good</b>\nok"]


@pytest.fixture
def common(tmp_path, tiny_folder):
    rows = [{"text": "a warm film", "label": name} for name in NAMES * 2]
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / f"{split}.jsonl", rows)
    words = dict(zip(NAMES, ("bad", "one", "good"), strict=True))
    return [
        f"--backbone.name={tiny_folder('llama')}",
        "--data=ClassificationDataModule",
        f"--data.path={tmp_path}",
        "--data.template={soft}{text} it is{target}",
        f"--data.labels={json.dumps(words)}",
        "--data.batch_size=2",
        "--trainer.accelerator=cpu",
        f"--run.folder={tmp_path / 'runs'}",
        "--run.wandb=disabled",
    ]


def test_names_of_classes_are_printable_wherever_metrics_are_named(common, capfd, caplog):
    method = ["--model=PromptTuning", "--model.length=2"]
    assert main(["fit", *method, *common, "--trainer.max_steps=2", "--trainer.val_check_interval=1"]) == 0
    fitted = last_folder()
    assert main(["test", *common, f"--init_from={fitted / 'prompt.safetensors'}", *method]) == 0
    printed = capfd.readouterr()
    assert not HIDDEN.search(printed.out + printed.err)
    lines = caplog.text.rpartition("Test, ")[2].splitlines()
    first_cells = [line.split("  ")[0].replace(" ", "") for line in lines]
    assert {"[/red]$x_$:dog:", "bad\\u001b[2J\\u202e", "<b>good</b>\\nok"} <= set(first_cells)
    with (fitted / "metrics.csv").open(newline="") as file:
        columns = next(csv.reader(file))
    assert "val/f1/bad\\u001b[2J\\u202e" in columns
    assert not any(HIDDEN.search(name) or "\n" in name for name in columns)
    assert (last_folder() / "plots" / "test_confusion.png").is_file()
    records = read_rows(last_folder() / "test_predictions.jsonl")
    assert {record["target"] for record in records} == set(NAMES)  # records contain the original names
