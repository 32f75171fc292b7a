"""Each filter on rows that it drops and rows that it keeps, with the reasons."""

import json

import pytest
from row_files import read_rows, write_rows

import lightning_softprompt as sp
from lightning_softprompt.__main__ import main
from lightning_softprompt.synthetic.filtering import apply_filters
from lightning_softprompt.synthetic.filters.agreement import Agreement
from lightning_softprompt.synthetic.filters.balance import Balance
from lightning_softprompt.synthetic.filters.duplicates import Duplicates
from lightning_softprompt.synthetic.filters.leaked_words import LeakedWords
from lightning_softprompt.synthetic.filters.length import Length
from lightning_softprompt.synthetic.filters.likelihood import Likelihood
from lightning_softprompt.synthetic.filters.near_duplicates import NearDuplicates
from lightning_softprompt.synthetic.filters.overlap import Overlap
from lightning_softprompt.synthetic.filters.score import Score
from lightning_softprompt.synthetic.filters.unfinished import Unfinished


def texts(*values):
    return [{"row": number, "text": text} for number, text in enumerate(values)]


TEXT_CASES = [
    (Length(2, 3), texts("one", "one two", "a b c d", "..."), ["1 words", None, "4 words", "0 words"]),
    (Length(2), texts("one " * 99), [None]),
    (Duplicates(), texts("One, two!", "three", "one TWO"), [None, None, "equals row 0"]),
    (
        NearDuplicates(0.7),
        texts("The film was a very good one", "The film was a very good one!", "Nothing in common here", "The film"),
        [None, "similarity 1.00 to row 0", None, None],
    ),
    (LeakedWords(["positive", "movie review"]), texts("Positive!", "positively", "a Movie review", "a movie"),
     ["contains 'Positive'", None, "contains 'Movie review'", None]),
    (Unfinished(), [{"text": "a", "is_finished": False}, {"text": "a", "is_finished": True}, {"text": "a"}],
     ["reached the limit of tokens", None, None]),
    (Unfinished(punctuation=True), texts("Ends. ", 'He said "no."', "does not"), [None, None, "no closing mark"]),
    (Score("f1", low=0.5), [{"scores": {"f1": 0.5}}, {"scores": {"f1": 0.25}}], [None, "f1 0.25"]),
]  # fmt: skip


@pytest.mark.parametrize(("item", "rows", "reasons"), TEXT_CASES, ids=lambda value: type(value).__name__)
def test_a_filter_drops_rows_with_a_reason(item, rows, reasons):
    assert item.reasons(rows) == reasons


def test_near_duplicates_are_compared_with_rows_that_were_not_dropped():
    rows = texts("abcdefghij", "abcdefghijk", "abcdefghijkl", "abcdefghijklm")
    reasons = NearDuplicates(0.75).reasons(rows)  # 6, 7, 8 and 9 n-grams: 6/7, 6/8 and 6/9 of the first one
    assert [reason is None for reason in reasons] == [True, False, False, True]


def test_likelihood_drops_both_ends_of_each_class():
    rows = [{"label": label, "logprob": -value} for label in "ab" for value in range(1, 11)]
    rows.append({"label": "a", "logprob": None})
    reasons = Likelihood(low=0.2, high=0.1).reasons(rows)
    dropped = [(row["label"], row["logprob"]) for row, reason in zip(rows, reasons, strict=True) if reason]
    assert dropped == [*((label, -value) for label in "ab" for value in (1, 9, 10)), ("a", None)]
    shifted = [{**row, "logprob": row["logprob"] - (row["label"] == "b") / 2} for row in rows[:-1]]
    assert sum(reason is not None for reason in Likelihood(0.5, 0.0, label=None).reasons(shifted)) == 10
    with pytest.raises(ValueError, match="less than 1"):
        Likelihood(0.5, 0.5)


def test_balance_leaves_the_same_number_of_each_class():
    rows = [{"label": "a"}] * 5 + [{"label": "b"}] * 2 + [{"label": "c"}] * 3
    reasons = Balance().reasons(rows)
    remaining = [row["label"] for row, reason in zip(rows, reasons, strict=True) if reason is None]
    assert remaining == ["a", "a", "b", "b", "c", "c"]
    assert Balance().reasons(rows) == reasons != Balance(seed=1).reasons(rows)
    assert sum(reason is None for reason in Balance(most=1).reasons(rows)) == 3


def test_overlap_finds_sequences_of_words_of_test_rows(tmp_path):
    test = write_rows(tmp_path / "test.jsonl", texts("one two three four", "short"))
    rows = texts("Zero, one two THREE five", "one two four three", "Short!", "short text")
    assert Overlap(str(test), words=3).reasons(rows) == [
        "shares 'one two three' with a test row", None, "shares 'short' with a test row", None
    ]  # fmt: skip


def test_filters_see_the_rows_that_passed_and_dropped_rows_name_their_filter():
    rows = texts("one two", "one", "One two", "two")
    result = apply_filters(rows, [Length(2), Duplicates()])
    assert [row["row"] for row in result.rows] == [0]
    dropped = [(row["row"], row["dropped_by"]) for row in result.dropped]
    assert dropped == [(1, "Length"), (3, "Length"), (2, "Duplicates")]
    assert [(count.num_rows, count.num_dropped) for count in result.counts] == [(4, 2), (2, 1)]
    with pytest.raises(ValueError, match=r"Length: .* text in the column 'text'"):
        apply_filters([{"document": "a"}], [Length()])


def test_agreement_is_that_of_the_bare_backbone_or_of_a_trained_prompt(tiny_folder, rows, tmp_path):
    spec = sp.BackboneSpec(name=str(tiny_folder("llama")))
    labels = {"negative": "bad", "neutral": "long", "positive": "good"}
    item = Agreement(template="{soft}{text} it was {target}", labels=labels, backbone=spec, batch_size=4)
    reasons = item.reasons(rows)
    relabeled = []
    for row, reason in zip(rows, reasons, strict=True):
        predicted = row["label"] if reason is None else reason.split()[1].rstrip(",")
        relabeled.append({**row, "label": predicted})
    assert item.reasons(relabeled) == [None] * len(rows)
    assert any(reasons)
    data = sp.ClassificationDataModule(
        template="{soft}{text} it was {target}", labels=labels, backbone=spec, train=rows, cache=False
    )
    method = sp.PromptTuning(length=2, data=data)
    method.configure_model()
    path = sp.save_prompt(method, tmp_path / "prompt.safetensors")
    records = sp.load_prompt(path).predict(rows)
    expected = [record["prediction"] == row["label"] for record, row in zip(records, rows, strict=True)]
    assert [reason is None for reason in Agreement(prompt=str(path)).reasons(rows)] == expected
    assert all(Agreement(prompt=str(path), min_probability=1.0).reasons(rows))
    with pytest.raises(ValueError, match="the label 'other'"):
        item.reasons([{**rows[0], "label": "other"}])
    with pytest.raises(ValueError, match="either a prompt file"):
        Agreement()


def test_the_command_writes_rows_dropped_rows_and_counts(tmp_path, capsys):
    source = write_rows(tmp_path / "in.jsonl", [{"text": text, "label": "a"} for text in ("one two", "one", "one two")])
    out = tmp_path / "out.jsonl"
    filters = "[Duplicates, {class_path: Length, init_args: {low: 2}}]"
    assert main(["filter", str(source), str(out), "--filters", filters]) == 0
    assert read_rows(out) == [{"text": "one two", "label": "a"}]
    dropped = read_rows(tmp_path / "out.dropped.jsonl")
    reasons = [(row["dropped_by"], row["reason"]) for row in dropped]
    assert reasons == [("Duplicates", "equals row 0"), ("Length", "1 words")]
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["filters"] == [
        {"name": "Duplicates", "num_rows": 3, "num_dropped": 1},
        {"name": "Length", "num_rows": 2, "num_dropped": 1},
    ]
    printed = capsys.readouterr().out
    assert "Wrote 1 of 3 rows (a 1)" in printed
    assert "33.3%" in printed


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ("[Lenght]", "Lenght"),
        ("[{class_path: Length, init_args: {least: 2}}]", "least"),
        ("[{class_path: Length, init_args: {low: 3, high: 2}}]", "0 <= low <= high"),
        ("[{class_path: Length, init_args: {low: 9}}]", "no row passed the filters"),
    ],
)
def test_mistakes_in_filters_are_reported_without_a_traceback(filters, message, tmp_path, capsys):
    source = write_rows(tmp_path / "in.jsonl", texts("one"))
    assert main(["filter", str(source), str(tmp_path / "out.jsonl"), "--filters", filters]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
