"""A run that cannot work is refused in two lines, before its folder exists."""

import os

import pytest
from row_files import write_splits

from lightning_softprompt.checkpoints.checkpoint_file import load_checkpoint
from lightning_softprompt.cli.app import main
from lightning_softprompt.runs.run_spec import last_folder

SHORT = ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--trainer.enable_progress_bar=false"]


@pytest.fixture
def command(tmp_path, tiny_folder, rows):
    """A function that runs a command on a tiny classification task and returns its exit code."""
    write_splits(tmp_path, train=rows, validation=rows, test=rows)
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
        has_method = any(option.startswith("--model=") for option in options)
        method = [] if has_method else ["--model=PromptTuning", "--model.length=2"]
        limits = SHORT if name == "fit" else SHORT[2:]
        return main([name, *method, *common, *limits, *options])

    return command


@pytest.fixture
def check_refused(command, tmp_path, capfd):
    """A function that checks that a command is refused without a run folder and returns the message."""

    def check_refused(name, *options):
        capfd.readouterr()
        assert command(name, *options) == 2
        lines = capfd.readouterr().err.strip().splitlines()
        message = lines[-2]
        assert message.startswith("error: ")
        assert "Traceback" not in "".join(lines)
        assert not list((tmp_path / "runs").glob("*/*"))
        return message

    return check_refused


@pytest.mark.parametrize("name", ["fit", "test"])
@pytest.mark.parametrize("length", [48, 100_000])  # the tiny backbone reads 48 tokens
def test_a_prompt_that_never_fits(check_refused, name, length):
    assert "has a context window of 48 tokens" in check_refused(
        name, "--model=PromptTuning", f"--model.length={length}"
    )


@pytest.mark.parametrize("chosen", ["PromptTuning", "SMoP", "PrefixTuning"])
def test_a_weight_of_an_unknown_penalty(check_refused, chosen):
    message = check_refused("fit", f"--model={chosen}", "--model.penalty_weights={balanced: 0.1}")
    assert "penalty_weights names ['balanced']" in message
    assert chosen in message


def test_a_weight_of_a_penalty_that_the_method_reports(command):
    assert command("fit", "--model=SMoP", "--model.length=2", "--model.penalty_weights={balance: 0.1}") == 0


STOPPING = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]


@pytest.mark.parametrize("steps", [2, 3])
def test_early_stopping_in_a_training_that_is_shorter_than_an_epoch_or_as_long(command, steps):
    """A training that would end before its first validation validates after its last step."""
    assert command("fit", *STOPPING, "--trainer.val_check_interval=1.0", f"--trainer.max_steps={steps}") == 0
    assert "val/loss" in (last_folder() / "metrics.csv").read_text()
    assert (last_folder() / "checkpoints" / "best.ckpt").is_file()


def test_a_schedule_that_monitors_a_disabled_validation(check_refused):
    schedule = "--model.scheduler=lightning.pytorch.cli.ReduceLROnPlateau"
    message = check_refused("fit", schedule, "--model.scheduler.monitor=val/loss", "--trainer.limit_val_batches=0")
    assert "the schedule monitors val/loss" in message


@pytest.mark.parametrize("metric", ["train/loss", "loss", "accuracy"])
def test_a_schedule_that_monitors_an_unknown_metric(check_refused, metric):
    schedule = "--model.scheduler=lightning.pytorch.cli.ReduceLROnPlateau"
    message = check_refused("fit", schedule, f"--model.scheduler.monitor={metric}")
    assert f"--model.scheduler.monitor is {metric!r}" in message


def test_averages_of_buffers_that_are_not_floating_point(check_refused, command):
    average = "--trainer.callbacks+=WeightAveraging"
    assert "use_buffers" in check_refused("fit", average)
    assert command("fit", average, "--trainer.callbacks.use_buffers=false") == 0


@pytest.mark.parametrize("devices", ["-1", "0", "[0, 1]"])
def test_devices_that_a_cpu_does_not_have(check_refused, devices):
    message = check_refused("fit", f"--trainer.devices={devices}")
    assert message.startswith(f"error: --trainer.devices is {devices}: on a CPU")


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such-folder"])
def test_a_backbone_folder_that_does_not_exist(check_refused, name):
    assert f"the folder {name} does not exist" in check_refused("fit", f"--backbone.name={name}")


@pytest.mark.parametrize("watcher", ["EarlyStopping", "ModelCheckpoint"])
def test_a_metric_that_is_never_logged_does_not_lose_the_prompt(command, tmp_path, watcher, monkeypatch, capfd):
    monkeypatch.setattr(
        "lightning_softprompt.cli.option_checks.refuse_monitors", lambda *_: None
    )  # as with unknown callbacks
    options = [f"--trainer.callbacks+={watcher}", "--trainer.callbacks.monitor=val/other"]
    assert command("fit", *options, "--trainer.max_steps=6", "--trainer.val_check_interval=1.0") == 2
    assert "val/other" in capfd.readouterr().err
    (folder,) = (tmp_path / "runs" / "default").iterdir()
    assert (folder / "prompt.safetensors").is_file()
    last = folder / "checkpoints" / "last.ckpt"
    assert load_checkpoint(last)["global_step"] == 3  # the first epoch has three steps
    again = ["--trainer.max_steps=6", "--trainer.val_check_interval=1.0", f"--ckpt_path={last}"]
    assert command("fit", *again, "--run.accept_changes=[trainer.callbacks]") == 0
    assert load_checkpoint(last_folder() / "checkpoints" / "last.ckpt")["global_step"] == 6


def test_a_test_in_the_folder_of_a_training_does_not_change_its_config(command, tmp_path):
    assert command("fit", "--run.name=one") == 0
    folder = tmp_path / "runs" / "default" / "one"
    before = (folder / "config.yaml").read_bytes()
    options = [f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}", "--data.eval_batch_size=3"]
    assert command("test", "--run.name=one", *options) == 0
    assert (folder / "config.yaml").read_bytes() == before
    assert not (folder / "hparams.yaml").exists()


def test_the_config_of_a_test_starts_a_training(command, tmp_path):
    assert command("test", "--run.name=tested") == 0
    config = tmp_path / "runs" / "default" / "tested" / "config.yaml"
    assert main(["fit", f"--config={config}", *SHORT, "--run.name=trained"]) == 0
    assert main(["predict", f"--config={config}", f"--data.predict={tmp_path / 'test.jsonl'}"]) == 0


def test_predictions_do_not_replace_a_pipe(check_refused, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    message = check_refused(
        "predict", f"--run.predictions={tmp_path / 'pipe'}", f"--data.predict={tmp_path / 'test.jsonl'}"
    )
    assert "device or a pipe" in message
    assert message.endswith("or - for standard output")
    assert (tmp_path / "pipe").is_fifo()
