"""Two processes: both refuse different data, and a lost or stopped process ends the other with a message."""

import os
import signal
import time

import pytest
import torch
from forks import fork_command, torchrun_environments, wait_for
from row_files import write_rows

from lightning_softprompt.callbacks.recovery.process_watch import Watch, describe_lost_connection

PATIENCE = 2


@pytest.fixture
def start(tmp_path, rows, tiny_folder):
    """A function that starts a run of two processes, each with additional options, and returns the processes."""
    write_rows(tmp_path / "train.jsonl", rows * 4)

    def start(*by_process, steps=10_000):
        argv = [
            "fit", "--model=PromptTuning", "--model.length=3", "--data=ClassificationDataModule",
            f"--data.train={tmp_path / 'train.jsonl'}", f"--data.validation={tmp_path / 'train.jsonl'}",
            "--data.template={soft}{text} it is{target}", "--data.batch_size=2",
            '--data.labels={"negative": "bad", "neutral": "one", "positive": "good"}', "--run.wandb=disabled",
            f"--backbone.name={tiny_folder('llama')}", f"--run.folder={tmp_path / 'runs'}", "--run.name=one",
            "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.devices=2",
            f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1", "--trainer.strategy=ddp",
            "--trainer.log_every_n_steps=1", f"--run.process_timeout={PATIENCE}",
        ]  # fmt: skip
        further_options = by_process or ([], [])
        return [
            fork_command([*argv, *further_options[rank]], tmp_path / f"log_{rank}", environment)
            for rank, environment in enumerate(torchrun_environments(2))
        ]

    return start


def wait_for_training(folder):
    """Waits until a run has logged its first step."""
    deadline = time.monotonic() + 60
    while not (folder / "runs" / "default" / "one" / "metrics.csv").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def check_message(log, *parts):
    assert "Traceback" not in log
    assert all(part in log for part in parts), log


@pytest.mark.parametrize("change", ["fewer rows", "other labels"])
def test_processes_with_other_rows_are_refused_by_all(start, tmp_path, rows, change):
    other = rows * 4 if change == "other labels" else rows * 3
    if change == "other labels":
        other = [{**row, "label": "neutral"} for row in other]
    path = write_rows(tmp_path / "other.jsonl", other)
    for code, log in map(wait_for, start([], [f"--data.train={path}"])):
        assert code == 2, log
        check_message(log, "train_rows is '24 rows (", "in process 0 and", "in process 1")


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_process_that_is_lost_ends_the_other(start, tmp_path, lost, sent):
    processes = start()
    wait_for_training(tmp_path)
    start_time = time.monotonic()
    os.kill(processes[lost][0], sent)
    code, log = wait_for(processes[1 - lost])
    assert time.monotonic() - start_time < 15 * PATIENCE
    os.kill(processes[lost][0], signal.SIGKILL)
    wait_for(processes[lost])
    assert code == 3, log
    check_message(log, "error: ", "of this run", "Resume the run with --ckpt_path last")
    if sent == signal.SIGSTOP:
        check_message(log, f"process {lost} of this run sent no heartbeat for {PATIENCE} seconds")


@pytest.fixture
def watches():
    """Two watches of one store, and the messages with which they exit."""
    store, messages = torch.distributed.HashStore(), {0: [], 1: []}
    return [Watch(store, rank, 2, 0.4, messages[rank].append) for rank in (0, 1)], messages


def test_processes_that_end_one_after_the_other_are_not_lost(watches):
    (first, second), messages = watches
    for watch in (first, second):
        watch.start()
    second.close("")
    time.sleep(1)
    first.close("")
    assert messages == {0: [], 1: []}


def test_an_error_of_one_process_is_the_message_of_the_other(watches):
    (first, second), messages = watches
    for watch in (first, second):
        watch.start()
    second.close("ValueError: no\n  column")
    deadline = time.monotonic() + 10
    while not messages[0] and time.monotonic() < deadline:
        time.sleep(0.02)
    (message,) = messages[0]
    assert message.startswith("process 1 of this run ended with an error: ValueError: no column. Resume")
    assert messages[1] == []


def test_other_errors_are_not_those_of_a_connection():
    assert describe_lost_connection(RuntimeError("size mismatch")) is None
    assert describe_lost_connection(ValueError("gloo")) is None
