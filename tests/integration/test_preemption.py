"""Runs that are told to stop, in processes of their own, end with a checkpoint and go on as if nothing had been."""

import csv
import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from forks import as_of_torchrun, ended, forked
from row_files import write_rows

from lightning_softprompt.cli.app import main

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import killing

UNSIGNALLED = "--run.accept_changes=trainer.callbacks"  # a resumed run has another callback that stops it, or none
STEPS = 9  # of 6 in an epoch


@pytest.fixture
def fixed(tmp_path, rows, tiny_folder):
    data = tmp_path / "data"
    data.mkdir()
    for split, part in {"train": rows * 4, "validation": rows}.items():
        write_rows(data / f"{split}.jsonl", part)
    return [
        "fit", "--model=PromptTuning", "--model.length=3", "--model.prompt_dropout=0.2",
        "--data=ClassificationDataModule", f"--data.path={data}", "--data.template={soft}{text} it is{target}",
        '--data.labels={"negative": "bad", "neutral": "one", "positive": "good"}',
        f"--backbone.name={tiny_folder('llama')}", f"--run.folder={tmp_path}", "--run.wandb=disabled",
        "--trainer.max_epochs=-1", f"--trainer.max_steps={STEPS}", "--trainer.log_every_n_steps=1",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip


@pytest.fixture
def start(tmp_path, fixed):
    """A function that runs `softprompt fit` in a process of its own; gives its code and what it says."""

    def start(experiment, *options):
        argv = [*fixed, "--data.batch_size=4", f"--run.experiment={experiment}", *options]
        return ended(forked(argv, tmp_path / "told"))

    return start


@pytest.fixture
def start_two(tmp_path, fixed):
    """The same in two processes, which find each other as those of torchrun do."""

    def start(experiment, *options):
        spread = ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=2"]
        argv = [*fixed, *spread, f"--run.experiment={experiment}", *options]
        ranks = as_of_torchrun(2)
        return [ended(process) for process in [forked(argv, tmp_path / f"told{r['RANK']}", r) for r in ranks]]

    return start


def signalled(batch, name, **how):
    arguments = {"batch": batch, "name": name, **how}
    return f"--trainer.callbacks={json.dumps([{'class_path': 'signals.SignalAt', 'init_args': arguments}])}"


def state(folder):
    (path,) = folder.glob("*/checkpoints/last.ckpt")
    return torch.load(path, weights_only=True)


def losses(folder):
    (path,) = folder.glob("*/metrics.csv")
    return [row["train/loss"] for row in csv.DictReader(path.open()) if row["train/loss"]]


def same(one, other):
    assert one["global_step"] == other["global_step"] == STEPS
    assert torch.equal(one["state_dict"]["tokens"], other["state_dict"]["tokens"])
    moments = [of["optimizer_states"][0]["state"][0] for of in (one, other)]
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])


def test_a_run_that_was_told_to_stop_ends_as_one_that_was_not(start, tmp_path):
    code, told = start("whole")
    assert code == 0, told
    for name, batch, wanted in (("SIGTERM", 2, 143), ("SIGUSR1", 5, 143), ("SIGINT", 0, 130)):
        code, told = start(name, "--ckpt_path=last", UNSIGNALLED, signalled(batch, name))
        assert code == wanted, told
        assert "yet; starting a new run" in told
        assert f"Stopped at optimizer step {batch + 1} by a signal. To resume: --ckpt_path" in told
        assert "Traceback" not in told
        assert state(tmp_path / name)["global_step"] == batch + 1
        code, told = start(name, "--ckpt_path=last", UNSIGNALLED)
        assert code == 0, told
        same(state(tmp_path / name), state(tmp_path / "whole"))
        assert losses(tmp_path / name) == losses(tmp_path / "whole")  # in one folder


def test_the_same_command_goes_on_also_where_it_began_with_another_prompt(start, tmp_path):
    assert start("first")[0] == 0
    (prompt,) = tmp_path.glob("first/*/prompt.safetensors")
    again = [f"--init_from={prompt}", "--ckpt_path=last", UNSIGNALLED]
    assert start("whole", *again)[0] == 0
    assert start("cut", *again, signalled(2, "SIGTERM"))[0] == 143
    code, told = start("cut", *again)
    assert code == 0, told
    assert "Ignoring --init_from: the run resumes from its own checkpoint" in told
    same(state(tmp_path / "cut"), state(tmp_path / "whole"))


def test_gradients_that_are_being_added_up_are_not_lost(start, tmp_path):
    added = "--trainer.accumulate_grad_batches=2"
    for name, options in (("whole", []), ("half", [signalled(2, "SIGTERM")])):
        assert start(name, added, *options)[0] == (143 if options else 0)
    assert state(tmp_path / "half")["global_step"] == 2
    assert start("half", added, "--ckpt_path=last", UNSIGNALLED)[0] == 0
    same(state(tmp_path / "half"), state(tmp_path / "whole"))


def test_a_second_interrupt_stops_at_once(start, tmp_path):
    code, _ = start("twice", signalled(2, "SIGINT", times=2))
    assert code == -signal.SIGINT
    assert not list(tmp_path.glob("twice/**/*.ckpt"))


@pytest.mark.parametrize(("name", "times", "wanted"), [("SIGTERM", 1, 143), ("SIGINT", 1, 130), ("SIGINT", 2, -2)])
def test_what_all_processes_are_sent_is_the_runs_to_heed_and_its_workers_end_with_it(
    fixed, tmp_path, name, times, wanted
):
    """As by Ctrl-C in a terminal, or by a scheduler; a second one stops at once, and still leaves no process."""
    note, told = tmp_path / "children", tmp_path / "told"
    strike = signalled(2, name, times=times, note=str(note))
    argv = [*fixed, "--run.experiment=group", "--data.batch_size=4", "--data.num_workers=2", strike]
    assert killing.wait_for_exit([killing.start(argv, told)]) == [wanted], told.read_text()
    assert "Traceback" not in told.read_text()
    assert (
        [state(tmp_path / "group")["global_step"]] == [3] if times == 1 else not list(tmp_path.glob("group/**/*.ckpt"))
    )
    workers = note.read_text().split()
    assert len(workers) == 2
    while any(Path("/proc", worker).exists() for worker in workers):  # till the test's own end, if ever
        time.sleep(0.01)


def test_two_processes_agree_on_the_step_whichever_is_told(start_two, tmp_path):
    assert [code for code, _ in start_two("whole")] == [0, 0]
    for rank in (0, 1):
        name = f"told_{rank}"
        stopped = start_two(name, signalled(2, "SIGTERM", rank=rank))
        assert [code for code, _ in stopped] == [143, 143], stopped
        assert state(tmp_path / name)["global_step"] == 3
        again = start_two(name, "--ckpt_path=last", UNSIGNALLED)
        assert [code for code, _ in again] == [0, 0], again
        same(state(tmp_path / name), state(tmp_path / "whole"))


def test_last_wants_a_run_where_nothing_is_trained(fixed, tmp_path, capsys):
    given = [option for option in fixed[1:] if not option.startswith("--trainer.max")]
    assert main(["test", *given, "--run.experiment=none", "--ckpt_path=last"]) == 2
    assert f"no run in {tmp_path / 'none'} has a checkpoint yet" in capsys.readouterr().err
