"""Tagging from the command line, on tiny backbones and on a real encoder."""

import io
import json
import random

import pytest
import wandb_file
from row_files import read_rows, write_splits
from runs import read_metrics

from lightning_softprompt.checkpoints.prompt_file import read_prompt
from lightning_softprompt.cli.app import main
from lightning_softprompt.cli.commands import fold
from lightning_softprompt.runs.run_spec import last_folder

PLAIN = ("a", "that", "is", "one", "about", "it", "this", "label")
ENTITIES = {  # in the tokens of tiny backbones, `sad!` and `text?` are two
    ("very", "good"): ("B-MOOD", "I-MOOD"),
    ("sad!",): ("B-MOOD",),
    ("film",): ("B-THING",),
    ("story", "text?"): ("B-THING", "I-THING"),
}


def make_sentence(generator):
    phrases = [(word,) for word in PLAIN] + list(ENTITIES) * 2
    words, tags = [], []
    for _ in range(generator.randint(1, 5)):
        phrase = generator.choice(phrases)
        words += phrase
        tags += ENTITIES.get(phrase, ("O",))
    return {"tokens": words, "tags": tags}


@pytest.fixture
def folder(tmp_path):
    """Files of random sentences."""
    generator = random.Random(0)
    sentences = [make_sentence(generator) for _ in range(240)]
    return write_splits(tmp_path / "data", train=sentences[:160], validation=sentences[160:200], test=sentences[200:])


@pytest.fixture
def common(tmp_path, folder, tiny_folder):
    def common(family):
        return [
            f"--backbone.name={tiny_folder(family)}", "--data=TaggingDataModule", f"--data.path={folder}",
            "--model=PTuningV2", "--model.length=8", "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false", f"--run.folder={tmp_path / 'runs'}",
        ]  # fmt: skip

    return common


def last_metrics(stage):
    return read_metrics(last_folder())[stage]


def read_lines(name):
    return read_rows(last_folder() / name)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_it_learns_is_tested_and_predicts(common, folder, family, monkeypatch, capsys):
    longer = "--data.template=one label{soft} : {tokens} . it is{target}"
    rate = "--model.optimizer={class_path: AdamW, init_args: {lr: 0.03}}"
    limits = ["--trainer.max_epochs=16", "--trainer.check_val_every_n_epoch=4", "--run.wandb=disabled"]
    options = [*common(family), longer, "--data.batch_size=8", "--model.readout=TokenHead"]
    assert main(["fit", *options, *limits, rate]) == 0
    run = last_folder()
    assert last_metrics("val")["val/accuracy"] > 0.9
    assert last_metrics("val")["val/f1"] > 0.9
    assert read_metrics(run)["best"]["metric"] == "val/f1"
    saved = read_prompt(run / "prompt.safetensors").tensors
    assert saved["readout.linear.weight"].shape == (5, 32)

    assert main(["test", f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"]) == 0
    rows = read_rows(folder / "test.jsonl")
    records = read_lines("test_predictions.jsonl")
    assert [record["target"] for record in records] == [row["tags"] for row in rows]
    predictions = [tag for record in records for tag in record["prediction"]]
    targets = [tag for record in records for tag in record["target"]]
    num_correct = sum(a == b for a, b in zip(predictions, targets, strict=True))
    assert last_metrics("test")["test/accuracy"] == pytest.approx(num_correct / len(targets))
    assert last_metrics("test")["test/accuracy"] > 0.9

    assert fold.main([str(run / "prompt.safetensors"), "--out", str(folder / "folded.safetensors")]) == 0
    shared = [word for word in options if not word.startswith(("--model.length", "--model=PTuningV2"))]
    method = ["--model=Folded", f"--model.path={folder / 'folded.safetensors'}", "--run.wandb=disabled"]
    expected = last_metrics("test")
    assert main(["test", *method, *shared]) == 0
    assert last_metrics("test") == pytest.approx(expected, abs=1e-6)

    words = ["this", "film", "is", "very", "good"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(json.dumps({"tokens": words}).encode())))
    capsys.readouterr()
    assert main(["predict", f"--init_from={run / 'prompt.safetensors'}", "--data.predict=-"]) == 0
    (record,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert record == {
        "row": 0,
        "input": "one label : this film is very good . it is",
        "prediction": ["O", "B-THING", "O", "B-MOOD", "I-MOOD"],
        "scores": None,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "LabelWords requires label words, but the classes ['B-MOOD', 'B-THING', 'I-MOOD'] have none"),
        (["--model.readout=RankedChoices"], "set --model.readout to TokenHead"),
        (["--model.readout=Calibrated"], "set --model.readout to TokenHead"),
        (["--model.readout=ClassHead"], "set --model.readout to TokenHead"),
        (["--model.readout=TokenHead", "--data.tags=[O, B-MOOD]"], "train.jsonl:"),
        (["--model.readout=TokenHead", "--data.template={tokens}{soft}{target}"], "cannot attend to {soft} after them"),
        (["--model.readout=TokenHead", "--data.tokens_column=words"], "no column 'words'"),
    ],
)
def test_a_mistake_is_reported_in_two_lines(common, capsys, options, message):
    assert main(["fit", *common("llama"), "--trainer.max_steps=2", *options]) == 2
    error = capsys.readouterr().err.splitlines()
    assert [line for line in error if line.startswith("error: ") and message in line]


@pytest.mark.wandb
def test_replicas_are_scored_together_and_truncated_words_are_not_scored(common):
    limits = ["--trainer.max_steps=4", "--trainer.val_check_interval=4", "--model.readout=TokenHead"]
    assert main(["fit", *common("bert"), *limits, "--replicas=2", "--data.max_tokens=8"]) == 0
    (*_, table) = wandb_file.read_run(last_folder()).tables("val/predictions")
    assert any("None" in row[3] for row in table["data"])
    assert {"val/f1", "val/f1/replica_2", "val/f1/ensemble", "val/accuracy/ensemble"} <= last_metrics("val").keys()
    assert main(["test", f"--ckpt_path={last_folder() / 'checkpoints' / 'last.ckpt'}"]) == 0
    records = read_lines("test_predictions.jsonl")
    assert any(None in record["prediction"] for record in records)
    for record in records:
        assert [tag is None for tag in record["prediction"]] == [tag is None for tag in record["target"]]


NAMES, PLACES = ("Anna", "Carlos", "Maria Lopez", "John Smith", "Fatima"), ("Paris", "New York", "Berlin", "Lima")
SENTENCES = ("{name} flew from {place} to {other} .", "In {place} , {name} met a friend .", "{name} lives in {place} .")
KINDS = {"{name}": "PER", "{place}": "LOC", "{other}": "LOC"}


def make_story(generator):
    values = {
        "{name}": generator.choice(NAMES), "{place}": generator.choice(PLACES), "{other}": generator.choice(PLACES),
    }  # fmt: skip
    row = {"tokens": [], "tags": []}
    for part in generator.choice(SENTENCES).split():
        first, *others = values.get(part, part).split()
        row["tokens"] += [first, *others]
        if part in KINDS:
            row["tags"] += [f"B-{KINDS[part]}", *(f"I-{KINDS[part]}" for _ in others)]
        else:
            row["tags"].append("O")
    return row


@pytest.mark.slow
def test_a_real_encoder_finds_people_and_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = random.Random(0)
    stories = [make_story(generator) for _ in range(128)]
    write_splits(tmp_path, train=stories[:96], validation=stories[96:])
    assert main([
        "fit", "--backbone.name", "all-minilm-l6-v2", "--model", "PTuningV2", "--model.length", "8",
        "--model.readout", "TokenHead", "--data", "TaggingDataModule", "--data.path", ".",
        "--data.tags", "[O, B-PER, I-PER, B-LOC, I-LOC]", "--data.batch_size", "8", "--trainer.max_epochs", "4",
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--run.wandb", "disabled",
    ]) == 0  # fmt: skip
    assert last_metrics("val")["val/f1"] > 0.9
    assert read_metrics(last_folder())["trainable_parameters"] == (8 * 2 * 6 * 384 + 384 * 5 + 5)
