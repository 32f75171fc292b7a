"""Penalties on soft tokens by the equations of their papers, and dropout."""

from math import exp, inf

import pytest
import torch
from tiny import CLASSES, batch_of
from torch.testing import assert_close

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import SoftPrompt
from lightning_softprompt.evaluation.classification import ClassificationEvaluation
from lightning_softprompt.methods import PrefixTuning, PromptTuning
from lightning_softprompt.objectives.penalties import AwareNorm, UniformNorm, Wayward, accuracy, scale_tokens
from lightning_softprompt.prompts.dropout import apply_dropout
from lightning_softprompt.prompts.kv_prefix import NormalKeysValues
from lightning_softprompt.readouts.label_words import LabelWords

FAMILIES = ("llama", "t5")
LABELS = (0, 1, 1, 0)


@pytest.fixture
def tokens(backbone):
    return torch.randn(1, 4, backbone.hidden_size, requires_grad=True)


@pytest.fixture
def lm(backbone, tokens):
    return PromptedLM(backbone, lambda _: SoftPrompt(tokens=tokens), LabelWords(backbone.codec, CLASSES))


@pytest.fixture
def batch(backbone):
    return batch_of(backbone.codec, labels=LABELS)


@pytest.mark.parametrize("order", [1.0, 2.0, inf])
def test_uniform_norm(lm, batch, tokens, order):
    norms = {
        1.0: lambda v: v.abs().sum(),
        2.0: lambda v: v.pow(2).sum().sqrt(),
        inf: lambda v: v.abs().max(),
    }
    norm = norms[order]
    token_mean = sum(norm(token) for token in tokens[0]) / 4
    assert_close(UniformNorm(3.0, order, "constant", relative=False)(lm, batch, 0.3), 3.0 * token_mean)
    words = lm.backbone.word_embeddings
    word_mean = sum(norm(word) for word in words) / len(words)
    assert_close(UniformNorm(3.0, order, "constant")(lm, batch, 0.3), 3.0 * token_mean / word_mean)


def test_the_schedule_of_the_paper(lm, batch):
    constant = UniformNorm(1.0, schedule="constant")(lm, batch, 0.0)
    for epoch in (0, 10, 25, 50):
        share = 1 - 1 / (1 + exp(-0.2 * (epoch - 50 / 2)))
        assert_close(UniformNorm(1.0)(lm, batch, epoch / 50), share * constant)


def test_aware_norm_penalizes_tokens_that_improve_accuracy_when_scaled_down(lm, batch, tokens, monkeypatch):
    """Tries every position and penalizes the positions at which accuracy rises."""
    improves = {0: False, 1: True, 2: False, 3: True}

    def measure(tried, _):
        changed = (tried.prompt(batch).tokens != tokens).any(-1)[0].nonzero()[:, 0].tolist()
        return 0.5 + 0.25 * (len(changed) == 1 and improves[changed[0]])

    monkeypatch.setattr("lightning_softprompt.objectives.penalties.accuracy", measure)
    penalty = AwareNorm(2.0, positions=4, schedule="constant", relative=False)
    expected = (tokens[0, 1].norm() + tokens[0, 3].norm()) / 2
    assert_close(penalty(lm, batch, 0.0), 2.0 * expected)
    untested = AwareNorm(2.0, 4, schedule="constant", relative=False, tested=False)
    assert_close(untested(lm, batch, 0.0), 2.0 * tokens[0].norm(dim=-1).mean())
    improves.update({1: False, 3: False})
    assert penalty(lm, batch, 0.0) == 0


def test_scaling_changes_only_the_given_positions(lm, batch, tokens):
    changed = scale_tokens(lm, batch, [2], 0.1).prompt(batch).tokens
    assert_close(changed[0, 2], 0.1 * tokens[0, 2])
    assert_close(changed[:, [0, 1, 3]], tokens[:, [0, 1, 3]])


def test_accuracy_is_computed_from_the_scores(lm, batch):
    predictions = lm.scores(batch).argmax(-1)
    num_correct = sum(int(predictions[row]) == label for row, label in enumerate(LABELS))
    assert accuracy(lm, batch) == num_correct / 4


def test_wayward(lm, batch, tokens):
    text = "it is a"
    words = lm.backbone.embed(torch.tensor(lm.backbone.codec.ids(text)))
    expected = sum((tokens[0, i] - words[i]).pow(2).sum() for i in range(3)) / 3
    assert_close(Wayward(text, 0.5)(lm, batch, 0.0), 0.5 * expected)


def test_penalties_are_part_of_the_loss_and_of_the_logs(backbone, batch):
    def build(penalties):
        evaluation = ClassificationEvaluation(CLASSES.names)
        module = PromptTuning(4, backbone=backbone.spec, classes=CLASSES, penalties=penalties, evaluation=evaluation)
        module.attach(backbone, seed=1)
        return module

    plain = build(None).step(batch)
    penalized = build([UniformNorm(0.5), Wayward("it is")]).step(batch, progress=0.4)
    terms = penalized["penalty/uniformnorm"] + penalized["penalty/wayward"]
    assert terms > 0
    assert_close(penalized["loss"], plain["loss"] + terms)


def test_a_penalty_on_soft_tokens_is_rejected_by_a_method_without_them(backbone, batch):
    module = PrefixTuning(2, width=None, init=NormalKeysValues(), penalties=[UniformNorm()], backbone=backbone.spec)
    module.attach(backbone)
    with pytest.raises(ValueError, match="the method has none"):
        module.step(batch)


def test_dropout_zeroes_a_share_and_keeps_the_mean():
    torch.manual_seed(0)
    kv = {"self": {0: (torch.ones(1, 2, 30, 8), torch.ones(1, 2, 30, 8))}}
    prompt = SoftPrompt(tokens=torch.ones(1, 50, 40), kv=kv, hidden={3: torch.ones(1, 50, 40)})
    dropped = apply_dropout(prompt, 0.25)
    for tensor in (dropped.tokens, *dropped.kv["self"][0], dropped.hidden[3]):
        assert_close(tensor.unique(), torch.tensor([0.0, 1 / 0.75]))
        assert abs(tensor.mean() - 1) < 0.1
        assert len(tensor) == 1


def test_dropout_applies_only_in_training(backbone, batch):
    module = PromptTuning(4, prompt_dropout=0.5, backbone=backbone.spec)
    module.attach(backbone)
    assert not torch.equal(module.lm().prompt(batch).tokens, module.tokens[None])
    assert torch.equal(module.eval().lm().prompt(batch).tokens, module.tokens[None])
