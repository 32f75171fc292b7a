"""`softprompt vocabulary` on small corpora and tokenizers."""

import json

import pytest
from small_tokenizers import byte_pairs
from transformers import AutoTokenizer

from lightning_softprompt.cli.commands import vocabulary
from lightning_softprompt.system.errors import CommandError

SENTENCES = ["o coração não tem ação", "a informação não é a ação", "coração e informação"]
CORPUS = [f"{number} {text}" for number in range(8) for text in SENTENCES]  # a text is counted once
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


def test_an_existing_folder_is_not_overwritten(folder):
    (folder / "out").mkdir()
    with pytest.raises(CommandError, match="out exists"):
        extend("corpus.jsonl")
    with pytest.raises(CommandError, match="softprompt vocabulary"):
        vocabulary.main(["report", "corpus.jsonl", "--base", "./base", "--vocabulary", "out"])
