"""Preferences: questions whose answers stay together from the file to the batch."""

import json
from functools import partial

import pytest
import torch
from preferences import PAIRS, first_batch, make_preferences
from torch import nn

from lightning_softprompt.backbones.microbatching import use_microbatches
from lightning_softprompt.callbacks.algorithms.consolidation import EWC
from lightning_softprompt.callbacks.recovery.bad_rows import find_nonfinite_rows
from lightning_softprompt.core.answer_pairs import pairs_of, preferences_of
from lightning_softprompt.core.types import IGNORE
from lightning_softprompt.data.multitask import MultitaskDataModule
from lightning_softprompt.data.readers.sources import DataError

EOS = 2


@pytest.fixture
def make_data(tiny_folder):
    """Returns a function that creates a data module of pairs."""
    return partial(make_preferences, tiny_folder("llama"), batch_size=2)


def test_the_answers_of_a_question_are_adjacent_rows(make_data):
    batch = first_batch(make_data())
    assert batch.groups.tolist() == [0, 0, 1, 1]
    assert batch.grades.tolist() == [1, 0, 1, 0]
    assert batch.row_ids == (0, 0, 1, 1)
    assert batch.units() == [[0, 1], [2, 3]]
    assert [question.target for question in preferences_of(batch)] == ["good", "well , it ends"]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_every_answer_ends_with_the_stop_token(tiny_folder, padding_side):
    """The padding token of GPT-2 is its stop token, and the stop token is a target nevertheless."""
    batch = first_batch(make_preferences(tiny_folder("gpt2"), padding_side=padding_side))
    for targets in batch.targets:
        assert targets[targets != IGNORE][-1] == EOS


def test_both_answers_follow_the_same_truncated_question(make_data):
    data = make_data(max_tokens=10)
    for row in range(len(PAIRS)):
        _, (chosen, rejected), _ = data.split("train")[row]
        question, other = (answer.ids[: answer.answers[0]] for answer in (chosen, rejected))
        assert question == other
        assert max(len(chosen.ids), len(rejected.ids)) <= 10
    _, (chosen, _), _ = data.split("train")[1]
    kept = data.codec.tokenizer.decode(chosen.ids[1 : chosen.answers[0]])
    assert PAIRS[1]["prompt"].endswith(kept)


def test_the_tokens_of_an_answer_do_not_depend_on_the_question(make_data):
    rows = [{"prompt": prompt, "chosen": "good", "rejected": "bad"} for prompt in ("a dog is", "this film , good ?")]
    data = make_data(train=rows, validation=rows)
    assert data.split("train").encoded[0].targets == data.split("train").encoded[1].targets


def test_cached_tokens_are_those_of_the_row(make_data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows = [list(make_data(cache=True).split("train")) for _ in range(2)]
    assert rows[0] == rows[1]
    other = [{**PAIRS[1], "rejected": "a funny dog and a very good film"}]  # a longer answer shortens the question
    first, second = (make_data(train=data, max_tokens=12, cache=True, validation=data).split("train") for data in
                     (PAIRS[1:2], other))  # fmt: skip
    assert len(first.encoded[0].ids) > len(second.encoded[0].ids)


def test_batches_consist_of_whole_questions(make_data):
    data = make_data(batch_size=3, seed=4)
    seen = []
    for batch in data.build_loader("train", "shuffled"):
        assert all(len(unit) == 2 for unit in batch.units())
        seen += batch.row_ids[::2]
    assert sorted(seen) == list(range(len(PAIRS)))
    with_tokens = make_data(batch_tokens=120)
    assert sum(len(batch.units()) for batch in with_tokens.build_loader("train", "shuffled")) == len(PAIRS)


def test_ranked_answers_are_sorted_and_all_pairs_of_different_rank_count(make_data):
    rows = [{"prompt": "a dog is", "options": ["bad", "good", "sad", "dull"], "place": [3, 1, 2, 3]}]
    data = make_data(train=rows, answers="options", ranks="place", validation=rows)
    batch = first_batch(data)
    assert [batch.examples[0].target, *batch.examples[0].rejected] == ["good", "sad", "bad", "dull"]
    pairs = pairs_of(batch)
    assert sorted(zip(pairs.better.tolist(), pairs.worse.tolist(), strict=True)) == [
        (0, 1), (0, 2), (0, 3), (1, 2), (1, 3)
    ]  # fmt: skip
    listed = make_data(train=rows, answers="options", validation=rows)
    assert len(pairs_of(first_batch(listed))) == 6


def test_margins_belong_to_the_preferred_answer(make_data):
    batch = first_batch(make_data(train=PAIRS[:1], margin="gap", validation=PAIRS[:1]))
    assert pairs_of(batch).margins.tolist() == [2]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "good", "rejected": " good "}, "two answers of a question are equal: 'good'"),
        ({"prompt": "a", "chosen": " ", "rejected": "good"}, "the answer in column 'chosen' is empty"),
        ({"prompt": "a", "chosen": "good", "rejected": None}, "column 'rejected' must be text, got NoneType"),
        ({"prompt": "a", "chosen": "good", "worse": "bad"}, "no column 'rejected'.*set data.rejected"),
    ],
)
def test_bad_pairs_are_named_with_file_and_line(make_data, tmp_path, row, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIRS[0]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"pairs.jsonl:2: {message}"):
        make_data(train=str(path)).split("train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"margin": "gap"}, "the margin in column 'gap' must be a finite number of at least 0, got -1"),
        ({"answers": "list", "ranks": "place"}, "column 'place' must be a list of 2 ranks"),
        ({"answers": "list", "ranks": "equal"}, "the ranks of a question must differ"),
        ({"answers": "prompt"}, "must be a list of two or more answers"),
        ({"max_answer_tokens": 3}, "has 5 tokens, more than data.max_answer_tokens=3"),
    ],
)
def test_bad_values_are_refused(make_data, arguments, message):
    row = {**PAIRS[0], "gap": -1, "list": ["good", "bad"], "place": [1], "equal": [1, 1]}
    with pytest.raises(DataError, match=message):
        make_data(train=[row], validation=[row], **arguments).split("train")


def test_pairs_whose_answers_are_too_long_can_be_skipped(make_data, caplog):
    data = make_data(on_bad_row="skip", max_answer_tokens=4)
    assert len(data.split("train")) == 3
    assert "2 of the train rows were skipped" in caplog.text


def test_single_answers_are_liked_or_not(make_data):
    rows = [{"prompt": "a dog is", "chosen": "good", "like": True}, {"prompt": "the story", "chosen": "bad", "like": 0}]
    data = make_data(train=rows, liked="like")
    batch = first_batch(data)
    assert batch.groups is None
    assert batch.grades.tolist() == [1, 0]
    assert batch.units() == [[0], [1]]
    assert [len(answers) for _, answers, _ in data.split("train")] == [1, 1]
    with pytest.raises(DataError, match="column 'like' must be true or false, got 'yes'"):
        make_data(train=[{**rows[0], "like": "yes"}], liked="like").split("train")


def test_contradicting_arguments_are_refused(make_data):
    with pytest.raises(ValueError, match="is for single answers, which have neither ranks nor margins"):
        make_data(liked="like", margin="gap")
    with pytest.raises(ValueError, match="requires a column with a list of answers"):
        make_data(ranks="place")
    with pytest.raises(ValueError, match="is for pairs of chosen and rejected answers"):
        make_data(answers="options", margin="gap")
    with pytest.raises(ValueError, match="cannot compare answers, but the tasks \\['pairs'\\] do"):
        MultitaskDataModule({"pairs": make_data()})


def test_rows_of_a_question_must_be_adjacent(make_data):
    batch = first_batch(make_data())
    with pytest.raises(ValueError, match="the rows of question 0 are not adjacent"):
        batch.only([0, 2, 1, 3]).units()
    with pytest.raises(ValueError, match="a group must not be divided"):
        pairs_of(batch.only([0, 2]))


class PairedLoss(nn.Module):
    """A method whose loss compares the two answers of each question and is infinite for one of them."""

    device = torch.device("cpu")

    def __init__(self, bad=()):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.bad = bad
        self.sizes = []

    @property
    def methods(self):
        return (self,)

    @property
    def objective(self):
        return lambda lm, batch: type("Outcome", (), {"loss": self.step(batch)["loss"]})

    def lm(self):
        return None

    def step(self, batch):
        pairs = pairs_of(batch)  # raises an error for a single row
        self.sizes.append(len(batch))
        value = float("inf") if set(batch.row_ids) & set(self.bad) else 1.0
        return {"loss": self.weight.sum() * value * len(pairs)}


def test_questions_with_a_nonfinite_loss_are_found_as_a_whole(make_data):
    batch = first_batch(make_data())
    (record,) = find_nonfinite_rows(PairedLoss(bad=[1]), batch)
    assert record["row"] == 1
    assert record["text"].startswith("it is a sad story")
    assert not record["whole_batch"]


def test_consolidation_measures_whole_questions(make_data):
    data = make_data()
    trainer = type("Trainer", (), {"world_size": 1, "datamodule": data})
    callback = EWC(rows=3)
    assert [len(rows) for rows in callback._rows(trainer)] == [2, 2, 2]


def test_microbatches_of_single_rows_leave_the_loss_unchanged(make_data, load):
    """A batch that runs out of memory is split into rows within the backbone; the loss sees whole questions."""
    backbone = load("llama")
    batch = first_batch(make_data())
    expected = backbone.cross_entropy(batch).sum(1)
    with use_microbatches(backbone, 4):
        losses = backbone.cross_entropy(batch).sum(1)
    torch.testing.assert_close(losses, expected)
    assert pairs_of(batch).differences(losses).shape == (2,)
