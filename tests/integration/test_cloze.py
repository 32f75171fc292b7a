"""Questions about rare terms on the command line: drawn, written, asked, and compared."""

import json
from pathlib import Path

import pytest
from row_files import read_rows
from runs import read_metrics
from small_tokenizers import byte_pairs
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_softprompt.__main__ import main
from lightning_softprompt.runs.run_spec import last_folder

TERMS = [f"{first}{second}otin" for first in "bcdf" for second in "aei"]


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Options of a test on documents in which each term occurs in the same number of documents."""
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_pairs(["a"], 300)
    tokenizer.save_pretrained("model")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, bos_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained("model")
    documents = [f"we give {TERMS[number % 12]}, then {TERMS[(number + 5) % 12]} again" for number in range(96)]
    Path("medical.txt").write_text("\n\n".join(documents))
    Path("general.txt").write_text("we give a dog\n\nthen again a dog\n\nwe see a dog\n\nthen we go")
    return [
        "--data=CorpusDataModule", "--data.path=medical.txt", "--data.corpora={general: general.txt}",
        "--data.test_share=0.25", "--data.validation_share=0.2", "--backbone.name=./model",
    ]  # fmt: skip


def ask(options, *more):
    silent = ["--trainer.accelerator=cpu", "--run.wandb=disabled", "--trainer.enable_progress_bar=false"]
    assert main(["test", "--model=NoPrompt", *options, *silent, *more]) == 0
    return last_folder()


def test_questions_are_drawn_written_asked_and_compared(options, capsys):
    assert main(["cloze", "questions.jsonl", "--count=8", *options]) == 0
    questions = read_rows(Path("questions.jsonl"))
    assert len(questions) == 8
    assert all(question["term"] in TERMS for question in questions)
    first = ask(options, "--data.cloze=questions.jsonl", "--data.word_frequencies=true")
    second = ask(options, "--data.cloze=8", "--data.eval_batch_size=3")
    metrics = read_metrics(first)["test"]
    assert metrics["test/cloze_questions"] == 8
    assert read_metrics(second)["test"]["test/cloze@1"] == metrics["test/cloze@1"]
    assert {f"test/nats_by_frequency/{name}" for name in ("5-19", "20-99")} < metrics.keys()
    answers = [answer for row in read_rows(first / "test_predictions.jsonl") for answer in row.get("cloze", [])]
    assert sorted(answer["term"] for answer in answers) == sorted(question["term"] for question in questions)
    capsys.readouterr()
    assert main(["likelihood", str(first), str(second), "--json"]) == 0
    changes = [change for change in json.loads(capsys.readouterr().out) if change.get("metric") == "cloze@1"]
    assert [change["change"] for change in changes] == [None, 0.0]
    assert changes[0]["value"] == metrics["test/cloze@1"]
    assert changes[1]["questions"] == 8


def test_files_that_are_no_questions(options, capsys):
    Path("bad.jsonl").write_text('{"left": "we give", "term": "a", "right": "", "distractors": ["a"]}\n')
    silent = ["--trainer.accelerator=cpu", "--run.wandb=disabled"]
    assert main(["test", "--model=NoPrompt", *options, *silent, "--data.cloze=bad.jsonl"]) == 2
    assert "bad.jsonl:1: term must not be empty, and distractors must be other terms" in capsys.readouterr().err
    assert main(["cloze", "bad.jsonl", *options]) == 2
    assert "bad.jsonl exists" in capsys.readouterr().err
