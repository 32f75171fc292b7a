"""`softprompt vocabulary` on small corpora and tokenizers."""

import json
from pathlib import Path

import pytest
from small_tokenizers import byte_pairs
from torch.testing import assert_close
from transformers import AutoTokenizer

from lightning_softprompt.__main__ import main
from lightning_softprompt.cli.commands import vocabulary
from lightning_softprompt.inference.prompt import load_prompt
from lightning_softprompt.runs.run_spec import last_folder
from lightning_softprompt.system.errors import CommandError

SENTENCES = ["o coração não tem ação", "a informação não é a ação", "coração e informação"]
CORPUS = [f"{number} {text}" for number in range(8) for text in SENTENCES]  # a text is counted once
NEW = ("angioplasty", "cardiology")
GENERAL = ["the cat sat on the mat", "the dog and the cat ran"] * 8


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    byte_pairs(GENERAL, 290).save_pretrained(tmp_path / "base")
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS))
    (tmp_path / "general.txt").write_text("\n\n".join(GENERAL))
    return tmp_path


def extend(*arguments):
    return vocabulary.main(["extend", *arguments, "--base", "./base", "--out", "out"])


def test_a_tokenizer_is_extended_and_measured(folder, capsys):
    before = (folder / "base" / "tokenizer.json").read_bytes()
    assert extend("corpus.jsonl", "--general", "general.txt", "--rows", "30") == 0
    output = capsys.readouterr().out
    rows = json.loads((folder / "out" / "vocabulary.json").read_text())["rows"]
    assert f"Wrote out: {len(rows)} new tokens" in output
    assert (folder / "base" / "tokenizer.json").read_bytes() == before
    general = next(line for line in output[output.index("general (") :].splitlines() if line.startswith("tokens "))
    assert general.endswith("+0.00 %")
    assert vocabulary.main(["report", "corpus.jsonl", "--base", "./base", "--vocabulary", "out"]) == 0
    base, extended = AutoTokenizer.from_pretrained("base"), AutoTokenizer.from_pretrained("out")
    counts = [sum(len(tokenizer(text).input_ids) for text in CORPUS) for tokenizer in (base, extended)]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tokens "))
    assert line.split()[1:3] == [f"{count:,}" for count in counts]
    assert counts[1] < 0.6 * counts[0]


def test_a_report_has_the_costliest_words_the_savings_and_the_speed(folder, capsys, tiny_folder):
    base = str(tiny_folder("llama"))
    (folder / "terms.txt").write_text("\n".join(NEW))
    (folder / "texts.txt").write_text("\n\n".join(["a film about angioplasty", "angioplasty is good", "cardiology"]))
    assert main(["vocabulary", "extend", "--base", base, "--terms", "terms.txt", "--out", "out"]) == 0
    capsys.readouterr()
    options = ["--base", base, "--vocabulary", "out", "--words", "1", "--plot", "curve.png", "--speed", "2"]
    assert vocabulary.main(["report", "texts.txt", *options]) == 0
    output = capsys.readouterr().out
    lines = [line.split() for line in output.splitlines()]
    assert ["angioplasty", "2", "1", "0", "0.00", "%", "yes"] in lines
    assert not any(line[:1] == ["cardiology"] for line in lines)
    assert ["unknown", "tokens", "37.500%", "0.000%", "-100.00", "%"] in lines
    assert "words per CPU second" in output
    assert (folder / "curve.png").stat().st_size > 1000


def test_the_savings_are_those_of_a_tokenizer_with_fewer_rows(folder, capsys):
    assert extend("corpus.jsonl", "--general", "general.txt", "--rows", "20") == 0
    capsys.readouterr()
    assert vocabulary.main(["report", "corpus.jsonl", "--base", "./base", "--vocabulary", "out", "--words", "0"]) == 0
    table = capsys.readouterr().out.partition("first new tokens")[2].splitlines()
    [ten] = [line.split() for line in table if line.startswith("10 ")]
    vocabulary.main(
        ["extend", "corpus.jsonl", "--general", "general.txt", "--rows", "10", "--base", "./base", "--out", "ten"]
    )
    tokenizer = AutoTokenizer.from_pretrained("ten")
    assert ten[1] == f"{sum(len(tokenizer(text).input_ids) for text in CORPUS):,}"


def test_listed_terms_are_added_and_existing_ones_reported(folder, capsys):
    (folder / "terms.txt").write_text("the\ncoração\nnew york\n")
    assert extend("--terms", "terms.txt") == 0
    output = capsys.readouterr().out
    assert "Skipped 2 terms" in output
    assert "the: it is one token already" in output
    assert len(AutoTokenizer.from_pretrained("out")(" coração").input_ids) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pass a corpus"),
        (["corpus.jsonl", "--rows", "0"], "at least 1"),
        (["corpus.jsonl", "--general", "corpus.jsonl"], "no new tokens"),
        (["empty.txt"], "empty.txt has no text"),
        (["latin.txt"], "not UTF-8"),
        (["--terms", "empty.txt"], "has no terms"),
        (["--terms", "latin.txt"], "not UTF-8"),
        (["missing.jsonl"], "does not exist"),
        (["corpus.jsonl", "--column", "body"], "--column"),
    ],
)
def test_bad_input_is_refused(folder, arguments, message):
    (folder / "empty.txt").write_text("\n")
    (folder / "latin.txt").write_bytes("coração\n".encode("latin-1"))
    with pytest.raises(CommandError, match=message):
        extend(*arguments)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "a.png"], "pass --vocabulary"),
        (["--words", "-1"], "--words must be at least 0"),
        (["--speed", "-1"], "--speed must be at least 0"),
    ],
)
def test_bad_options_of_a_report_are_refused(folder, options, message):
    with pytest.raises(CommandError, match=message):
        vocabulary.main(["report", "corpus.jsonl", "--base", "./base", *options])


def test_terms_that_are_all_skipped_are_an_error(folder, capsys):
    (folder / "terms.txt").write_text("the\nnew york\n")
    with pytest.raises(CommandError, match="all terms were skipped"):
        extend("--terms", "terms.txt")
    assert "the: it is one token already" in capsys.readouterr().out


def test_an_existing_folder_is_not_overwritten(folder):
    (folder / "out").mkdir()
    with pytest.raises(CommandError, match="out exists"):
        extend("corpus.jsonl")
    with pytest.raises(CommandError, match="softprompt vocabulary"):
        vocabulary.main(["report", "corpus.jsonl", "--base", "./base", "--vocabulary", "out"])


RUN = [
    *("--trainer.accelerator=cpu", "--run.wandb=disabled", "--trainer.enable_progress_bar=false"),
    *("--trainer.max_steps=2", "--data.batch_size=2", "--data.window=30", "--data.max_tokens=40"),
]


@pytest.mark.timeout(300)
def test_new_tokens_are_trained_tested_merged_and_used_as_the_next_backbone(tmp_path, monkeypatch, tiny_folder):
    monkeypatch.chdir(tmp_path)
    base = str(tiny_folder("llama"))
    documents = [f"a film about {word} is {end}" for word in NEW for end in ("good", "sad")]
    Path("corpus.txt").write_text("\n\n".join(documents))
    Path("terms.txt").write_text("\n".join(NEW))
    assert main(["vocabulary", "extend", "--base", base, "--terms", "terms.txt", "--out", "extended"]) == 0
    data = ["--data=CorpusDataModule", "--data.path=corpus.txt", "--data.validation_share=0.5", *RUN]
    backbone = [f"--backbone.name={base}", "--backbone.vocabulary=extended"]
    Path("texts.txt").write_text("\n\n".join(documents))
    init = ["--model.init=Distilled", "--model.init.texts=texts.txt", "--model.init.start=MeanOfVocabulary"]
    assert main(["fit", "--model=NewTokens", *init, *backbone, *data]) == 0
    Path("texts.txt").unlink()  # only the start of a training reads it
    prompt = last_folder() / "prompt.safetensors"
    trained = load_prompt(prompt).method
    assert set(trained.state_dict()) == {"inputs", "outputs"}
    assert trained.inputs.shape == (2, trained.loaded.hidden_size)
    checkpoint = last_folder() / "checkpoints" / "best.ckpt"
    assert main(["test", "--ckpt_path", str(checkpoint), "--data.test=corpus.txt"]) == 0
    assert main(["merge", str(prompt), "--out", "merged"]) == 0
    next_run = ["--model=PromptTuning", "--model.length=2", "--backbone.name=./merged", *data]
    assert main(["fit", *next_run]) == 0
    merged = load_prompt(last_folder() / "prompt.safetensors").backbone
    assert_close(merged.word_embeddings[trained.ids], trained.inputs.detach())
