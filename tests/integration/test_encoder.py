"""P-tuning v2 with a class head on a real encoder that has no language-modeling head."""

import pytest
import torch
from row_files import write_rows
from runs import read_metrics

from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.cli.app import main
from lightning_softprompt.cli.commands import doctor
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import SoftPrompt

BEGINNINGS = ("Yesterday", "This morning", "Last week", "In the end", "Once more", "As ever", "At noon", "Today")
TEXTS = {
    "sport": (
        "the team won the match by two goals.",
        "the striker missed a penalty.",
        "she ran the race in record time.",
    ),
    "food": ("we baked bread with salt and butter.", "the soup wanted more garlic.", "he fried onions in a pan."),
}
ROWS = [
    {"text": f"{beginning} {text}", "label": label}
    for beginning in BEGINNINGS
    for label, texts in TEXTS.items()
    for text in texts
]


@pytest.mark.slow
def test_it_learns_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, rows in (("train", ROWS[:36]), ("validation", ROWS[36:])):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    code = main([
        "fit", "--backbone.name", "all-minilm-l6-v2", "--model", "PTuningV2", "--model.length", "4",
        "--model.readout", "ClassHead", "--data", "ClassificationDataModule", "--data.train", "train.jsonl",
        "--data.validation", "validation.jsonl", "--data.template", "{text}{target}", "--data.labels", "[sport, food]",
        "--data.batch_size", "12", "--trainer.max_epochs", "8", "--trainer.accelerator", "cpu",
        "--trainer.enable_progress_bar", "false", "--run.wandb", "disabled",
    ])  # fmt: skip
    assert code == 0
    (run,) = (tmp_path / "runs" / "default").iterdir()
    report = read_metrics(run)
    assert report["val"]["val/accuracy"] > 0.9
    assert report["trainable_parameters"] == 4 * 2 * 6 * 384 + 384 * 2 + 2


@pytest.mark.slow
def test_an_encoder_without_a_head_has_no_logits():
    backbone = load_backbone(BackboneSpec(name="all-minilm-l6-v2"))
    pieces = Template("{text}{target}").pieces({"text": "a dog"})
    row = backbone.codec.collate([backbone.codec.encode(pieces, "good")])
    with pytest.raises(ValueError, match="has no language-modeling head"):
        backbone(row)
    assert backbone.hidden_states(row, SoftPrompt(tokens=torch.zeros(1, 2, 384))).shape[-1] == 384


@pytest.mark.slow
def test_the_doctor_reports_that_it_has_no_head(capsys):
    doctor.main(["--backbone", "all-minilm-l6-v2"])
    assert "use ClassHead or TokenHead as the readout" in capsys.readouterr().out
