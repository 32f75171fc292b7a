"""Rewards of answers, on texts whose reward is known."""

import re

import pytest
import torch
from policies import make_questions
from preferences import first_batch

from lightning_softprompt import load_prompt, save_prompt
from lightning_softprompt.core.types import Classes
from lightning_softprompt.methods import PromptTuning
from lightning_softprompt.objectives.reward_modeling import RewardModeling
from lightning_softprompt.readouts.reward_head import RewardHead
from lightning_softprompt.rewards.class_probability import ClassProbability
from lightning_softprompt.rewards.learned import Learned
from lightning_softprompt.rewards.length import Length
from lightning_softprompt.rewards.meets_constraints import MeetsConstraints
from lightning_softprompt.rewards.overlap import Overlap
from lightning_softprompt.rewards.overlong import Overlong
from lightning_softprompt.rewards.pattern import Pattern
from lightning_softprompt.rewards.unfinished import Unfinished
from lightning_softprompt.rewards.weighted_sum import WeightedSum

ANSWERS = ["a warm and funny film", "dull", "it is a sad story", "film film"]
ROWS = [
    {"prompt": f"this film {word}", "best": ["a warm film", "dull"], "rules": [{"kind": "no_commas"}, rule]}
    for word, rule in (
        ("is", {"kind": "word_count", "low": 1, "high": 5}), ("was", {"kind": "word_count", "low": 3, "high": 5}),
        ("ends", {"kind": "keywords", "contains": ["sad"]}), ("that", {"kind": "keywords", "contains": ["sad"]}),
    )
]  # fmt: skip


@pytest.fixture
def scored(load, tiny_folder):
    """A function from a reward to the rewards of `ANSWERS`; only the second one is not finished."""
    backbone = load("llama")
    data = make_questions(tiny_folder("llama"), ROWS, references="best", constraints="rules", batch_size=4)
    questions = first_batch(data)
    order = [
        next(i for i, row in enumerate(ROWS) if row["prompt"] == example.fields["prompt"])
        for example in questions.examples
    ]
    codec = backbone.codec
    method = PromptTuning(length=2)
    method.attach(backbone)
    answers = [[[*codec.ids(ANSWERS[i]), *(codec.stop if i != 1 else ())]] for i in order]
    batch = codec.with_answers(questions, answers)
    batch.examples = questions.examples

    def score(reward):
        values = reward(method.lm(), batch)
        assert values.dtype == torch.float32
        assert not values.requires_grad
        return [values.tolist()[order.index(i)] for i in range(4)]

    return score


def test_rewards_of_text(scored):
    assert scored(Length(2)) == [-1.5, -0.5, -1.5, 0]
    assert scored(Pattern("^a|story$")) == [1, 0, 1, 0]
    assert scored(Unfinished()) == [0, -1, 0, 0]
    assert scored(Overlong(2, 6)) == pytest.approx([-1, 0, -1, -0.25])  # 6, 1, 6 and 3 tokens
    assert scored(Overlap("rouge1")) == pytest.approx([2 * 3 / 8, 1, 2 / 8, 2 / 5])
    assert scored(MeetsConstraints()) == [1, 0.5, 1, 0.5]
    assert scored(MeetsConstraints([{"kind": "ends_with", "phrase": "film"}])) == [1, 0, 0, 1]


def test_rewards_add_up(scored):
    both = WeightedSum({"length": Length(2), "ends": Unfinished()}, {"ends": 10.0})
    assert scored(both) == [-1.5, -10.5, -1.5, 0]


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Length(0)
    with pytest.raises(ValueError, match="is not a regular expression"):
        Pattern("(")
    with pytest.raises(ValueError, match="above start"):
        Overlong(5, 5)
    with pytest.raises(ValueError, match="must name rewards"):
        WeightedSum({"length": Length(2)}, {"other": 1.0})
    with pytest.raises(ValueError, match="unknown constraint"):
        MeetsConstraints([{"kind": "unknown"}])


def test_rewards_require_what_they_read(load, tiny_folder):
    questions = first_batch(make_questions(tiny_folder("llama")))
    backbone = load("llama")
    method = PromptTuning(length=2)
    method.attach(backbone)
    batch = backbone.codec.with_answers(questions, [[backbone.codec.ids("dull")]] * len(questions))
    with pytest.raises(ValueError, match="requires the rows as text"):
        Overlap()(method.lm(), batch)
    batch.examples = questions.examples
    with pytest.raises(ValueError, match="requires reference answers"):
        Overlap()(method.lm(), batch)
    with pytest.raises(ValueError, match="has no constraints"):
        MeetsConstraints()(method.lm(), batch)


def test_a_trained_reward_model_scores_answers(scored, load, tmp_path):
    backbone = load("llama")
    method = PromptTuning(length=3, backbone=backbone.spec, objective=RewardModeling(), readout=RewardHead)
    method.attach(backbone)
    path = save_prompt(method, tmp_path / "reward.safetensors")
    values = scored(Learned(str(path)))
    assert len(set(values)) == 4
    plain = save_prompt(_classifier(backbone), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="does not score answers"):
        scored(Learned(str(plain)))


def _classifier(backbone):
    classes = Classes({"bad": [" bad"], "good": [" good"]}, "{soft}{text} it was{target}")
    method = PromptTuning(length=3, backbone=backbone.spec, classes=classes)
    method.attach(backbone)
    return method


def test_a_trained_classifier_scores_the_first_line(scored, load, tmp_path):
    backbone = load("llama")
    method = _classifier(backbone)
    path = str(save_prompt(method, tmp_path / "classes.safetensors"))
    values = scored(ClassProbability(path, "good", "{prompt} {answer}"))
    texts = [f"{row['prompt']} {answer}" for row, answer in zip(ROWS, ANSWERS, strict=True)]
    expected = [record["scores"]["good"] for record in load_prompt(path, backbone).predict(texts)]
    assert values == pytest.approx(expected, abs=1e-5)
    odds = scored(ClassProbability(path, "good", "{prompt} {answer}", log_odds=True))
    assert torch.tensor(odds).sigmoid().tolist() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match=re.escape("has the classes ['bad', 'good'], but label is 'great'")):
        scored(ClassProbability(path, "great"))
