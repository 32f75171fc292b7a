"""Two processes do what one does with all rows, whether each holds the backbone or both share it."""

import csv
import json

import pytest
import torch
from forks import as_of_torchrun, ended, forked

from lightning_softprompt.checkpoints.files import read_prompt

STEPS = 7  # of 5 in an epoch
STRATEGIES = {"ddp": ["--trainer.strategy=ddp"], "sharded": ["--trainer.strategy=sharded"]}


@pytest.fixture
def classified(tmp_path, rows, tiny_folder):
    """Options of a classification whose splits do not divide by two."""
    data = tmp_path / "data"
    data.mkdir()
    for split, part in {"train": rows * 3 + rows[:2], "validation": (rows * 2)[:9], "test": (rows * 2)[:7]}.items():
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return [
        "--data=ClassificationDataModule", f"--data.path={data}", "--data.template={soft}{text} it is{target}",
        '--data.labels={"negative": "bad", "neutral": "one", "positive": "good"}',
        f"--backbone.name={tiny_folder('llama')}",
    ]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A function that runs a command in so many processes; gives the folder of its experiment."""

    def run(experiment, command, *options, world=1, wanted=0):
        argv = [
            command, f"--run.experiment={experiment}", f"--run.folder={tmp_path}", "--run.wandb=disabled",
            "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", f"--trainer.devices={world}", *options,
        ]  # fmt: skip
        environments = as_of_torchrun(world) if world > 1 else [{}]
        started = [forked(argv, tmp_path / f"told_{n}", of) for n, of in enumerate(environments)]
        said = [ended(process) for process in started]
        assert [code for code, _ in said] == [wanted] * world, "\n\n".join(told for _, told in said)
        run.said = [told for _, told in said]
        return tmp_path / experiment

    return run


def lines(folder):
    """What was logged, and the settings of steps left out."""
    (path,) = folder.glob("*/metrics.csv")
    return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(path.open())]


FIT = [
    "--model=PromptTuning", "--model.length=3", "--trainer.max_epochs=-1", f"--trainer.max_steps={STEPS}",
    "--trainer.log_every_n_steps=1", "--trainer.val_check_interval=5",
]  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_two_processes_train_as_one(run, classified, strategy):
    one = run("one", "fit", *FIT, *classified, "--data.batch_size=4")
    two = run("two", "fit", *FIT, *classified, "--data.batch_size=2", *strategy, world=2)
    (a,), (b,) = ([read_prompt(p) for p in f.glob("*/prompt.safetensors")] for f in (one, two))
    print(lines(one)); print(lines(two)); print(run.said)
    torch.testing.assert_close(a.tensors, b.tensors)
