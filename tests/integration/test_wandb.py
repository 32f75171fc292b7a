"""What W&B gets from the run commands, read from the files of offline runs."""

import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import tiny
import torch
from PIL import Image
from row_files import read_rows, write_splits
from wandb_file import read_run

from lightning_softprompt import __version__
from lightning_softprompt.__main__ import main as softprompt
from lightning_softprompt.cli.app import main
from lightning_softprompt.cli.commands.prompts import main as prompts_command
from lightning_softprompt.runs.run_spec import last_folder

pytestmark = pytest.mark.wandb
LABELS = {"negative": "bad", "neutral": "one", "positive": "good"}
PLUGIN = """
from lightning.pytorch import Callback

class Note(Callback):
    def on_fit_end(self, trainer, pl_module):
        print("the training has ended")
"""


@pytest.fixture(scope="module")
def patches():
    """Patches for all tests of this file."""
    with pytest.MonkeyPatch.context() as patches:
        patches.delenv("WANDB_MODE", raising=False)
        patches.setenv("WANDB_X_STATS_SAMPLING_INTERVAL", "0.2")  # seconds
        yield patches


@pytest.fixture(scope="module")
def root(tmp_path_factory, patches):
    """The folder of the data, the plug-in and the runs."""
    root = tmp_path_factory.mktemp("wandb")
    texts = (*tiny.TEXTS, "that dog is one dog", "what ?")
    labels = ("positive", "negative", "negative", "positive", "neutral", "neutral")
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    write_splits(root / "moods", train=rows * 3, validation=rows, test=rows[:5])
    (root / "my_note.py").write_text(PLUGIN)
    patches.syspath_prepend(str(root))
    run_git(root, "init")
    run_git(root, "add", "my_note.py")
    run_git(root, "-c", "user.name=n", "-c", "user.email=e", "commit", "--message", "a plug-in")
    patches.chdir(root)
    return root


def run_git(folder, *arguments):
    """Run git in a folder and return its output."""
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def run_command(root, tiny_folder):
    """Runs a command offline and returns its run folder."""
    common = [
        f"--backbone.name={tiny_folder('llama')}",
        "--data=ClassificationDataModule",
        f"--data.path={root / 'moods'}",
        "--data.template={soft}{text} it is{target}",
        f"--data.labels={json.dumps(LABELS)}",
        "--data.batch_size=2",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--run.folder={root / 'runs'}",
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
        is_complete = any(option.startswith(("--ckpt_path=", "--init_from=")) for option in options)
        arguments = [*training, *common] if command == "fit" else ([] if is_complete else common)
        assert main([command, *arguments, *options]) == 0
        return last_folder()

    return run_command


@pytest.fixture(scope="module")
def trained(run_command):
    """A training of two steps, its W&B run and its report."""
    folder = run_command("fit", "--trainer.max_steps=2", "--trainer.callbacks+=my_note.Note", "--run.table_rows=4")
    print("a line of the next command")
    report = json.loads((folder / "metrics.json").read_text())
    best = folder / "checkpoints" / "best.ckpt"
    prompt = folder / "prompt.safetensors"
    return SimpleNamespace(folder=folder, run=read_run(folder), report=report, best=best, prompt=prompt)


@pytest.fixture(scope="module")
def tested(run_command, trained):
    """A test of the best checkpoint, its W&B run and its report."""
    folder = run_command("test", f"--ckpt_path={trained.best}")
    report = json.loads((folder / "metrics.json").read_text())
    return SimpleNamespace(folder=folder, run=read_run(folder), report=report)


def test_a_run_has_the_name_of_its_folder_and_an_id_that_its_record_and_its_files_have(trained):
    run = trained.run
    assert run.name == trained.folder.name
    assert json.loads((trained.folder / "run.json").read_text())["wandb_id"] == run.id
    assert torch.load(trained.best, weights_only=True)["wandb_run"] == {"id": run.id}
    assert (run.is_complete, run.exit_code) == (True, 0)


def test_a_run_has_a_group_a_job_type_tags_and_notes(trained, tiny_folder):
    run = trained.run
    assert (run.project, run.group, run.job_type, run.notes) == ("lightning-softprompt", "words", "fit", "")
    assert run.tags == ("PromptTuning", "ClassificationDataModule", tiny_folder("llama").name)


def test_the_config_has_the_options_and_describes_the_run(trained):
    config = trained.run.config
    assert config["model"]["init_args"]["length"] == 3
    assert (config["method"], config["data_module"], config["dataset"]) == (
        "PromptTuning",
        "ClassificationDataModule",
        "moods",
    )
    assert config["n_trainable"] == 3 * 32
    assert config["n_frozen"] > 1000
    assert (config["rows_train"], config["rows_validation"]) == (18, 6)
    assert len(config["backbone_fingerprint"]) >= 8
    assert config["versions"]["lightning_softprompt"] == __version__
    assert config["versions"]["torch"] == torch.__version__


def test_the_commit_of_the_current_folder_is_logged(trained, root):
    commit = run_git(root, "rev-parse", "HEAD")
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert trained.run.config["git_commit"] == commit
    assert trained.run.commit == commit  # W&B shows it as the git state of the run


def test_metrics_are_drawn_over_optimizer_steps(trained):
    run = trained.run
    for name in ("*", "val/accuracy", "val/loss"):
        assert run.metrics[name].step_metric == "trainer/global_step"
    assert run.metrics["val/accuracy"].summary.max
    assert run.metrics["val/loss"].summary.min
    assert [row["trainer/global_step"] for row in run.rows("val/loss")] == [0, 1]
    assert {"speed/", "prompt/", "train/"} <= {name.partition("/")[0] + "/" for row in run.history for name in row}


def test_the_summary_has_sizes_rows_time_and_the_best_validation(trained):
    summary, report = trained.run.summary, trained.report
    assert summary["trainable_parameters"] == 3 * 32
    assert summary["frozen_parameters"] == trained.run.config["n_frozen"]
    assert (summary["rows_train"], summary["rows_validation"]) == (18, 6)
    assert summary["best_metric"] == "val/accuracy"
    assert summary["best_value"] == report["best"]["value"] == summary["val/accuracy"]["max"]
    assert summary["best_step"] == report["best"]["global_step"]
    assert summary["seconds"] == report["seconds"]


def test_a_test_adds_metrics_the_confusion_matrix_and_predictions_to_the_run_of_the_training(trained, tested):
    run = tested.run
    assert run.id == trained.run.id
    assert json.loads((tested.folder / "run.json").read_text())["wandb_id"] == trained.run.id
    assert run.rows("test/accuracy")[0]["test/accuracy"] == tested.report["test"]["test/accuracy"]
    assert run.rows("plots/test_confusion")
    assert run.config["rows_test"] == 5
    assert "used_prompt" not in run.config  # it is the run of the prompt
    assert (run.is_complete, run.exit_code) == (True, 0)


def test_tables_have_the_rows_their_predictions_and_the_score_of_each_class(trained, tested):
    scores = [f"score/{name}" for name in LABELS]
    (table,) = tested.run.tables("test/predictions")
    assert table["columns"] == ["row", "input", "target", "prediction", "correct", *scores]
    assert [row[0] for row in table["data"]] == [0, 1, 2, 3, 4]
    correct = [row[4] for row in table["data"]]
    assert correct == [row[2] == row[3] for row in table["data"]]
    assert sum(correct) / 5 == pytest.approx(tested.report["test"]["test/accuracy"])
    tables = trained.run.tables("val/predictions")
    assert [of_step["columns"] for of_step in tables] == [["step", *table["columns"]]] * 2
    assert [[row[0] for row in table["data"]] for table in tables] == [[1] * 4, [2] * 4]  # run.table_rows rows
    assert [row[1] for row in tables[0]["data"]] == [0, 1, 2, 3]


def test_histograms_of_the_prompt_are_logged_after_each_validation(trained):
    histograms = [row["prompt/row_norms"] for row in trained.run.rows("prompt/row_norms")]
    assert [sum(histogram["values"]) for histogram in histograms] == [3, 3]


def test_plots_are_images_and_the_confusion_matrix_is_that_of_the_best_validation(trained):
    run = trained.run
    assert len(run.rows("plots/val_confusion")) == 2
    assert len(run.rows("plots/learning_curve")) == 1
    (best,) = run.rows("plots/val_confusion_best")
    index = trained.report["best"]["global_step"] - 1
    of_best = read_pixels(run, run.rows("plots/val_confusion")[index]["plots/val_confusion"])
    assert read_pixels(run, best["plots/val_confusion_best"]) == of_best
    assert Image.open(trained.folder / "plots" / "val_confusion.png").tobytes() == of_best


def read_pixels(run, images):
    (name,) = images["filenames"]
    return Image.open(run.folder / "files" / name).tobytes()


def test_the_prompt_is_an_artifact_with_metadata(trained, tiny_folder):
    run, report = trained.run, trained.report
    (artifact,) = [artifact for artifact in run.artifacts if artifact.type == "soft-prompt"]
    assert artifact.name == f"prompt-{run.id}"
    assert set(artifact.aliases) == {"best", "latest"}
    metadata = json.loads(artifact.metadata)
    assert (metadata["method"], metadata["length"]) == ("PromptTuning", 3)
    assert metadata["backbone"] == str(tiny_folder("llama"))
    assert metadata["backbone_fingerprint"] == run.config["backbone_fingerprint"]
    assert (metadata["metric"], metadata["value"]) == ("val/accuracy", report["best"]["value"])
    assert [entry.path for entry in artifact.manifest.contents] == ["prompt.safetensors"]


def test_system_metrics_and_the_source_of_plug_ins_are_logged(trained, tested):
    assert trained.run.num_stats > 0
    (artifact,) = [artifact for artifact in trained.run.artifacts if artifact.type == "plug-in"]
    assert [entry.path for entry in artifact.manifest.contents] == ["my_note.py"]
    assert not [artifact for artifact in tested.run.artifacts if artifact.type == "plug-in"]


def test_the_console_log_has_the_output_of_its_command_alone(trained, tested):
    output = (trained.run.folder / "files" / "output.log").read_text()
    assert "the training has ended" in output
    assert "a line of the next command" not in output
    assert "test/accuracy" not in output


def test_a_resumed_training_continues_the_run(run_command, trained):
    last = trained.folder / "checkpoints" / "last.ckpt"
    resumed = run_command("fit", "--trainer.max_steps=3", f"--ckpt_path={last}", "--trainer.callbacks+=my_note.Note")
    assert resumed != trained.folder
    run = read_run(resumed)
    assert run.id == trained.run.id
    assert [row["trainer/global_step"] for row in run.rows("val/loss")] == [2]


def test_a_validation_continues_the_run_unless_it_has_a_name(run_command, trained):
    start = f"--init_from={trained.prompt}"
    assert read_run(run_command("validate", start)).id == trained.run.id
    separate = read_run(run_command("validate", start, "--run.display_name=other data"))
    assert separate.id != trained.run.id
    assert (separate.name, separate.job_type) == ("other data", "validate")
    assert separate.config["used_prompt"] == f"prompt-{trained.run.id}:best"


def test_predictions_are_linked_to_their_prompt(run_command, trained, root):
    folder = run_command("predict", f"--ckpt_path={trained.best}", f"--data.predict={root / 'moods' / 'test.jsonl'}")
    assert len(read_rows(folder / "predictions.jsonl")) == 5
    run = read_run(folder)
    assert run.id != trained.run.id
    assert (run.job_type, run.group, run.config["used_prompt"]) == ("predict", "words", f"prompt-{trained.run.id}:best")
    assert (run.is_complete, run.exit_code) == (True, 0)


def test_a_training_from_a_library_is_linked_to_the_prompt_of_the_library(run_command, trained, root):
    library = root / "library"
    assert prompts_command(["add", "moods", str(trained.prompt), "--folder", str(library)]) == 0
    again = run_command("fit", "--trainer.max_steps=1", f"--init_from={library / 'moods.safetensors'}")
    run = read_run(again)
    assert run.id != trained.run.id
    assert run.config["used_prompt"] == f"prompt-{trained.run.id}:best"
    assert "used_prompt" not in trained.run.config


def test_a_training_whose_initializer_reads_prompts_is_linked_to_them(run_command, trained, root):
    other = run_command("fit", "--trainer.max_steps=1")
    library = root / "similar"
    for name, prompt in (("one", trained.prompt), ("two", other / "prompt.safetensors")):
        assert prompts_command(["add", name, str(prompt), "--folder", str(library)]) == 0
    trained_prompt, other_prompt = (f"prompt-{read_run(folder).id}:best" for folder in (trained.folder, other))
    query = f"query: {other / 'prompt.safetensors'}, folder: {library}"

    def find_used(initializer):
        run = read_run(run_command("fit", "--trainer.max_steps=1", f"--model.init={initializer}"))
        return run.config["used_prompt"].split(", ")

    checkpoint = f"{{class_path: FromCheckpoint, init_args: {{path: {trained.prompt}}}}}"
    assert find_used(checkpoint) == [trained_prompt]
    average = f"{{class_path: FromCheckpoints, init_args: {{paths: [{trained.best}, {trained.prompt}]}}}}"
    assert find_used(average) == [trained_prompt]  # of one run
    mixed = find_used(f"{{class_path: FromLibrary, init_args: {{{query}, top: 2}}}}")
    assert set(mixed) == {trained_prompt, other_prompt}
    assert find_used(f"{{class_path: FromLibrary, init_args: {{{query}, top: 1}}}}") == mixed[:1]
    # the prompt of --init_from replaces the initial value
    both = run_command(
        "fit",
        "--trainer.max_steps=1",
        f"--init_from={other / 'prompt.safetensors'}",
        f"--model.init={checkpoint}",
    )
    assert read_run(both).config["used_prompt"] == other_prompt
    # the test of a prompt adds to its run, which is not linked to it
    tested = read_run(run_command("test", f"--ckpt_path={both / 'checkpoints' / 'best.ckpt'}"))
    assert "used_prompt" not in tested.config


def test_the_test_of_a_folded_prompt_is_linked_to_it(run_command, trained, root):
    folded = root / "folded.safetensors"
    assert softprompt(["fold", str(trained.prompt), "--out", str(folded)]) == 0
    options = ["--model=Folded", f"--model.path={folded}", f"--data.path={root / 'moods'}"]
    run = read_run(run_command("test", *options))
    assert run.id != trained.run.id
    assert run.config["used_prompt"] == f"prompt-{trained.run.id}:best"


def test_without_wandb_a_prompt_has_no_id_and_its_predictions_have_no_run(run_command, root):
    folder = run_command("fit", "--trainer.max_steps=1", "--run.wandb=disabled")
    test_file = root / "moods" / "test.jsonl"
    options = [f"--init_from={folder / 'prompt.safetensors'}", f"--data.predict={test_file}", "--run.wandb=offline"]
    predicted = run_command("predict", *options)
    assert len(read_rows(predicted / "predictions.jsonl")) == 5
    assert not (predicted / "wandb").exists()


def test_replicas_share_a_run_and_runs_are_linked_to_the_prompt_of_a_replica(run_command, root):
    folder = run_command("fit", "--trainer.max_steps=1", "--replicas=2")
    run = read_run(folder)
    names = {artifact.name for artifact in run.artifacts if artifact.type == "soft-prompt"}
    assert names == {f"prompt-{run.id}-replica_1", f"prompt-{run.id}-replica_2"}
    assert run.rows("val/accuracy/replica_1")
    assert run.rows("val/accuracy/replica_2")
    copy = root / "copied.safetensors"
    shutil.copy(folder / "replica_2.safetensors", copy)
    started = read_run(run_command("fit", "--trainer.max_steps=1", f"--init_from={copy}"))
    assert started.config["used_prompt"] == f"prompt-{run.id}-replica_2:best"
    last = folder / "checkpoints" / "last.ckpt"
    predicted = run_command("predict", f"--ckpt_path={last}", f"--data.predict={root / 'moods' / 'test.jsonl'}")
    both = f"prompt-{run.id}-replica_1:best, prompt-{run.id}-replica_2:best"
    assert read_run(predicted).config["used_prompt"] == both


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


def test_options_replace_the_default_description(run_command):
    options = ["--run.display_name=short", "--run.group=g", "--run.job_type=j", "--run.tags=[a,b]", "--run.notes=why"]
    run = read_run(run_command("fit", "--trainer.max_steps=1", *options))
    assert (run.name, run.group, run.job_type, run.tags, run.notes) == ("short", "g", "j", ("a", "b"), "why")


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


def test_tensorboard_logs_in_the_run_folder(run_command, root):
    pytest.importorskip("tensorboard")
    config = root / "tensorboard.yaml"
    config.write_text("trainer:\n  logger: TensorBoardLogger\n")
    for option in ("--trainer.logger=TensorBoardLogger", f"--config={config}"):
        folder = run_command("fit", "--trainer.max_steps=1", "--run.wandb=disabled", option)
        assert [*(folder / "lightning_logs").rglob("events.out.tfevents.*")]
        assert [*(root / "runs").rglob("lightning_logs")] == [folder / "lightning_logs"]
        shutil.rmtree(folder / "lightning_logs")
    assert not (root / "runs" / "lightning_logs").exists()
