"""Runs that receive a stop signal end with a checkpoint and resume as if they were not interrupted."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from forks import fork_command, torchrun_environments, wait_for
from row_files import write_splits
from runs import read_losses

from lightning_softprompt.cli.app import main

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import killing

UNSIGNALLED = "--run.accept_changes=trainer.callbacks"  # the resumed run has another callback or none
STEPS = 9  # an epoch has 6


@pytest.fixture
def shared_argv(tmp_path, rows, tiny_folder):
    data = write_splits(tmp_path / "data", train=rows * 4, validation=rows)
    return [
        "fit", "--model=PromptTuning", "--model.length=3", "--model.prompt_dropout=0.2",
        "--data=ClassificationDataModule", f"--data.path={data}", "--data.template={soft}{text} it is{target}",
        '--data.labels={"negative": "bad", "neutral": "one", "positive": "good"}',
        f"--backbone.name={tiny_folder('llama')}", f"--run.folder={tmp_path}", "--run.wandb=disabled",
        "--trainer.max_epochs=-1", f"--trainer.max_steps={STEPS}", "--trainer.log_every_n_steps=1",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip


@pytest.fixture
def start(tmp_path, shared_argv):
    """A function that runs `softprompt fit` in its own process; returns the exit code and standard error."""

    def start(experiment, *options):
        argv = [*shared_argv, "--data.batch_size=4", f"--run.experiment={experiment}", *options]
        return wait_for(fork_command(argv, tmp_path / "log"))

    return start


@pytest.fixture
def start_two(tmp_path, shared_argv):
    """A function like `fit` that runs two processes with the environment of torchrun."""

    def start(experiment, *options):
        spread = ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=2"]
        argv = [*shared_argv, *spread, f"--run.experiment={experiment}", *options]
        environments = torchrun_environments(2)
        commands = [fork_command(argv, tmp_path / f"log_{rank}", env) for rank, env in enumerate(environments)]
        return [wait_for(command) for command in commands]

    return start


def signal_option(batch, name, **more):
    """Returns the option of a callback that sends a signal to the run."""
    arguments = {"batch": batch, "name": name, **more}
    return f"--trainer.callbacks={json.dumps([{'class_path': 'signals.SignalAt', 'init_args': arguments}])}"


def load_last(folder):
    (path,) = folder.glob("*/checkpoints/last.ckpt")
    return torch.load(path, weights_only=True)


def losses_of(folder):
    (path,) = folder.glob("*/metrics.csv")
    return read_losses(path.parent)


def check_equal_ends(one, other):
    assert one["global_step"] == other["global_step"] == STEPS
    assert torch.equal(one["state_dict"]["tokens"], other["state_dict"]["tokens"])
    moments = [state["optimizer_states"][0]["state"][0] for state in (one, other)]
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])


def test_a_run_that_got_a_signal_to_stop_ends_as_an_uninterrupted_one(start, tmp_path):
    code, log = start("whole")
    assert code == 0, log
    for name, batch, expected in (("SIGTERM", 2, 143), ("SIGUSR1", 5, 143), ("SIGINT", 0, 130)):
        code, log = start(name, "--ckpt_path=last", UNSIGNALLED, signal_option(batch, name))
        assert code == expected, log
        assert "yet; starting a new run" in log
        assert f"Stopped at optimizer step {batch + 1} by a signal. To resume: --ckpt_path" in log
        assert "Traceback" not in log
        assert load_last(tmp_path / name)["global_step"] == batch + 1
        code, log = start(name, "--ckpt_path=last", UNSIGNALLED)
        assert code == 0, log
        check_equal_ends(load_last(tmp_path / name), load_last(tmp_path / "whole"))
        assert losses_of(tmp_path / name) == losses_of(tmp_path / "whole")  # in one folder


def test_the_same_command_resumes_a_run_that_started_from_another_prompt(start, tmp_path):
    assert start("first")[0] == 0
    (prompt,) = tmp_path.glob("first/*/prompt.safetensors")
    again = [f"--init_from={prompt}", "--ckpt_path=last", UNSIGNALLED]
    assert start("whole", *again)[0] == 0
    assert start("cut", *again, signal_option(2, "SIGTERM"))[0] == 143
    code, log = start("cut", *again)
    assert code == 0, log
    assert "Ignoring --init_from: the run resumes from its own checkpoint" in log
    check_equal_ends(load_last(tmp_path / "cut"), load_last(tmp_path / "whole"))


def test_accumulated_gradients_are_not_lost(start, tmp_path):
    accumulation = "--trainer.accumulate_grad_batches=2"
    for name, options in (("whole", []), ("half", [signal_option(2, "SIGTERM")])):
        assert start(name, accumulation, *options)[0] == (143 if options else 0)
    assert load_last(tmp_path / "half")["global_step"] == 2
    assert start("half", accumulation, "--ckpt_path=last", UNSIGNALLED)[0] == 0
    check_equal_ends(load_last(tmp_path / "half"), load_last(tmp_path / "whole"))


def test_a_second_interrupt_stops_at_once(start, tmp_path):
    code, _ = start("twice", signal_option(2, "SIGINT", times=2))
    assert code == -signal.SIGINT
    assert not list(tmp_path.glob("twice/**/*.ckpt"))


@pytest.mark.parametrize(("name", "times", "expected"), [("SIGTERM", 1, 143), ("SIGINT", 1, 130), ("SIGINT", 2, -2)])
def test_a_signal_to_all_processes_stops_the_run_and_its_workers(shared_argv, tmp_path, name, times, expected):
    """As by Ctrl-C in a terminal, or by a scheduler. A second signal stops immediately and also leaves no process."""
    note, log = tmp_path / "children", tmp_path / "log"
    signals = signal_option(2, name, times=times, note=str(note))
    argv = [*shared_argv, "--run.experiment=group", "--data.batch_size=4", "--data.num_workers=2", signals]
    assert killing.wait_for_exit([killing.start(argv, log)]) == [expected], log.read_text()
    assert "Traceback" not in log.read_text()
    if times == 1:
        assert load_last(tmp_path / "group")["global_step"] == 3
    else:
        assert not list(tmp_path.glob("group/**/*.ckpt"))
    workers = note.read_text().split()
    assert len(workers) == 2
    while any(Path("/proc", worker).exists() for worker in workers):  # at most until the timeout of the test
        time.sleep(0.01)


def test_two_processes_agree_on_the_step_whichever_gets_the_signal(start_two, tmp_path):
    assert [code for code, _ in start_two("whole")] == [0, 0]
    for rank in (0, 1):
        name = f"rank_{rank}"
        stopped = start_two(name, signal_option(2, "SIGTERM", rank=rank))
        assert [code for code, _ in stopped] == [143, 143], stopped
        assert load_last(tmp_path / name)["global_step"] == 3
        again = start_two(name, "--ckpt_path=last", UNSIGNALLED)
        assert [code for code, _ in again] == [0, 0], again
        check_equal_ends(load_last(tmp_path / name), load_last(tmp_path / "whole"))


def test_last_requires_a_run_if_nothing_is_trained(shared_argv, tmp_path, capsys):
    options = [option for option in shared_argv[1:] if not option.startswith("--trainer.max")]
    assert main(["test", *options, "--run.experiment=none", "--ckpt_path=last"]) == 2
    assert f"no run in {tmp_path / 'none'} has a checkpoint yet" in capsys.readouterr().err
