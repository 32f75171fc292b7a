"""A prompt on wordings of its test rows that the training did not use."""

import json

import pytest
import torch
from row_files import write_splits

import lightning_softprompt as sp
from lightning_softprompt.__main__ import main
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.data.classification import ClassificationDataModule
from lightning_softprompt.inference.wording_test import WordingScore, compare_wordings, use_paraphrase, use_template

ROWS = [{"text": text, "label": label} for text, label in
        [("a warm film", "good"), ("dull", "bad"), ("a sad story", "bad"), ("a funny dog", "good")]]  # fmt: skip
USUAL, OTHER = "{soft}{text} it was {target}", "{soft}this story : {text} {target}"


@pytest.fixture
def data(tiny_folder):
    spec = sp.BackboneSpec(name=str(tiny_folder("llama")))
    return ClassificationDataModule(
        USUAL, labels=["good", "bad"], backbone=spec, train=ROWS, validation=ROWS, test=ROWS, cache=False,
        eval_batch_size=3,
    )  # fmt: skip


@pytest.fixture
def module(data):
    module = sp.PromptTuning(data=data, length=2)
    module.attach(load_backbone(data.spec))
    return module


def expected(module, data, template):
    """Returns the loss and accuracy of each row alone, in a template."""
    other = ClassificationDataModule(
        template, labels=["good", "bad"], backbone=data.spec, train=ROWS, validation=ROWS, test=ROWS, cache=False
    )
    losses, correct = [], []
    for item in other.split("test"):
        batch = other.collate([item])
        with torch.no_grad():
            losses.append(float(module.lm().cross_entropy(batch).sum() / (batch.targets >= 0).sum()))
            correct.append(float(module.lm().scores(batch).argmax(-1) == batch.labels))
    return losses, correct


def test_each_row_is_measured_in_both_kinds_of_wording(module, data):
    loss, accuracy = compare_wordings(module, data, [use_template(USUAL)], [use_template(OTHER)])
    for kind, template in (("seen", USUAL), ("unseen", OTHER)):
        losses, correct = expected(module, data, template)
        assert getattr(loss, kind) == pytest.approx(losses, abs=1e-5)
        assert getattr(accuracy, kind) == correct
    assert loss.difference == pytest.approx(sum(loss.unseen) / 4 - sum(loss.seen) / 4)
    low, high = loss.interval
    assert low < loss.difference < high
    both, _ = compare_wordings(module, data, [use_template(USUAL)], [use_template(USUAL), use_template(OTHER)])
    middle = [(one + other) / 2 for one, other in zip(loss.seen, loss.unseen, strict=True)]
    assert both.unseen == pytest.approx(middle)


def test_rows_without_paraphrases_are_left_out(module, data):
    paraphrases = {"dull": ["is dull", "very dull"], "a sad story": ["sad"]}
    wordings = [use_paraphrase("text", paraphrases, number) for number in range(2)]
    loss, _ = compare_wordings(module, data, [lambda draft: draft], wordings)
    assert loss.seen == pytest.approx(expected(module, data, USUAL)[0][1:3], abs=1e-5)
    with pytest.raises(ValueError, match="no test row has both"):
        compare_wordings(module, data, [lambda draft: draft], [use_paraphrase("text", {}, 0)])


def test_the_interval_is_paired():
    score = WordingScore("loss", [1.0, 9.0, 5.0] * 9, [1.5, 9.5, 5.5] * 9)
    assert score.interval == pytest.approx((0.5, 0.5))


def test_the_command_takes_templates_of_the_training_from_its_config(tiny_folder, tmp_path, capsys):
    folder = write_splits(tmp_path / "data", train=ROWS, validation=ROWS, test=ROWS)
    seen = json.dumps([USUAL, "{soft}a {text} {target}"])
    argv = [
        "--model=PromptTuning", "--model.length=2", "--data=ClassificationDataModule", f"--data.path={folder}",
        f"--data.template={USUAL}", "--data.labels=[good, bad]", f"--backbone.name={tiny_folder('llama')}",
        "--data.augment=Templates", f"--data.augment.templates={seen}", "--trainer.max_steps=2",
        "--trainer.accelerator=cpu", f"--run.folder={tmp_path / 'runs'}", "--run.wandb=disabled",
    ]  # fmt: skip
    assert main(["fit", *argv]) == 0
    (prompt,) = tmp_path.glob("runs/*/*/prompt.safetensors")
    unseen = tmp_path / "unseen.txt"
    unseen.write_text(OTHER + "\n")
    capsys.readouterr()
    assert main(["wordings", str(prompt), f"--unseen={unseen}", "--json"]) == 0
    loss, accuracy = json.loads(capsys.readouterr().out)
    assert (loss["metric"], loss["rows"], accuracy["metric"]) == ("loss", 4, "accuracy")
    assert loss["difference"] == pytest.approx(loss["unseen"] - loss["seen"])
    unseen.write_text(USUAL)
    assert main(["wordings", str(prompt), f"--unseen={unseen}"]) == 2
    assert "templates of the training are no unseen ones" in capsys.readouterr().err
    assert main(["wordings", str(prompt)]) == 2
