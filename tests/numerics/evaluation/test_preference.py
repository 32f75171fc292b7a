"""Metrics of preferences, against values computed by hand."""

import math

import numpy as np
import pytest
import torch

from lightning_softprompt.core.types import Batch, PreferenceExample
from lightning_softprompt.evaluation.preferences.figures import calibration_figure
from lightning_softprompt.evaluation.preferences.liked import LikedEvaluation
from lightning_softprompt.evaluation.preferences.pairs import PreferenceEvaluation, calibration_error

TARGETS = ([1, 2, 3], [1], [1], [1, 2])  # two questions; the second prefers the shorter answer


class Scores:
    """A model whose answers have fixed scores and log-probabilities."""

    def __init__(self, scores, logprobs=None):
        self.scores, self.values = torch.tensor(scores), logprobs
        self.has_readout = logprobs is None

    def answer_scores(self, batch):
        return self.scores

    def logprobs(self, batch):
        return torch.tensor(self.values)[:, None]


def make_batch(targets=TARGETS, groups=(0, 0, 1, 1), grades=(1.0, 0.0, 1.0, 0.0)):
    width = max(map(len, targets))
    padded = torch.tensor([[*row, *[-100] * (width - len(row))] for row in targets])
    ids = torch.ones(len(targets), 2, dtype=torch.long)
    answers = [f"answer {b}" for b in range(len(targets))]
    examples = []
    for group in groups:
        first, *rest = [answer for answer, other in zip(answers, groups, strict=True) if other == group]
        examples.append(PreferenceExample({}, first, rejected=tuple(rest)))
    return Batch(
        ids, ids > 0, ids > 0, padded, ids[:, :1], examples=tuple(examples), row_ids=groups,
        groups=torch.tensor(groups), grades=torch.tensor(grades),
    )  # fmt: skip


def evaluate(model, batch, stage="val"):
    evaluation = PreferenceEvaluation()
    evaluation.begin(stage, 0)
    records = evaluation.update(model, batch)
    return records, {name: float(value) for name, value in evaluation.compute().items()}


def test_metrics_of_two_pairs():
    records, metrics = evaluate(Scores([2.0, 1.0, -1.0, 1.0]), make_batch())
    assert metrics["accuracy"] == 0.5
    assert metrics["margin"] == pytest.approx((1 - 2) / 2)
    losses = [math.log1p(math.exp(-1)), math.log1p(math.exp(2))]
    assert metrics["bradley_terry"] == pytest.approx(sum(losses) / 2)
    assert metrics["longer_accuracy"] == 0.5
    assert metrics["accuracy_shorter_chosen"] == 0
    expected = np.corrcoef([2, -1, 1, 1], [3, 1, 1, 2])[0, 1]
    assert metrics["length_correlation"] == pytest.approx(expected)
    assert "logprob_accuracy" not in metrics
    assert [record and record["prediction"] for record in records] == ["answer 0", None, "answer 3", None]
    assert records[2]["scores"] == {"chosen": -1, "rejected": 1}
    assert records[2]["target"] == "answer 2"


def test_equal_scores_count_one_half():
    _, metrics = evaluate(Scores([0.0] * 4), make_batch())
    assert metrics["accuracy"] == metrics["accuracy_shorter_chosen"] == 0.5
    assert metrics["calibration_error"] == 0
    assert metrics["length_correlation"] == 0


def test_log_probabilities_of_policies_are_reported():
    _, metrics = evaluate(Scores([1.0, 0.0, 1.0, 0.0], [-4.0, -3.0, -2.0, -6.0]), make_batch())
    assert (metrics["chosen_logprob"], metrics["rejected_logprob"]) == (-3, -4.5)
    assert metrics["logprob_accuracy"] == 0.5


def test_a_question_with_many_answers_counts_once():
    batch = make_batch(([1],) * 5, groups=(0, 0, 1, 1, 1), grades=(1.0, 0.0, 0.0, -1.0, -2.0))
    records, metrics = evaluate(Scores([1.0, 0.0, 0.0, 1.0, 2.0]), batch)
    assert metrics["accuracy"] == 0.5  # one of one pair is right, and none of three
    assert list(records[2]["scores"]) == ["answer_1", "answer_2", "answer_3"]


def test_a_test_reports_an_interval():
    _, metrics = evaluate(Scores([1.0, 0.0, 1.0, 0.0]), make_batch(), stage="test")
    assert (metrics["accuracy_low"], metrics["accuracy_high"]) == (1, 1)


def test_calibration_is_drawn_over_the_confidence():
    figure = calibration_figure(np.array([math.log(4)] * 30 + [-math.log(4)] * 10))
    confidence, accuracy = figure.axes[0].get_lines()[1].get_data()
    np.testing.assert_allclose(confidence, 0.8)
    assert np.mean(accuracy) == pytest.approx(0.75)


def test_liked_answers_are_compared_with_all_others():
    batch = make_batch()
    batch.groups = None
    evaluation = LikedEvaluation()
    records = evaluation.update(Scores([0.5, 0.5, 2.0, 1.0]), batch)
    metrics = {name: float(value) for name, value in evaluation.compute().items()}
    # liked: 0.5 and 2, others: 0.5 and 1
    assert metrics == {"accuracy": (0.5 + 0 + 1 + 1) / 4, "liked_score": 1.25, "disliked_score": 0.75}
    assert [record["target"] for record in records] == ["liked", "disliked", "liked", "disliked"]
    assert records[2]["scores"] == {"score": 2}


def test_calibration_error():
    differences = np.array([math.log(4), math.log(4), math.log(4), -math.log(4)])  # confidence 0.8, 3 of 4 right
    assert calibration_error(differences, np.full(4, 0.25)) == pytest.approx(0.05)
