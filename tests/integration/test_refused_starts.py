"""What cannot run is refused in two lines, before a run folder exists."""

import json

import pytest

from lightning_softprompt.cli.app import main

SHORT = ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--trainer.enable_progress_bar=false"]


@pytest.fixture
def command(tmp_path, tiny_folder, rows):
    """Runs a command on a tiny classification task; gives its exit code."""
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    common = [
        f"--backbone.name={tiny_folder('llama')}",
        "--data=ClassificationDataModule",
        f"--data.path={tmp_path}",
        "--data.template={soft}{text} it is{target}",
        '--data.labels={"negative": "bad", "neutral": "one", "positive": "good"}',
        "--data.batch_size=2",
        "--trainer.accelerator=cpu",
        f"--run.folder={tmp_path / 'runs'}",
        "--run.wandb=disabled",
    ]

    def command(name, *options):
        given = " ".join(options)
        method = [] if "--model=" in given else ["--model=PromptTuning", "--model.length=2"]
        return main([name, *method, *common, *(SHORT if name == "fit" else SHORT[2:]), *options])

    return command


@pytest.fixture
def refused(command, tmp_path, capfd):
    """Checks that a command is refused in two lines without a run folder; gives the message."""

    def refused(name, *options):
        capfd.readouterr()
        assert command(name, *options) == 2
        lines = capfd.readouterr().err.strip().splitlines()
        message = lines[-2]
        assert message.startswith("error: ")
        assert "Traceback" not in "".join(lines)
        assert not list((tmp_path / "runs").glob("*/*"))
        return message

    return refused


@pytest.mark.parametrize("name", ["fit", "test"])
@pytest.mark.parametrize("length", [48, 100_000])  # the tiny backbone reads 48 tokens
def test_a_prompt_that_never_fits(refused, name, length):
    assert "has a window of 48" in refused(name, "--model=PromptTuning", f"--model.length={length}")


@pytest.mark.parametrize("chosen", ["PromptTuning", "SMoP", "PrefixTuning"])
def test_a_weight_of_an_unknown_penalty(refused, chosen):
    message = refused("fit", f"--model={chosen}", "--model.penalty_weights={balanced: 0.1}")
    assert "penalty_weights names ['balanced']" in message
    assert chosen in message


def test_a_weight_of_a_penalty_that_the_method_reports(command):
    assert command("fit", "--model=SMoP", "--model.length=2", "--model.penalty_weights={balance: 0.1}") == 0
