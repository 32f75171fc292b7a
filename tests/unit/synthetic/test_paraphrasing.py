"""Paraphrases, their filter, and the command that writes them."""

import json

import pytest
from row_files import read_rows, write_rows

from lightning_softprompt.__main__ import main
from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.synthetic.paraphrasing import ParaphraseFilter, ParaphrasePlan, write_paraphrases
from lightning_softprompt.synthetic.writers.base import Generated

TEXT = "name the largest river of the country"
GOOD = "say which is the largest river of that country"


class ScriptedGenerator:
    """Writes the given paraphrases of each text; an answer after a text is as likely as its number of words."""

    name, frame = "scripted", "{instruction}{target}"

    def __init__(self, paraphrases):
        self.paraphrases, self.calls, self.decoding = paraphrases, 0, Decoding()

    def __call__(self, step, rows, seed):
        self.calls += 1
        texts = self.paraphrases * (len(rows) // len(self.paraphrases))
        return [Generated(text, not text.endswith("..."), 3, -1.0) for text in texts]

    def mean_logprobs(self, step, rows, texts):
        return [-0.1 * len(row["text"].split()) for row in rows]


@pytest.mark.parametrize(
    ("paraphrase", "reason"),
    [
        (GOOD, None),
        ("", "empty"),
        ("the largest river", "length"),
        (GOOD + " " + GOOD, "length"),
        ("a dog is what everyone wants today", "overlap"),
        (TEXT, "overlap"),
    ],
)
def test_the_filter_gives_the_reason(paraphrase, reason):
    assert ParaphraseFilter().reason(TEXT, paraphrase, is_finished=True, drop=None) == reason


def test_the_filter_compares_answers_and_embeddings(monkeypatch):
    selecting = ParaphraseFilter(max_drop=0.5)
    assert selecting.reason(TEXT, GOOD, is_finished=False, drop=0.0) == "unfinished"
    assert selecting.reason(TEXT, GOOD, is_finished=True, drop=0.4) is None
    assert selecting.reason(TEXT, GOOD, is_finished=True, drop=0.6) == "likelihood"
    cosine = ParaphraseFilter(min_cosine=0.7)
    for value, reason in ((0.8, None), (0.6, "cosine")):
        monkeypatch.setattr(ParaphraseFilter, "_cosine", lambda self, text, other, value=value: value)
        assert cosine.reason(TEXT, GOOD, is_finished=True, drop=None) == reason
    with pytest.raises(ValueError, match="low limit exceeds"):
        ParaphraseFilter(low_overlap=0.9)


def test_a_file_has_a_line_for_each_text_and_continues(tmp_path):
    generator = ScriptedGenerator([f'"{GOOD}"', GOOD, "...", TEXT])
    texts = [TEXT, TEXT + " now", TEXT + " please"]
    plan = ParaphrasePlan(texts, ["yes", "", "no"], 4, ParaphraseFilter(), batch_size=2)
    path = tmp_path / "paraphrases.jsonl"
    counts = write_paraphrases(plan, generator, path)
    assert counts == {"accepted": 3, "repeated": 3, "unfinished": 3, "overlap": 3}
    first, *others = read_rows(path)
    assert [row["text"] for row in others] == texts[1:]
    assert first == {
        "row": 0, "text": TEXT, "paraphrases": [GOOD], "rejected": {"repeated": 1, "unfinished": 1, "overlap": 1}
    }  # fmt: skip
    whole = path.read_bytes()
    partial = tmp_path / "other.jsonl"

    def interrupt(complete):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_paraphrases(plan, generator, partial, interrupt)
    generator.calls = 0
    write_paraphrases(plan, generator, partial)
    assert generator.calls == 1
    assert partial.read_bytes() == whole
    partial.unlink()
    with pytest.raises(KeyboardInterrupt):
        write_paraphrases(plan, generator, partial, interrupt)
    part = partial.with_name("other.jsonl.part")
    part.write_bytes(part.read_bytes().splitlines(keepends=True)[0])  # killed within a batch
    write_paraphrases(plan, generator, partial)
    assert partial.read_bytes() == whole


def test_the_command_writes_a_file_that_the_augmentation_reads(tiny_folder, tmp_path, capsys):
    rows = [{"instruction": "a sad story", "output": "good"}, {"instruction": "a sad story", "output": "bad"}]
    source, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    options = [
        str(source), str(out), "--answer=output", "--frame={instruction} it was {target}", "--count=6",
        f"--backbone.name={tiny_folder('llama')}", "--max_tokens=44", "--decoding.max_new_tokens=4",
        "--filter.low_length=0", "--filter.low_overlap=0", "--filter.max_drop=9", "--filter.high_length=9",
    ]  # fmt: skip
    code = main(["paraphrase", *options])
    printed = capsys.readouterr()
    (line,) = read_rows(out)
    assert line["text"] == "a sad story"
    accepted, rejected = len(line["paraphrases"]), sum(line["rejected"].values())
    assert accepted + rejected == 6
    assert f"Wrote {accepted} paraphrases of 1 texts" in printed.out
    assert code == (0 if accepted else 2)
    assert main(["paraphrase", str(source), str(out), "--column=other"]) == 2
    assert "'other' is not a column of text; the row has instruction, output" in capsys.readouterr().err
    assert json.loads(out.read_text())  # still complete
