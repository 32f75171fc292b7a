"""Comparisons of sampled answers with a reference, against loops and enumeration."""

from itertools import combinations

import numpy as np
import pytest
import torch
from policies import change, make_method, make_questions
from preferences import first_batch

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.evaluation.policy.answer_metrics import expected_best
from lightning_softprompt.evaluation.policy.reward_evaluation import RewardEvaluation, measure_divergence
from lightning_softprompt.methods import PromptTuning
from lightning_softprompt.objectives.policy.grpo import GRPO
from lightning_softprompt.rewards.length import Length
from lightning_softprompt.rewards.unfinished import Unfinished
from lightning_softprompt.rewards.weighted_sum import WeightedSum


@pytest.fixture
def trained(load):
    reward = WeightedSum({"length": Length(3), "end": Unfinished()}, {"end": 0.5})
    return make_method(PromptTuning, load("llama"), GRPO(reward=reward, max_new_tokens=6), length=2)


@pytest.fixture
def questions(tiny_folder):
    return first_batch(make_questions(tiny_folder("llama"), batch_size=4))


def evaluate(trained, questions, **options):
    evaluation = RewardEvaluation(Decoding(do_sample=True, max_new_tokens=6), **options)
    evaluation.begin("test", 0)
    lm = trained.objective.with_reward(trained.lm())
    with torch.no_grad():
        records = evaluation.update(lm, questions)
    return {name: float(value) for name, value in evaluation.compute().items()}, records, evaluation


def test_a_policy_that_equals_its_reference_has_no_lift(trained, questions):
    metrics, _, _ = evaluate(trained, questions, reference="start", judge=Length(5))
    assert metrics["lift"] == metrics["judge_lift"] == 0
    assert metrics["win_rate"] == metrics["win_rate_low"] == metrics["judge_win_rate"] == 0.5
    assert metrics["kl"] == pytest.approx(0, abs=1e-5)
    assert metrics["kl_k3"] == pytest.approx(0, abs=1e-9)


def test_metrics_are_means_of_the_records(trained, questions):
    change(trained)
    metrics, records, evaluation = evaluate(trained, questions, reference="start", judge=Length(5), reference_answers=4)
    rows = [record["details"] for record in records]
    for row in rows:
        assert row["reward"] == pytest.approx(row["reward_length"] + 0.5 * row["reward_end"])
    assert metrics["reward_end"] == pytest.approx(np.mean([row["finished"] - 1 for row in rows]))
    lifts = [row["judge"] - row["reference_judge"] for row in rows]
    assert metrics["judge_lift"] == pytest.approx(np.mean(lifts))
    assert metrics["judge_win_rate"] == pytest.approx(np.mean([(np.sign(lift) + 1) / 2 for lift in lifts]))
    assert metrics["best_of_1"] < metrics["best_of_2"] < metrics["best_of_4"]
    assert metrics["kl_k3"] > 0
    assert {"rewards", "win_rate_by_length", "reward_over_kl"} == evaluation.figures().keys()


def test_the_divergence_is_unknown_for_answers_of_another_distribution(trained, questions):
    evaluation = RewardEvaluation(Decoding(do_sample=True, top_p=0.9, max_new_tokens=6), reference="start")
    evaluation.begin("test", 0)
    evaluation.update(trained.objective.with_reward(trained.lm()), questions)
    assert "kl" not in evaluation.compute()
    assert "reward_over_kl" not in evaluation.figures()


def test_divergences_of_answers_are_sums_over_their_tokens(trained, questions):
    answered = trained.loaded.codec.with_answers(questions, [[[5, 6]], [[7]], [[8, 9, 5]], [[6]]])
    generator = torch.Generator().manual_seed(0)
    policy, reference = (-torch.rand(answered.targets.shape, generator=generator) for _ in range(2))
    measured = measure_divergence(policy, reference, answered)
    for row, count in enumerate((2, 1, 3, 1)):
        differences = (reference - policy)[row, :count].double()
        assert measured["kl"][row] == pytest.approx(float(-differences.sum()))
        assert measured["kl_k3"][row] == pytest.approx(float((differences.exp() - 1 - differences).sum()))
        assert measured["logprob"][row] == pytest.approx(float(policy[row, :count].sum()))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_best_of_n_is_the_mean_over_all_subsets(count):
    samples = np.random.default_rng(0).normal(size=(5, 2))
    best = [max(subset, key=lambda sample: sample[0]) for subset in combinations(samples.tolist(), count)]
    np.testing.assert_allclose(expected_best(samples, count), np.mean(best, axis=0))
