"""Several turns on one cache."""

from dataclasses import replace

import pytest
import torch
from tiny import CAUSAL, EOS, TEMPLATES, TEXTS, batch_of
from torch.nn.functional import pad

from lightning_softprompt.backbones.conversation import Conversation

FAMILIES = CAUSAL


def reaching(prompt, batch):
    """The prompt for a row that went on: what came later is not shifted."""
    if prompt.shift is None:
        return prompt
    return replace(prompt, shift=pad(prompt.shift, (0, 0, 0, batch.mask.shape[1] - prompt.shift.shape[1])))


def test_a_conversation_goes_on_from_its_cache(method, family, backbone):
    module, codec = method.on(backbone), backbone.codec
    batch = batch_of(codec, TEMPLATES["middle"], texts=[TEXTS[0]], targets=[""])
    prompt = module.prompt(batch)
    conversation = Conversation(backbone, batch, prompt)
    first = conversation.answer(max_new_tokens=3, min_new_tokens=3)
    assert torch.equal(first, backbone.generate(batch, prompt, max_new_tokens=3, min_new_tokens=3))
    conversation.add("dull dog")
    second = conversation.answer(max_new_tokens=3)
    row = batch.require_encoded()[0]
    longer = [*first[0].tolist(), *codec.ids("dull dog")]
    at_once = codec.collate([codec.with_answer(row, [*longer, 0])])
    assert int(backbone(at_once, reaching(prompt, at_once))[0, len(longer)].argmax()) == int(second[0, 0])
    again = codec.collate([codec.with_answer(row, [*longer, *second[0].tolist(), 0])])
    assert (
        backbone(again, reaching(prompt, again))[0, len(longer) :].argmax(-1)[: second.shape[1]].tolist()
        == second[0].tolist()
    )


def test_text_of_a_turn_does_not_end_it_but_its_template_may(family, backbone):
    codec = backbone.codec
    conversation = Conversation(backbone, batch_of(codec, texts=[TEXTS[0]], targets=[""]))
    said = conversation.answer(max_new_tokens=2, min_new_tokens=2)[0].tolist()
    conversation.add("dull </s> dog", before="</s> good", after="</s>")
    turn = conversation._text.tolist()[len(said) :]
    assert [place for place, id in enumerate(turn) if id == EOS] == [0, len(turn) - 1]


@pytest.mark.parametrize("option", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_what_wants_a_cache_of_its_own_is_refused(family, backbone, option):
    conversation = Conversation(backbone, batch_of(backbone.codec).only([0]))
    with pytest.raises(ValueError, match="does not support beams or speculative decoding"):
        conversation.answer(**option)


def test_a_conversation_has_one_row_and_begins_with_an_answer(family, backbone):
    with pytest.raises(ValueError, match="one row"):
        Conversation(backbone, batch_of(backbone.codec))
    with pytest.raises(ValueError, match="first turn"):
        Conversation(backbone, batch_of(backbone.codec).only([0])).add("dog")
