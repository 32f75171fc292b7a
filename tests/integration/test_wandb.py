"""What W&B gets from the run commands, read from the files of offline runs."""

import json

import pytest
import torch
from row_files import write_splits
from wandb_file import read_run

from lightning_softprompt import __version__
from lightning_softprompt.cli.app import main
from lightning_softprompt.runs.run_spec import last_folder

LABELS = {"negative": "bad", "neutral": "one", "positive": "good"}


@pytest.fixture
def run_command(tmp_path, rows, tiny_folder, monkeypatch):
    """Runs a command offline and returns its run folder."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    data = write_splits(tmp_path / "data", train=rows * 3, validation=rows, test=rows[:5])
    common = [
        f"--backbone.name={tiny_folder('llama')}",
        "--data=ClassificationDataModule",
        f"--data.path={data}",
        "--data.template={soft}{text} it is{target}",
        f"--data.labels={json.dumps(LABELS)}",
        "--data.batch_size=2",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--run.folder={tmp_path / 'runs'}",
        "--run.experiment=words",
        "--run.wandb=offline",
    ]
    training = [
        "--model=PromptTuning",
        "--model.length=3",
        "--trainer.max_epochs=-1",
        "--trainer.val_check_interval=1",
        "--trainer.log_every_n_steps=1",
    ]

    def run_command(command, *options):
        arguments = [*training, *common] if command == "fit" else []
        assert main([command, *arguments, *options]) == 0
        return last_folder()

    return run_command


def test_a_training_is_described_by_name_group_job_type_tags_config_and_summary(run_command, tiny_folder):
    folder = run_command("fit", "--trainer.max_steps=2")
    run = read_run(folder)
    assert (run.name, run.group, run.job_type, run.notes) == (folder.name, "words", "fit", "")
    assert run.tags == ("PromptTuning", "ClassificationDataModule", tiny_folder("llama").name)
    assert run.config["method"] == "PromptTuning"
    assert run.config["n_trainable"] == 3 * 32
    assert run.config["n_frozen"] > 1000
    assert run.config["versions"]["lightning_softprompt"] == __version__
    assert run.config["versions"]["torch"] == torch.__version__
    assert len(run.config["backbone_fingerprint"]) >= 8
    report = json.loads((folder / "metrics.json").read_text())
    assert run.config["rows_train"] == run.summary["rows_train"]
    assert run.summary["rows_validation"] * 3 == run.summary["rows_train"]
    assert run.summary["trainable_parameters"] == 3 * 32
    assert run.summary["best_value"] == report["best"]["value"]
    assert run.summary["best_step"] == report["best"]["global_step"]
    assert run.summary["seconds"] == report["seconds"]
    assert run.is_complete
    assert run.rows("plots/learning_curve")
    assert len(run.rows("plots/val_confusion")) == 2


def test_options_replace_the_default_description(run_command):
    options = ["--run.display_name=short", "--run.group=g", "--run.job_type=j", "--run.tags=[a,b]", "--run.notes=why"]
    run = read_run(run_command("fit", "--trainer.max_steps=1", *options))
    assert (run.name, run.group, run.job_type, run.tags, run.notes) == ("short", "g", "j", ("a", "b"), "why")


def test_a_resumed_training_and_evaluations_continue_the_run(run_command):
    folder = run_command("fit", "--trainer.max_steps=1")
    first = read_run(folder)
    assert json.loads((folder / "run.json").read_text())["wandb_id"] == first.id
    resumed = run_command("fit", "--trainer.max_steps=2", f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}")
    assert resumed != folder
    assert read_run(resumed).id == first.id
    tested = run_command("test", f"--ckpt_path={folder / 'checkpoints' / 'best.ckpt'}")
    assert read_run(tested).id == first.id
    assert json.loads((tested / "run.json").read_text())["wandb_id"] == first.id
    validated = run_command("validate", f"--init_from={folder / 'prompt.safetensors'}")
    assert read_run(validated).id == first.id
    separate = run_command("test", f"--init_from={folder / 'prompt.safetensors'}", "--run.display_name=other data")
    assert read_run(separate).id != first.id
    assert read_run(separate).name == "other data"
    again = run_command("fit", "--trainer.max_steps=1", f"--init_from={folder / 'prompt.safetensors'}")
    assert read_run(again).id != first.id


def test_a_test_logs_metrics_confusion_matrix_and_predictions(run_command):
    folder = run_command("fit", "--trainer.max_steps=1")
    tested = run_command("test", f"--ckpt_path={folder / 'checkpoints' / 'best.ckpt'}")
    run = read_run(tested)
    report = json.loads((tested / "metrics.json").read_text())
    assert run.rows("test/accuracy")[0]["test/accuracy"] == report["test"]["test/accuracy"]
    assert run.rows("plots/test_confusion")
    assert run.config["rows_test"] == 5
    (table,) = run.tables("test/predictions")
    scores = [f"score/{name}" for name in LABELS]
    assert table["columns"] == ["row", "input", "target", "prediction", "correct", *scores]
    assert [row[0] for row in table["data"]] == [0, 1, 2, 3, 4]
    correct = [row[4] for row in table["data"]]
    assert correct == [row[2] == row[3] for row in table["data"]]
    assert sum(correct) / 5 == pytest.approx(report["test"]["test/accuracy"])
    assert run.is_complete


def test_the_prompt_is_an_artifact_and_other_runs_name_the_prompt_that_they_start_from(run_command, tiny_folder):
    folder = run_command("fit", "--trainer.max_steps=1")
    run = read_run(folder)
    (artifact,) = [artifact for artifact in run.artifacts if artifact.type == "soft-prompt"]
    assert artifact.name == f"prompt-{run.id}"
    assert set(artifact.aliases) == {"best", "latest"}
    report = json.loads((folder / "metrics.json").read_text())
    metadata = json.loads(artifact.metadata)
    assert (metadata["method"], metadata["length"]) == ("PromptTuning", 3)
    assert metadata["backbone"] == str(tiny_folder("llama"))
    assert metadata["backbone_fingerprint"] == run.config["backbone_fingerprint"]
    assert (metadata["metric"], metadata["value"]) == ("val/accuracy", report["best"]["value"])
    assert [entry.path for entry in artifact.manifest.contents] == ["prompt.safetensors"]
    start = f"--init_from={folder / 'prompt.safetensors'}"
    assert "used_prompt" not in run.config
    assert "used_prompt" not in read_run(run_command("test", start)).config  # the same run
    assert read_run(run_command("fit", "--trainer.max_steps=1", start)).config["used_prompt"] == f"{artifact.name}:best"


def test_metrics_of_classes_have_a_section_of_their_own_and_no_number_is_logged_twice(run_command):
    folder = run_command("fit", "--trainer.max_steps=1", "--run.monitor=f1/positive")
    run = read_run(folder)
    report = json.loads((folder / "metrics.json").read_text())["val"]
    assert report["val/cross_entropy"] == report["val/loss"]
    assert run.rows("val/loss")
    assert not run.rows("val/cross_entropy")
    assert run.rows("val_by_class/f1/negative")[0]["val_by_class/f1/negative"] == report["val/f1/negative"]
    assert run.rows("val/f1/positive")  # the monitored metric
    sections = [name for row in run.history for name in row if name.startswith("val/")]
    assert {name.count("/") for name in sections if name != "val/f1/positive"} == {1}


EXTRAS = {"TensorBoardLogger": "tensorboard", "MLFlowLogger": "mlflow"}


@pytest.mark.parametrize("logger", EXTRAS)
def test_a_logger_whose_package_is_not_installed_names_the_extra(run_command, capsys, monkeypatch, logger):
    """The message comes from the requirements that Lightning checks, which are false here."""
    monkeypatch.setattr("lightning.pytorch.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE", False)
    monkeypatch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE", Unavailable())
    with pytest.raises(AssertionError):
        run_command("fit", "--trainer.max_steps=1", f"--trainer.logger={logger}")
    message = f"{logger} requires the package {EXTRAS[logger]}: pip install 'lightning-softprompt[{EXTRAS[logger]}]'"
    assert message in capsys.readouterr().err


class Unavailable:
    def __bool__(self):
        return False

    def __str__(self):
        return "Requirement 'mlflow>=1.0.0' not met."


def test_tensorboard_logs_next_to_the_runs(run_command, tmp_path):
    pytest.importorskip("tensorboard")
    run_command("fit", "--trainer.max_steps=1", "--trainer.logger=TensorBoardLogger")
    assert [*(tmp_path / "runs").rglob("events.out.tfevents.*")]
