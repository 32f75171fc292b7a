"""What a training, a test and a prediction print for their user."""

import csv
import io
import logging
import re

import pytest
from rich.console import Console
from row_files import write_rows, write_splits

from lightning_softprompt.callbacks.reporting.progress_bar import StepProgressBar
from lightning_softprompt.cli.app import main
from lightning_softprompt.reports.run_table import find_runs
from lightning_softprompt.runs.run_spec import last_folder


@pytest.fixture
def argv(tmp_path, tiny_folder):
    """Options of a run on 16 rows in batches of 4."""
    rows = [{"text": f"a {word} film {i}", "label": word} for i in range(8) for word in ("good", "bad")]
    write_splits(tmp_path, train=rows, validation=rows[:6], test=rows)
    return [
        "--model=PromptTuning", "--model.length=3", "--data=ClassificationDataModule", f"--data.path={tmp_path}",
        "--data.template={soft}{text} it is {target}", "--data.batch_size=4", "--run.wandb=disabled",
        f"--backbone.name={tiny_folder('llama')}", f"--run.folder={tmp_path / 'runs'}", "--trainer.accelerator=cpu",
    ]  # fmt: skip


CONSOLE_USERS = (
    "lightning.pytorch.callbacks.progress.rich_progress",
    "lightning_softprompt.callbacks.reporting.progress_bar",
)
QUIET = "--trainer.enable_progress_bar=false"


def test_a_training_prints_its_data_length_and_best_validation(argv, caplog):
    caplog.set_level(logging.INFO, "lightning_softprompt")
    assert main(["fit", *argv, QUIET, "--trainer.max_steps=12", "--trainer.accumulate_grad_batches=1"]) == 0
    text = caplog.text
    assert "Data: 16 train and 6 validation rows; good 50%, bad 50%" in text
    assert re.search(r"Tokens per training row: median \d+, 95 % up to \d+, maximum \d+; 0.0% truncated", text)
    assert "Training: 12 steps, 3 epochs, AdamW, learning rate 0.005" in text
    assert re.search(r"Time left: .+ \(\S+ s per step\), with 2 more validations of .* s\n", text)
    assert text.count("Execution path") == 1
    assert re.search(r"Best validation \(val/accuracy\), step \d+ of 12, 6 rows\naccuracy +[01]\.\d{4}", text)
    assert len(re.findall(r"^    prediction: ", text, re.MULTILINE)) == 5
    correct = ["(correct)" in line for line in text.splitlines() if line.startswith("    prediction: ")]
    assert correct == sorted(correct)  # wrong predictions come first
    assert "plots/learning_curve.png, plots/val_confusion.png" in text


@pytest.mark.parametrize(("steps", "remaining"), [(16, "with 1 more validation of "), (12, None)])
def test_the_time_of_validations_is_known_after_the_first_one(argv, caplog, steps, remaining):
    caplog.set_level(logging.INFO, "lightning_softprompt")
    assert main(["fit", *argv, QUIET, f"--trainer.max_steps={steps}", "--trainer.check_val_every_n_epoch=2"]) == 0
    before, *after = (message for message in caplog.messages if message.startswith("Time left: "))
    assert before.endswith(", without validations")
    assert len(after) == (remaining is not None)
    assert all(remaining in message for message in after)


def test_a_resumed_training_prints_the_best_validation_of_all_its_parts(argv, caplog):
    caplog.set_level(logging.INFO, "lightning_softprompt")
    options = [*argv, QUIET, "--model.lr=1e-8"]  # no validation is better than the first one
    assert main(["fit", *options, "--trainer.max_steps=8"]) == 0
    caplog.clear()
    last = last_folder() / "checkpoints" / "last.ckpt"
    assert main(["fit", *options, "--trainer.max_steps=12", f"--ckpt_path={last}"]) == 0
    assert "Best validation (val/accuracy), step 4 of 12" in caplog.text
    assert not any("complete" in message for message in caplog.messages)
    caplog.clear()
    last = last_folder() / "checkpoints" / "last.ckpt"
    assert main(["fit", *options, "--trainer.max_steps=12", f"--ckpt_path={last}"]) == 0
    assert any(
        message.startswith("The training is complete: the checkpoint is of its last step, 12")
        for message in caplog.messages
    )


def test_a_test_prints_rows_intervals_and_files_and_a_prediction_its_file(argv, tmp_path, caplog, capfd):
    caplog.set_level(logging.INFO, "lightning_softprompt")
    assert main(["fit", *argv, QUIET, "--trainer.max_steps=4"]) == 0
    start = [f"--ckpt_path={last_folder() / 'checkpoints' / 'last.ckpt'}", f"--run.folder={tmp_path / 'runs'}"]
    caplog.clear()
    capfd.readouterr()
    assert main(["test", *start, QUIET]) == 0
    assert re.search(r"Test, 16 rows\naccuracy +\S+ \[\S+, \S+\]\nmacro_f1 +\S+\n", caplog.text)
    assert "test_predictions.jsonl" in caplog.text.rpartition("Files in")[2]
    assert "Test metric" not in capfd.readouterr().out  # Lightning's table of 17 digits
    rows = write_rows(tmp_path / "new.jsonl", [{"text": "good"}] * 3)
    assert main(["predict", *start, QUIET, f"--data.predict={rows}"]) == 0
    assert f"Wrote 3 rows: {last_folder() / 'predictions.jsonl'}" in caplog.text


def test_the_bar_counts_the_steps_of_the_training_and_shows_rate_and_validation(argv, monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    for module in CONSOLE_USERS:
        monkeypatch.setattr(f"{module}.get_console", lambda: console)
    bars = []
    monkeypatch.setattr(
        StepProgressBar, "teardown", lambda self, *_, **__: bars.append(self.progress.tasks[0]) or self._stop_progress()
    )
    options = [*argv, "--model.lr=0.02", "--trainer.val_check_interval=2"]
    assert main(["fit", *options, "--trainer.max_steps=8"]) == 0
    assert (bars[0].completed, bars[0].total) == (8, 8)
    last = last_folder() / "checkpoints" / "last.ckpt"
    assert main(["fit", *options, "--trainer.max_steps=12", f"--ckpt_path={last}"]) == 0
    assert (bars[1].completed, bars[1].total) == (12, 12)
    shown = re.sub(r"\x1b\[[0-9;]*[a-zA-Z]", "", console.file.getvalue())
    assert re.search(r"12/12 .*it/s epoch: 3 loss: \d\.\d{3} lr: 0.02 val/accuracy: [01]\.\d{3}", shown)
    assert "v_num" not in shown


def test_runs_shows_a_test_in_the_line_of_its_training(argv, tmp_path):
    assert main(["fit", *argv, QUIET, "--trainer.max_steps=4"]) == 0
    folder = last_folder()
    checkpoint, prompt = folder / "checkpoints" / "best.ckpt", folder / "prompt.safetensors"
    # of two tests that start within one second, the last one by name is shown
    for name, start in (("1", f"--ckpt_path={checkpoint}"), ("2", f"--init_from={prompt}")):
        assert main(["test", *argv, QUIET, start, f"--run.name=test-{name}"]) == 0
        (run,) = find_runs(tmp_path / "runs")
        assert (run.folder, run.test_folder) == (folder, last_folder())
        assert run.test.interval is not None
    assert main(["predict", *argv, QUIET, start, f"--data.predict={tmp_path / 'test.jsonl'}"]) == 0
    untrained = [option for option in argv if not option.startswith("--model")]
    assert main(["test", *untrained, QUIET, "--model=NoPrompt"]) == 0
    _, baseline = find_runs(tmp_path / "runs")
    assert (baseline.method, baseline.source, baseline.started[:2]) == ("NoPrompt", None, "20")


def test_a_narrow_terminal_shows_two_lines_without_the_bar(argv, monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    for module in CONSOLE_USERS:
        monkeypatch.setattr(f"{module}.get_console", lambda: console)
    assert main(["fit", *argv, "--trainer.max_steps=8"]) == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    last = shown.rstrip().rpartition("Training")[2]
    numbers = r"\d+\.\d+|(?<=8/8 )\d:\d\d:\d\d"  # the second is the time, which depends on the machine
    assert [re.sub(numbers, "N", line.strip()) for line in last.splitlines()] == [
        "8/8 N • 0:00:00 Nit/s epoch: 2 loss: N lr: N", "val/accuracy: N"
    ]  # fmt: skip


def test_a_file_gets_a_line_for_each_validation_instead_of_the_bar(argv, caplog, capfd):
    caplog.set_level(logging.INFO, "lightning_softprompt")
    assert main(["fit", *argv, "--trainer.max_steps=8"]) == 0
    lines = [re.sub(r"\d\.\d{3}", "N", message) for message in caplog.messages if message.startswith("Step ")]
    assert lines[0].startswith("Step 4 of 8: epoch 1, loss N, lr N, val/accuracy N; ")
    assert lines[0].endswith("left")
    assert lines[1:] == ["Step 8 of 8: epoch 2, loss N, lr N, val/accuracy N"]
    assert "it/s" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--trainer.max_steps=3"], [3]),
        (["--trainer.max_steps=1", "--trainer.accumulate_grad_batches=3"], [1]),
        (["--trainer.max_steps=3", "--trainer.accumulate_grad_batches=3"], [2]),  # two steps are an epoch
        (["--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=3"], [8]),
        (["--trainer.max_steps=6"], [4]),
        (["--trainer.max_steps=6", "--trainer.limit_val_batches=0"], []),
    ],
)
def test_a_training_without_a_validation_validates_after_its_last_step(argv, options, steps):
    assert main(["fit", *argv, QUIET, *options]) == 0
    rows = list(csv.DictReader((last_folder() / "metrics.csv").open()))
    assert [int(row["step"]) + 1 for row in rows if row.get("val/accuracy")] == steps


def test_a_short_training_announces_its_validation_and_saves_the_best_prompt(argv, caplog):
    caplog.set_level(logging.INFO, "lightning_softprompt")
    assert main(["fit", *argv, QUIET, "--trainer.max_steps=3"]) == 0
    assert "Validation: after the last step" in caplog.messages
    assert "Saved best prompt" in caplog.text
    caplog.clear()
    last = last_folder() / "checkpoints" / "last.ckpt"
    assert main(["fit", *argv, QUIET, "--trainer.max_steps=8", f"--ckpt_path={last}"]) == 0
    assert "Validation: after each epoch" in caplog.messages


def test_a_folder_without_validation_rows_is_not_reported_as_an_error(argv, tmp_path, caplog):
    caplog.set_level(logging.INFO, "lightning_softprompt")
    (tmp_path / "validation.jsonl").unlink()
    assert main(["fit", *argv, QUIET, "--trainer.max_steps=1"]) == 0
    held_out = "10% of the training rows are held out for validation"
    assert f"{tmp_path} has no validation split (it has test and train); {held_out}" in caplog.messages
