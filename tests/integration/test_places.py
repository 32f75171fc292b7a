"""Folders that are not writable, full or used by another run cause an error of two lines, and nothing is lost."""

import json
import os
import resource
import sys
from pathlib import Path

import pytest
from row_files import write_rows

from lightning_softprompt.cli.app import main
from lightning_softprompt.runs import run_spec

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import killing


@pytest.fixture
def argv(tmp_path, rows, tiny_folder):
    write_rows(tmp_path / "train.jsonl", rows * 2)
    return [
        "fit", "--model=PromptTuning", "--model.length=3", "--data=ClassificationDataModule",
        f"--data.train={tmp_path / 'train.jsonl'}", f"--data.validation={tmp_path / 'train.jsonl'}",
        "--data.template={soft}{text} it is{target}", "--data.cache=false", "--data.batch_size=4",
        '--data.labels={"negative": "bad", "neutral": "one", "positive": "good"}', "--run.wandb=disabled",
        f"--backbone.name={tiny_folder('llama')}", f"--run.folder={tmp_path / 'runs'}", "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--ckpt_path=last",
    ]  # fmt: skip


def list_files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_run_folder_that_cannot_be_created_is_named(argv, tmp_path, capsys):
    (tmp_path / "runs").write_text("a file")
    assert main(argv) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 2
    assert str(tmp_path / "runs") in error[0]


@pytest.mark.parametrize("limit", [3000, 8000])
def test_a_full_disk_ends_a_run_and_the_same_command_resumes(argv, tmp_path, monkeypatch, limit):
    log = tmp_path / "log.txt"

    def run_with_limit(words):
        # A file above the limit causes an error like that of a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return main(words)

    with monkeypatch.context() as patched:
        patched.setattr(killing, "main", run_with_limit)
        (code,) = killing.wait_for_exit([killing.start(argv, log)])
    assert code == 2, log.read_text()
    assert "File too large" in log.read_text()
    assert not any(name.endswith((".ckpt", ".safetensors", ".part")) for name in list_files(tmp_path / "runs"))
    assert main(argv) == 0
    (folder,) = (path.parent for path in tmp_path.rglob("prompt.safetensors"))
    assert not any(".part" in name for name in list_files(folder))


def test_two_runs_do_not_write_to_one_folder(argv, tmp_path, capsys):
    """A name is available again after its run is killed, also if data workers still exist."""
    named = [*argv, "--run.name=one", "--data.num_workers=1"]
    read_end, write_end = os.pipe()
    holder = os.fork()
    if not holder:
        try:
            run_spec.lock_run_folder(make_folder(tmp_path / "runs" / "default" / "one"))
            os.write(write_end, b"!")
            os.read(os.pipe()[0], 1)  # until it is killed
        finally:
            os._exit(1)
    assert os.read(read_end, 1) == b"!"
    assert main(named) == 2
    error = capsys.readouterr().err
    assert "another run is writing to" in error
    assert "another --run.name" in error
    os.kill(holder, 9)
    os.waitpid(holder, 0)
    assert main(named) == 0
    assert (tmp_path / "runs" / "default" / "one" / "prompt.safetensors").is_file()


def make_folder(folder):
    folder.mkdir(parents=True)
    return folder


def test_rows_of_one_class_only_are_trained_on_and_scored(argv, tmp_path):
    """No metric is divided by the zero rows of a class."""
    (tmp_path / "train.jsonl").write_text('{"text": "dull", "label": "negative"}\n' * 6)
    assert main(argv) == 0
    (metrics,) = (json.loads(path.read_text())["val"] for path in tmp_path.rglob("metrics.json"))
    assert all(isinstance(value, float) for value in metrics.values())
