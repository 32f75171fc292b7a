"""The options of a training that most users set: learning rate, its schedule, early stopping, length."""

import json
import math
import re

import pytest
import torch
import yaml
from row_files import write_rows
from runs import load_state, read_column, read_losses

from lightning_softprompt.cli.app import main
from lightning_softprompt.runs.run_spec import last_folder
from lightning_softprompt.training.lr_range_test import suggest_rate


@pytest.fixture
def argv(tmp_path, tiny_folder):
    """Options of a run on 16 rows in batches of 4."""
    rows = [{"text": f"a {word} film {i}", "label": word} for i in range(8) for word in ("good", "bad")]
    path = tmp_path / "rows.jsonl"
    write_rows(path, rows)
    return [
        "--model=PromptTuning", "--model.length=3", "--data=ClassificationDataModule", f"--data.train={path}",
        f"--data.validation={path}", "--data.template={soft}{text} it is {target}", "--data.batch_size=4",
        "--run.wandb=disabled", f"--backbone.name={tiny_folder('llama')}", f"--run.folder={tmp_path / 'runs'}",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip


@pytest.fixture
def fit(argv):
    def fit(*options):
        assert main(["fit", *argv, *options]) == 0
        return last_folder()

    return fit


def load_rate(folder):
    """Returns the learning rate after the last step."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["optimizer_states"][0]["param_groups"][0]["lr"]


def test_a_linear_schedule_decays_the_rate_and_resumes_exactly(fit, argv, capfd):
    options = ["--model.lr=0.4", "--model.lr_schedule=linear", "--model.warmup=0.25", "--trainer.log_every_n_steps=1"]
    steps = ["--trainer.max_steps=8", "--trainer.val_check_interval=4", "--run.keep_last=2"]
    whole = fit(*options, *steps)
    assert load_rate(whole) == 0
    middle = whole / "checkpoints" / "last-1.ckpt"
    assert torch.load(middle, weights_only=True)["global_step"] == 4
    rest = fit(*options, *steps, f"--ckpt_path={middle}")
    assert read_losses(rest) == read_losses(whole)[4:]
    capfd.readouterr()
    assert main(["fit", *argv, *options, *steps, f"--ckpt_path={middle}", "--trainer.max_steps=9"]) == 2
    assert "trainer.max_steps" in capfd.readouterr().err  # the rate of each step depends on it


def test_a_training_without_a_length_ends_and_its_config_has_the_limits(fit, caplog):
    folder = fit("--model.lr=1e-8")  # validation never improves after the first one
    assert "Training for 10 epochs, or until 3 validations bring no improvement" in caplog.text
    assert "Stopped early: no improvement of val/accuracy in 3 validations" in caplog.text
    assert len(read_column(folder, "val/accuracy")) == 4
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["trainer"]["max_epochs"], config["run"]["early_stopping"]) == (10, 3)


def test_early_stopping_uses_the_patience_of_the_resumed_run(fit):
    options = ["--model.lr=1e-8", "--trainer.max_epochs=6"]
    stopped = fit(*options, "--run.early_stopping=1")
    assert len(read_column(stopped, "val/accuracy")) == 2
    rest = fit(*options, "--run.early_stopping=3", f"--ckpt_path={stopped / 'checkpoints' / 'last.ckpt'}")
    assert len(read_column(rest, "val/accuracy")) == 2


def test_a_short_training_logs_its_loss(fit):
    assert len(read_losses(fit("--trainer.max_steps=3"))) == 3


def test_a_range_test_suggests_a_rate_and_trains_nothing(argv, tmp_path, capfd):
    assert main(["fit", *argv, "--find_lr"]) == 0
    (folder,) = (tmp_path / "runs" / "default").iterdir()
    assert {path.name for path in folder.iterdir()} == {"lr_find.json", "lr_find.png"}
    values = json.loads((folder / "lr_find.json").read_text())
    assert values["lr"] == sorted(values["lr"])
    assert len(values["loss"]) == len(values["lr"]) > 50
    suggestion = re.search(r"--model.lr (\S+)", capfd.readouterr().err)
    assert values["lr"][0] < float(suggestion[1]) < values["lr"][-1]


@pytest.mark.parametrize("slope", [-1.0, 1.0])
def test_the_suggested_rate_is_where_the_loss_falls_fastest(slope):
    rates = [10 ** (-5 + step / 20) for step in range(100)]
    losses = [1 + slope / (1 + math.exp(-(step - 60) / 4)) for step in range(100)]  # steepest at step 60
    assert suggest_rate(rates, losses) == (rates[60] if slope < 0 else None)


def test_a_csv_file_is_all_that_a_first_run_needs(tmp_path, tiny_folder, caplog):
    table = tmp_path / "tickets.csv"
    rows = [f'"a {word} film","{name}"\n' for word, name in (("good", "very good"), ("bad", "bad")) for _ in range(20)]
    table.write_text("message,category\n" + "".join(rows))
    argv = [
        "--model=PromptTuning", "--data=ClassificationDataModule", f"--data.path={table}",
        r"--data.template={soft}{message}\nTopic: {target}", f"--backbone.name={tiny_folder('llama')}",
        f"--run.folder={tmp_path / 'runs'}", "--run.wandb=disabled", "--trainer.accelerator=cpu",
        "--trainer.max_epochs=1",
    ]  # fmt: skip
    assert main(["fit", *argv]) == 0
    folder = last_folder()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["data"]["init_args"]["template"] == "{soft}{message}\nTopic: {target}"
    assert "divided into 32 train, 4 test, 4 validation rows" in caplog.text
    assert "Classes are read from the column 'category'" in caplog.text
    assert "RankedChoices scores the whole text" in caplog.text
    assert main(["test", f"--ckpt_path={folder / 'prompt.safetensors'}", f"--run.folder={tmp_path / 'runs'}"]) == 0
    assert len((last_folder() / "test_predictions.jsonl").read_text().splitlines()) == 4


def test_a_sample_of_training_rows_has_the_metrics_of_a_validation_and_changes_no_step(fit):
    options = [
        "--model.prompt_dropout=0.3",
        "--replicas.count=2",
        "--trainer.max_epochs=2",
        "--trainer.log_every_n_steps=1",
    ]
    plain, sampled = fit(*options), fit(*options, "--run.train_sample=16")
    assert read_losses(sampled) == read_losses(plain)
    names = [name for name in json.loads((plain / "metrics.json").read_text())["val"] if "/ensemble" not in name]
    assert any("accuracy" in name for name in names)
    for name in names:  # the training rows are also the validation rows here
        of_sample = read_column(sampled, name.replace("val/", "train_sample/"))
        assert of_sample == read_column(sampled, name) == read_column(plain, name)


def test_a_sample_of_training_rows_has_whole_batches(fit):
    folder = fit("--trainer.max_epochs=1", "--run.train_sample=5", "--data.eval_batch_size=4")
    report = json.loads((folder / "metrics.json").read_text())
    eighths = 8 * report["train_sample"]["train_sample/accuracy"]
    assert eighths == pytest.approx(round(eighths))
    assert (folder / "plots" / "learning_curve.png").is_file()


def test_gradients_of_soft_tokens_are_those_of_the_step_and_change_no_step(fit, argv, capsys):
    sgd = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.5", "--trainer.log_every_n_steps=1"]
    one, plain = fit(*sgd, "--trainer.max_steps=1"), fit(*sgd, "--trainer.max_steps=2")
    watched = fit(*sgd, "--trainer.max_steps=2", "--run.watch=tokens")
    assert read_losses(watched) == read_losses(plain)
    steps = load_state(watched)["tokens"] - load_state(one)["tokens"]  # the second step
    names = [f"prompt/grad_norm/token_{index}" for index in range(3)]
    norms = [float(read_column(watched, name)[1]) for name in names]
    assert norms == pytest.approx((steps.norm(dim=1) / 0.5).tolist(), rel=1e-3)
    assert len(set(norms)) == 3
    assert not read_column(plain, names[0])
    capsys.readouterr()
    assert main(["fit", *argv, "--model=PrefixTuning", "--run.watch=tokens", "--trainer.max_steps=1"]) == 2
    assert "run.watch=tokens requires a method whose soft tokens are a parameter" in capsys.readouterr().err
