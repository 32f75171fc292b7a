"""Dialogues: all answers in one pass have the losses that they have one by one."""

import pytest
import torch
from tiny import CAUSAL

from lightning_softprompt.backbones.tokenization.dialogue import DialogueEncoder
from lightning_softprompt.core.chat_format import ChatFormat, Turn
from lightning_softprompt.core.types import IGNORE
from lightning_softprompt.methods import PromptTuning

FAMILIES = CAUSAL
TEXTS = ["a dog is good", "very good indeed", "a film", "dull", "that story", "sad and very long"]
ROLES = ("user", "assistant") * 3
CHAT = ChatFormat(user_opening="what ", user_closing=" ? ", assistant_opening="well ", assistant_closing=" ! ")


def encode(codec, learns_all, num_turns=6):
    turns = [Turn.of(role, text) for role, text in zip(ROLES, TEXTS, strict=True)][:num_turns]
    encoder = DialogueEncoder(codec, CHAT, max_tokens=48, learns_all=learns_all)
    return encoder.encode(turns[:-1], turns[-1].text)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_a_dialogue_has_the_losses_of_its_answers_one_by_one(family, load, packed):
    backbone = load(family, packed=packed)
    codec, method = backbone.codec, PromptTuning(length=3, backbone=backbone.spec)
    method.attach(backbone)
    with torch.no_grad():
        together = codec.collate([encode(codec, True), encode(codec, True, 4)])
        losses = method.lm().cross_entropy(together)
        alone = codec.collate([encode(codec, False, turns) for turns in (2, 4, 6)])
        by_answer = method.lm().cross_entropy(alone)
    rows = [row[targets != IGNORE] for row, targets in zip(by_answer, alone.targets, strict=True)]
    expected_whole, expected_shorter = torch.cat(rows), torch.cat(rows[:2])
    whole, shorter = losses[together.targets != IGNORE].split([len(expected_whole), len(expected_shorter)])
    torch.testing.assert_close(whole, expected_whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(shorter, expected_shorter, atol=1e-5, rtol=0)
    assert (whole > 0.1).all()


def test_the_last_answer_of_a_dialogue_is_generated_after_the_other_answers(family, backbone):
    codec = backbone.codec
    questions = codec.without_answers(codec.collate([encode(codec, True)]))
    expected = codec.without_answers(codec.collate([encode(codec, False)]))
    assert torch.equal(questions.input_ids, expected.input_ids)
    assert questions.source.all()
    assert questions.input_ids.shape[1] == len(encode(codec, True).ids) - 5


def test_the_text_before_the_first_answer_is_a_source_that_can_have_a_loss(family, backbone):
    codec = backbone.codec
    batch = codec.collate([encode(codec, True), encode(codec, True, 4)])
    single = codec.collate([encode(codec, True, 2)])
    view = backbone.language_modeling_view(batch)
    assert torch.equal(view.targets[0], view.targets[1])
    expected = backbone.language_modeling_view(single)
    assert torch.equal(view.targets[:1], expected.targets)
    with torch.no_grad():
        losses, expected_losses = backbone.cross_entropy(view), backbone.cross_entropy(expected)
    torch.testing.assert_close(losses[:1], expected_losses, atol=1e-5, rtol=0)
