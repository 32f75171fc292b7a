"""Multiple choice from files: reading, training, testing, and predictions in Python."""

import json

import pytest
from row_files import read_rows, write_splits
from runs import read_metrics

import lightning_softprompt as sp
from lightning_softprompt.cli.app import main
from lightning_softprompt.data.multiple_choice import find_option, list_options, read_options
from lightning_softprompt.runs.run_spec import last_folder

ROWS = [
    {"question": "a dog is", "options": ["good", "bad"], "answer": 0},
    {"question": "a sad film is", "options": ["a funny dog", "dull", "good"], "answer": "dull"},
    {"question": "it was", "options": ["bad", "good"], "answer": "B"},
    {"question": "this dog was", "options": ["dull", "funny", "sad", "good"], "answer": "3"},
]


@pytest.fixture
def options(tmp_path, tiny_folder):
    data = write_splits(tmp_path / "data", train=ROWS * 2, validation=ROWS, test=ROWS)
    return [
        "--model=PromptTuning", "--model.length=2", f"--backbone.name={tiny_folder('llama')}",
        "--data=MultipleChoiceDataModule", f"--data.path={data}", "--run.wandb=disabled", "--trainer.max_steps=2",
        "--trainer.accelerator=cpu", f"--run.folder={tmp_path / 'runs'}", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip


def test_a_prompt_is_trained_tested_and_used(options, caplog, tmp_path):
    assert main(["fit", *options]) == 0
    assert "train: 8 rows with 2 to 4 options; the accuracy of chance is 0.396" in caplog.text
    folder = last_folder()
    assert main(["test", f"--ckpt_path={folder / 'checkpoints' / 'best.ckpt'}"]) == 0
    metrics = read_metrics(last_folder())["test"]
    records = read_rows(last_folder() / "test_predictions.jsonl")
    assert [record["target"] for record in records] == ["good", "dull", "good", "good"]
    correct = [record["prediction"] == record["target"] for record in records]
    assert metrics["test/accuracy"] == sum(correct) / 4
    prompt = sp.load_prompt(folder / "prompt.safetensors")
    unlabelled = [{"question": row["question"], "options": row["options"]} for row in ROWS]
    assert [row["prediction"] for row in prompt.predict(unlabelled)] == [row["prediction"] for row in records]
    path = tmp_path / "new.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in unlabelled))
    out = tmp_path / "out.jsonl"
    ckpt = folder / "prompt.safetensors"
    assert main(["predict", f"--ckpt_path={ckpt}", f"--data.predict={path}", f"--run.predictions={out}"]) == 0
    assert [row["prediction"] for row in read_rows(out)] == [row["prediction"] for row in records]


def test_the_options_can_be_listed_in_the_text(tiny_folder):
    spec = sp.BackboneSpec(name=str(tiny_folder("llama")))
    rows = [{"question": "a dog is", "one": "good", "two": "bad", "three": "", "answer": 2}]
    data = sp.MultipleChoiceDataModule(
        template="{soft}{question}\n{options}\nso {target}", options=["one", "two", "three"], first_index=1,
        backbone=spec, train=rows,
    )  # fmt: skip
    (example,), _ = data.convert_rows("train")
    assert example.fields["options"] == "A. good\nB. bad"
    assert (example.target, example.label, example.options) == ("bad", 1, ("good", "bad"))


@pytest.mark.parametrize(("answer", "expected"), [(0, 0), ("b", 1), ("C", 2), ("2", 2), (" a cat ", 1)])
def test_answers_are_indices_letters_or_texts(answer, expected):
    assert find_option(answer, ("a dog", "a cat", "x"), 0, "answer") == expected


def test_indices_of_answers_start_at_the_first_index():
    assert find_option(1, ("a dog", "a cat", "x"), 1, "answer") == 0


def test_the_text_of_an_option_is_preferred_to_a_letter():
    assert find_option("B", ("B", "a cat", "x"), 0, "answer") == 0


@pytest.mark.parametrize("answer", [3, -1, True, None, 1.0, "D", "a bird", "7"])
def test_other_answers_are_refused(answer):
    with pytest.raises(
        ValueError, match=r"column 'key' must be the index \(from 0\), the letter or the text of one of"
    ):
        find_option(answer, ("a dog", "a cat", "x"), 0, "key")


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"a": 1}, ["options"], "no column 'options'; the row has .*set data.options"),
        ({"options": "a cat"}, ["options"], "must be a list of options, got 'a cat'; if each option has its own"),
        ({"options": ["a cat", 3]}, ["options"], "options must be non-empty texts, got 3"),
        ({"options": ["a cat", " "]}, ["options"], "options must be non-empty texts, got ' '"),
        ({"options": ["a cat"]}, ["options"], "at least two different options"),
        ({"options": ["a cat", "a cat "]}, ["options"], "at least two different options"),
        ({"a": "x"}, ["a", "b"], "no column 'b'"),
        ({"a": "x", "b": None}, ["a", "b"], "at least two different options"),
    ],
)
def test_options_that_cannot_be_used_are_refused(row, columns, message):
    with pytest.raises(ValueError, match=message):
        read_options(row, columns)


def test_many_options_are_numbered():
    assert list_options([str(i) for i in range(28)]).splitlines()[-3:] == ["Z. 25", "27. 26", "28. 27"]


def test_a_long_option_is_refused_with_its_line(options, capsys):
    assert main(["fit", *options, "--data.max_option_tokens=2"]) == 2
    message = capsys.readouterr().err
    assert "train.jsonl:2" in message
    assert "has 3 tokens, more than the 2 that are reserved for an option; increase data.max_option_tokens" in message
