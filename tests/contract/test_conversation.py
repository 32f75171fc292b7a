"""Conversations: several turns with one cache."""

from dataclasses import replace

import pytest
import torch
from tiny import CAUSAL, EOS, TEMPLATES, TEXTS, batch_of
from torch.nn.functional import pad

from lightning_softprompt.backbones.conversation import Conversation

FAMILIES = CAUSAL


def extend_shift(prompt, batch):
    """Returns the prompt for a longer row, in which later tokens are not shifted."""
    if prompt.shift is None:
        return prompt
    missing = batch.mask.shape[1] - prompt.shift.shape[1]
    return replace(prompt, shift=pad(prompt.shift, (0, 0, 0, missing)))


def test_a_conversation_continues_from_its_cache(method, family, backbone):
    module, codec = method.on(backbone), backbone.codec
    batch = batch_of(codec, TEMPLATES["middle"], texts=[TEXTS[0]], targets=[""])
    prompt = module.prompt(batch)
    conversation = Conversation(backbone, batch, prompt)
    first = conversation.answer(max_new_tokens=3, min_new_tokens=3)
    assert torch.equal(first, backbone.generate(batch, prompt, max_new_tokens=3, min_new_tokens=3))
    conversation.add("dull dog")
    second = conversation.answer(max_new_tokens=3)
    row = batch.require_encoded()[0]
    history, answer = [*first[0].tolist(), *codec.ids("dull dog")], second[0].tolist()
    whole_row = codec.collate([codec.with_answer(row, [*history, *answer, 0])])
    logits = backbone(whole_row, extend_shift(prompt, whole_row))[0]
    most_likely = logits[len(history) :].argmax(-1)
    assert most_likely[: len(answer)].tolist() == answer


def test_end_tokens_are_read_from_the_template_of_a_turn_but_not_from_its_text(family, backbone):
    codec = backbone.codec
    conversation = Conversation(backbone, batch_of(codec, texts=[TEXTS[0]], targets=[""]))
    answer = conversation.answer(max_new_tokens=2, min_new_tokens=2)[0].tolist()
    conversation.add("dull </s> dog", before="</s> good", after="</s>")
    turn = conversation._text.tolist()[len(answer) :]
    assert [position for position, id in enumerate(turn) if id == EOS] == [0, len(turn) - 1]


@pytest.mark.parametrize("option", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_decoding_that_requires_another_cache_is_refused(family, backbone, option):
    conversation = Conversation(backbone, batch_of(backbone.codec).only([0]))
    with pytest.raises(ValueError, match="does not support beams or speculative decoding"):
        conversation.answer(**option)


def test_a_conversation_has_one_row_and_begins_with_an_answer(family, backbone):
    with pytest.raises(ValueError, match="one row"):
        Conversation(backbone, batch_of(backbone.codec))
    with pytest.raises(ValueError, match="first turn"):
        Conversation(backbone, batch_of(backbone.codec).only([0])).add("dog")
