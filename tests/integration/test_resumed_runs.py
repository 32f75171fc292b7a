"""A run resumes in its folder, in a new one or in the one it was moved to; with other settings it is refused."""

import shutil

import pytest
import torch
from row_files import write_rows
from runs import read_metrics

from lightning_softprompt.checkpoints.checkpoint_file import load_checkpoint
from lightning_softprompt.checkpoints.class_names import class_names
from lightning_softprompt.checkpoints.prompt_file import read_prompt
from lightning_softprompt.cli.app import main
from lightning_softprompt.runs.run_spec import last_folder

CLASSES = ["negative", "neutral", "positive"]
REORDERED = '--data.labels={"positive": "good", "neutral": "one", "negative": "bad"}'
OPPOSITE = {"negative": "positive", "positive": "negative"}


def with_opposite_labels(rows):
    return [{**row, "label": OPPOSITE.get(row["label"], row["label"])} for row in rows]


@pytest.fixture
def argv(tmp_path, rows, tiny_folder):
    """Options of a run with wrong validation labels, so that its best checkpoint is an early one."""
    write_rows(tmp_path / "train.jsonl", rows * 3)
    write_rows(tmp_path / "validation.jsonl", with_opposite_labels(rows))
    return [
        "--model=PromptTuning", "--model.length=3", "--model.optimizer=AdamW", "--model.optimizer.lr=0.1",
        "--data=ClassificationDataModule", f"--data.train={tmp_path / 'train.jsonl'}", "--data.batch_size=8",
        f"--data.validation={tmp_path / 'validation.jsonl'}", "--data.template={soft}{text} it is{target}",
        '--data.labels={"negative": "bad", "neutral": "one", "positive": "good"}', "--run.wandb=disabled",
        f"--backbone.name={tiny_folder('llama')}", f"--run.folder={tmp_path / 'runs'}",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.val_check_interval=1",
    ]  # fmt: skip


@pytest.fixture
def fit(argv):
    """A function that trains and returns the run folder."""

    def fit(steps, *options):
        assert main(["fit", *argv, f"--trainer.max_steps={steps}", *options]) == 0
        return last_folder()

    return fit


def step_of(folder, name="best"):
    return load_checkpoint(folder / "checkpoints" / f"{name}.ckpt")["global_step"]


def steps_of_best_checkpoints(folder):
    return {path.name: step_of(folder, path.stem) for path in folder.glob("checkpoints/best*.ckpt")}


def check_equal_ends(uninterrupted, resumed):
    for path in uninterrupted.glob("*.safetensors"):
        one, other = read_prompt(path), read_prompt(resumed / path.name)
        assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items()), path.name
    assert steps_of_best_checkpoints(uninterrupted) == steps_of_best_checkpoints(resumed)
    assert read_metrics(uninterrupted)["best"] == read_metrics(resumed)["best"]


@pytest.mark.parametrize("options", [[], ["--replicas=2"]], ids=["one prompt", "replicas"])
def test_the_best_prompt_survives_a_move_and_a_new_folder(fit, tmp_path, options, recwarn):
    uninterrupted, half = fit(8, *options), fit(5, *options)
    assert step_of(uninterrupted) < 5, "the best checkpoint must be older than the resumed one"
    new = fit(8, *options, f"--ckpt_path={half / 'checkpoints' / 'last.ckpt'}", "--run.name=new")
    check_equal_ends(uninterrupted, new)
    shutil.move(half.parent, tmp_path / "moved" / "default")
    moved = fit(8, *options, f"--run.folder={tmp_path / 'moved'}", "--ckpt_path=last", f"--run.name={half.name}")
    assert moved == tmp_path / "moved" / "default" / half.name
    check_equal_ends(moved.parent / uninterrupted.name, moved)
    assert not [warning for warning in recwarn if "dirpath" in str(warning.message)]


def test_a_missing_best_checkpoint_is_reported(fit, caplog):
    half = fit(5)
    (half / "checkpoints" / "best.ckpt").unlink()
    resumed = fit(8, f"--ckpt_path={half / 'checkpoints' / 'last.ckpt'}")
    assert "only later validations are considered" in caplog.text
    assert step_of(resumed) > 5


def test_other_rows_and_settings_are_refused_before_anything_is_written(fit, argv, tmp_path, rows, capsys):
    half = fit(4)
    config = (half / "config.yaml").read_bytes()
    write_rows(tmp_path / "train.jsonl", with_opposite_labels(rows * 3))
    again = ["fit", *argv, "--trainer.max_steps=6", "--ckpt_path=last"]
    capsys.readouterr()
    assert main([*again, "--trainer.accumulate_grad_batches=2"]) == 2
    error = capsys.readouterr().err
    assert "train_rows was '18 rows (" in error
    assert "trainer.accumulate_grad_batches was 1 and is 2" in error
    assert (half / "config.yaml").read_bytes() == config
    assert main([*again, "--run.accept_changes=train_rows"]) == 0
    assert main([*again, "--trainer.max_steps=8"]) == 0, "the run has accepted the changed rows"


def test_a_file_that_was_moved_is_no_change(fit, tmp_path):
    half = fit(4)
    (tmp_path / "train.jsonl").rename(tmp_path / "moved.jsonl")
    fit(6, f"--data.train={tmp_path / 'moved.jsonl'}", f"--ckpt_path={half / 'checkpoints' / 'last.ckpt'}")


def test_checkpoints_of_earlier_versions_are_resumed_with_a_warning(fit, caplog):
    last = fit(4) / "checkpoints" / "last.ckpt"
    checkpoint = load_checkpoint(last)
    del checkpoint["settings"]
    torch.save(checkpoint, last)
    fit(6, f"--ckpt_path={last}")
    assert "was written by an earlier version without digests" in caplog.text
    del checkpoint["loops"]
    torch.save(checkpoint, last)
    with pytest.raises(AssertionError):
        fit(6, f"--ckpt_path={last}")


def test_a_used_name_is_refused(fit, argv, capsys):
    fit(2, "--run.name=one")
    assert main(["fit", *argv, "--trainer.max_steps=2", "--run.name=one"]) == 2
    assert "already contains a trained run" in capsys.readouterr().err


def test_a_trained_head_is_refused_for_other_classes(fit, tmp_path, rows, capsys):
    folder = fit(2, "--model.readout=ClassHead")
    prompt = folder / "prompt.safetensors"
    assert class_names(read_prompt(prompt).method) == CLASSES
    write_rows(tmp_path / "test.jsonl", rows)
    shared = [
        "--trainer.accelerator=cpu",
        f"--run.folder={tmp_path / 'runs'}",
        f"--data.test={tmp_path / 'test.jsonl'}",
    ]
    predict = [*shared, f"--data.predict={tmp_path / 'test.jsonl'}", f"--init_from={prompt}"]
    best = f"--ckpt_path={folder / 'checkpoints' / 'best.ckpt'}"
    for command in (["test", *shared, best], ["validate", *shared, best], ["predict", *predict]):
        capsys.readouterr()
        assert main([*command, REORDERED]) == 2
        assert f"for the classes {CLASSES}, in this order, but the data has {CLASSES[::-1]}" in capsys.readouterr().err
    assert main(["test", *shared, best]) == 0
