"""Scores of answers: the head, its fit, and the loss of reward models."""

import math
from types import SimpleNamespace

import pytest
import torch
from preferences import first_batch, make_preferences
from torch.nn.functional import logsigmoid

import lightning_softprompt as sp
from lightning_softprompt.backbones.microbatching import use_microbatches
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.answer_pairs import pairs_of
from lightning_softprompt.core.types import Classes
from lightning_softprompt.methods import DePT, PrefixTuning, PromptTuning
from lightning_softprompt.objectives.reward_modeling import RewardModeling
from lightning_softprompt.readouts.reward_head import RewardHead, fit_logistic


@pytest.fixture
def batch(tiny_folder):
    return first_batch(make_preferences(tiny_folder("llama")))


def make_method(load, cls=PromptTuning, family="llama", spec=(), **arguments):
    method = cls(objective=RewardModeling(), readout=RewardHead, **{"length": 3} | arguments)
    method.attach(load(family, **dict(spec)), seed=1)
    return method


def answer_scores(method, batch):
    return method.lm().answer_scores(batch)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_score_is_read_at_the_last_token(load, tiny_folder, family):
    """Scores are linear in `hidden_states` of padded rows, whichever side the padding is on."""
    right, left = (first_batch(make_preferences(tiny_folder(family), padding_side=side)) for side in ("right", "left"))
    method = make_method(load, family=family)
    expected = []
    for b in range(len(right)):
        row = method.loaded.codec.collate([right.encoded[b]])
        states = method.loaded.hidden_states(row, method.prompt(row))[0, -1]
        expected.append(method.readout.linear(states))
    expected = torch.cat(expected)
    torch.testing.assert_close(answer_scores(method, right), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(answer_scores(method, left), expected, rtol=0, atol=1e-5)
    alone = torch.cat([answer_scores(method, right.only([b])) for b in range(len(right))])
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cls", [PromptTuning, PrefixTuning, DePT])
def test_packed_and_padded_rows_have_the_same_scores(load, batch, cls):
    arguments = {"rank": 2, "max_tokens": 48} if cls is DePT else {}
    packed = make_method(load, cls, **arguments)
    padded = make_method(load, cls, spec={"packed": False}, **arguments)
    torch.testing.assert_close(answer_scores(packed, batch), answer_scores(padded, batch), rtol=0, atol=1e-5)


def test_microbatches_leave_scores_and_gradients_unchanged(load, batch):
    method = make_method(load)
    gradients = []
    for parts in (1, 3):
        with use_microbatches(method.loaded, parts):
            loss = method.step(batch)["loss"]
            gradients.append(torch.autograd.grad(loss, method.readout.linear.weight)[0])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_initial_weights_have_the_variance_of_the_paper(load):
    weight = make_method(load).readout.linear.weight
    assert float(weight.detach().std()) == pytest.approx(1 / math.sqrt(33), rel=0.3)
    assert make_method(load).readout.linear.bias.item() == 0


def test_the_prompt_has_a_gradient(load, batch):
    method = make_method(load)
    method.step(batch)["loss"].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in method.parameters() if parameter.requires_grad and
               parameter is not method.readout.linear.bias)  # fmt: skip


def test_the_head_has_its_learning_rate(load):
    groups = make_method(load).trainable_groups()
    assert [(group["name"], group.get("lr"), len(group["params"])) for group in groups] == [
        ("prompt", None, 1), ("readout", 0.001, 2)
    ]  # fmt: skip


def fixed_scores(scores):
    backbone = SimpleNamespace(prompt_view=lambda batch: batch)
    return PromptedLM(backbone, lambda batch: None, lambda lm, batch: scores)


def test_the_loss_is_the_equation(batch):
    scores = torch.tensor([0.3, -0.2, 1.0, 2.0, 0.0, 0.0, -3.0, 1.0])
    batch.margins = torch.tensor([0.5, 0, 0, 0, 1.0, 0, 0, 0])
    objective = RewardModeling(centering=0.01, label_smoothing=0.1)
    losses = []
    for w in range(0, 8, 2):
        x = scores[w] - scores[w + 1] - batch.margins[w]
        center = 0.01 * (scores[w] + scores[w + 1]) ** 2
        losses.append(-0.9 * logsigmoid(x) - 0.1 * logsigmoid(-x) + center)
    outcome = objective(fixed_scores(scores), batch)
    torch.testing.assert_close(outcome.loss, torch.stack(losses).mean())
    assert float(outcome.logs["reward_accuracy"]) == (1 + 0 + 0.5 + 0) / 4


def test_a_constant_changes_nothing_and_swapped_answers_change_the_sign(batch):
    scores = torch.randn(8, generator=torch.Generator().manual_seed(0))
    loss = RewardModeling()(fixed_scores(scores), batch).loss
    torch.testing.assert_close(RewardModeling()(fixed_scores(scores + 5), batch).loss, loss)
    swapped = scores.unflatten(0, (4, 2)).flip(1).flatten()
    torch.testing.assert_close(RewardModeling()(fixed_scores(swapped), batch).loss,
                               RewardModeling()(fixed_scores(-scores), batch).loss)  # fmt: skip


def test_ranked_answers_average_over_the_pairs_of_each_question(tiny_folder):
    rows = [
        {"prompt": "a dog is", "answers": ["good", "bad", "dull"]},
        {"prompt": "the story", "answers": ["ends well", "was bad"]},
    ]
    batch = first_batch(make_preferences(tiny_folder("llama"), train=rows, answers="answers"))
    scores = torch.tensor([0.4, 0.1, -0.3, 0.2, 0.5])
    first_differences = scores[[0, 0, 1]] - scores[[1, 2, 2]]
    second_difference = scores[3] - scores[4]
    expected = (-logsigmoid(first_differences).mean() - logsigmoid(second_difference)) / 2
    outcome = RewardModeling()(fixed_scores(scores), batch)
    torch.testing.assert_close(outcome.loss, expected)
    assert int(RewardModeling().count(batch)) == 2


def test_sft_adds_the_cross_entropy_of_the_better_answers(load, batch):
    method = make_method(load)
    lm = method.lm()
    outcome, plain = RewardModeling(sft_weight=0.5)(lm, batch), RewardModeling()(lm, batch)
    chosen = batch.only([0, 2, 4, 6])
    nll = lm.cross_entropy(chosen).sum(1) / (chosen.targets >= 0).sum(1)
    torch.testing.assert_close(outcome.loss - plain.loss, 0.5 * nll.mean())


def test_the_fit_is_the_minimum():
    inputs = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    weights = fit_logistic(inputs, 0.3)
    gradient = -(inputs * torch.sigmoid(-(inputs @ weights))[:, None]).mean(0) + 0.3 * weights
    assert float(gradient.abs().max()) < 1e-6


def test_the_fitted_head_has_the_scores_of_the_regression(load, batch):
    method = make_method(load)
    states = method.readout.features(method.lm(), batch)
    margins = method.readout.fit(states[0::2], states[1::2])
    assert bool((margins > 0).all())
    scores = answer_scores(method, batch)
    torch.testing.assert_close(pairs_of(batch).differences(scores), margins.float(), rtol=1e-3, atol=1e-4)
    assert abs(float(scores.mean())) < 1e-4


def test_the_normalization_is_applied_and_saved(load, batch):
    method = make_method(load)
    scores = answer_scores(method, batch)
    method.readout.mean.fill_(2.0)
    method.readout.std.fill_(4.0)
    torch.testing.assert_close(answer_scores(method, batch), (scores - 2) / 4)
    assert {"readout.mean", "readout.std", "readout.linear.weight"} <= set(method.state_dict())


def test_what_cannot_be_scored_is_refused(load, batch, tiny_folder):
    with pytest.raises(ValueError, match="requires a decoder-only backbone"):
        make_method(load, family="t5")
    with pytest.raises(ValueError, match="but the data has the classes"):
        RewardHead(load("llama").codec, Classes({"good": (" good",)}))
    with pytest.raises(ValueError, match="l2 and lr of RewardHead must be above 0"):
        RewardHead(load("llama").codec, Classes({}), l2=0)
    with pytest.raises(ValueError, match="set --model\\.readout to RewardHead"):
        RewardModeling()(PromptedLM(None, None), batch)
    method = sp.PromptTuning(length=2)
    method.attach(load("llama"), seed=1)
    with pytest.raises(ValueError, match="LanguageModeling would also learn the rejected answers"):
        method.step(batch)
    with pytest.raises(ValueError, match="label_smoothing must be at least 0"):
        RewardModeling(label_smoothing=0.5)
    batch.groups = None
    with pytest.raises(ValueError, match="use PreferenceDataModule"):
        RewardModeling()(fixed_scores(torch.zeros(8)), batch)
    with pytest.raises(ValueError, match="states of single input tokens require a decoder-only backbone"):
        load("t5").states(batch, None, batch.slots)
