"""A checkpoint that was edited is refused by name before a run folder exists."""

import pytest
import torch
from row_files import write_rows

from lightning_softprompt.cli.app import main


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory, tiny_folder):
    """Options of a run, and the checkpoint of its third step."""
    folder = tmp_path_factory.mktemp("trained_run")
    rows = [{"text": "a warm film", "label": label} for label in ("good", "bad")] * 6
    for split in ("train", "validation"):
        write_rows(folder / f"{split}.jsonl", rows)
    options = [
        "--model=PromptTuning", "--model.length=2", f"--backbone.name={tiny_folder('llama')}",
        "--data=ClassificationDataModule", f"--data.path={folder}", "--data.labels=[bad, good]",
        "--data.template={soft}{text} it is{target}", "--data.batch_size=2", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false", "--run.wandb=disabled",
    ]  # fmt: skip
    once = ["--trainer.max_steps=3", "--trainer.val_check_interval=3", f"--run.folder={folder / 'first'}"]
    assert main(["fit", *options, *once, "--run.name=one"]) == 0
    return [
        *options,
        "--trainer.val_check_interval=3",
    ], folder / "first" / "default" / "one" / "checkpoints" / "last.ckpt"


def random_state(checkpoint):
    return checkpoint["callbacks"]["RngState"]["ranks"][0]


def moments(checkpoint):
    return checkpoint["optimizer_states"][0]["state"][0]


SHORT = torch.zeros(3, dtype=torch.uint8)
CHANGES = {
    "no optimizer groups": lambda saved: saved["optimizer_states"][0].pop("param_groups"),
    "more optimizer groups": lambda saved: saved["optimizer_states"][0]["param_groups"].append({"params": [7]}),
    "an optimizer state that is a text": lambda saved: saved.update(optimizer_states=["x"]),
    "no moments": lambda saved: saved["optimizer_states"][0].update(state={}),
    "a moment of another shape": lambda saved: moments(saved).update(exp_avg=torch.zeros(5)),
    "a moment that is a number": lambda saved: moments(saved).update(exp_avg_sq=1.0),
    "no random state": lambda saved: random_state(saved).pop("torch"),
    "a random state of another length": lambda saved: random_state(saved).update(torch=SHORT),
    "a random state of another type": lambda saved: random_state(saved).update(python="x"),
    "random states that are a number": lambda saved: saved["callbacks"]["RngState"].update(ranks=1),
    "another step": lambda saved: saved.update(global_step=2),
    "another epoch": lambda saved: saved.update(epoch=7),
    "loops without counts": lambda saved: saved["loops"]["fit_loop"].update(epoch_progress=3),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_an_edited_checkpoint_is_named(trained_run, change, tmp_path, capfd):
    options, checkpoint = trained_run
    saved = torch.load(checkpoint, weights_only=True)
    CHANGES[change](saved)
    edited = tmp_path / "last.ckpt"
    torch.save(saved, edited)
    capfd.readouterr()
    command = ["fit", *options, "--trainer.max_steps=6", f"--run.folder={tmp_path / 'runs'}", f"--ckpt_path={edited}"]
    assert main(command) == 2
    error = capfd.readouterr().err.strip().splitlines()[-2]
    assert error.startswith(f"error: {edited} cannot be resumed: it was changed")
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_as_it_was_written_is_resumed(trained_run, tmp_path):
    options, checkpoint = trained_run
    command = ["--trainer.max_steps=6", f"--run.folder={tmp_path / 'runs'}", f"--ckpt_path={checkpoint}"]
    assert main(["fit", *options, *command]) == 0
