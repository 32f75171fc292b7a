"""Generation by the packaged real backbone, which has the properties tested on tiny random backbones."""

import pytest
import torch
from torch.testing import assert_close

from lightning_softprompt.backbones.conversation import Conversation
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import SoftPrompt
from lightning_softprompt.methods import PrefixTuning, PromptTuning
from lightning_softprompt.prompts.init import FromText
from lightning_softprompt.prompts.merge_rows import merge_prompts

pytestmark = pytest.mark.slow
TEMPLATE = Template("user\n{soft}{text}<|im_end|>\n<|im_start|>assistant\n{target}")
TEXTS = (
    "Name the capital of France.",
    "Which animals give us wool, and what is made of it? Answer in one short sentence.",
    "Write a line about rain.",
)
MAX_NEW_TOKENS = 12


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(BackboneSpec(linear_backend="plain"))


@pytest.fixture(scope="module")
def methods(backbone):
    """A method of soft tokens and one of keys and values, both changed after initialization."""
    methods = [
        PromptTuning(length=7, init=FromText("Be brief and plain, please."), backbone=backbone.spec),
        PrefixTuning(length=5, width=None, backbone=backbone.spec),
    ]
    for method in methods:
        method.attach(backbone, seed=1)
        with torch.no_grad():
            for parameter in method.parameters():
                if parameter.requires_grad:
                    parameter += 0.02 * torch.randn_like(parameter)
    return methods


def batch_of(backbone, texts=TEXTS):
    codec = backbone.codec
    return codec.collate([codec.encode(TEMPLATE.pieces({"text": text}), "") for text in texts])


@pytest.mark.parametrize("number", [0, 1], ids=["soft tokens", "keys and values"])
def test_every_decoding_path_generates_the_same_text(backbone, methods, number):
    lm, batch = methods[number].lm(), batch_of(backbone)
    alone = [lm.generate(batch_of(backbone, [text]), max_new_tokens=MAX_NEW_TOKENS) for text in TEXTS]
    expected = [backbone.codec.decode(ids)[0] for ids in alone]
    assert all(expected)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}):
        ids = lm.generate(batch, max_new_tokens=MAX_NEW_TOKENS, **options)
        assert backbone.codec.decode(ids) == expected, options


def test_generated_tokens_are_the_most_likely_of_the_forward_pass(backbone, methods):
    codec = backbone.codec
    for method in methods:
        ids = method.lm().generate(batch_of(backbone, TEXTS[:1]), max_new_tokens=MAX_NEW_TOKENS)[0].tolist()
        row = batch_of(backbone, TEXTS[:1]).require_encoded()[0]
        with torch.no_grad():
            logits = method(codec.collate([codec.with_answer(row, ids)]))[0]
        assert logits.argmax(-1).tolist() == ids


def test_a_prompt_that_is_switched_off_is_the_bare_model(backbone, methods):
    (row,) = batch_of(backbone, TEXTS[:1]).require_encoded()
    ids = torch.tensor([row.ids])
    options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    expected = backbone.model.generate(ids, **options)[:, ids.shape[1] :]
    for method in methods:
        method.lm().generate(batch_of(backbone), max_new_tokens=2)
        output = method.lm().generate(batch_of(backbone, TEXTS[:1]), prompted=False, max_new_tokens=MAX_NEW_TOKENS)
        assert torch.equal(output, expected)


def test_prompts_of_different_methods_in_one_batch_equal_each_alone(backbone, methods):
    batch = batch_of(backbone)
    prompts = [*(method.prompt(batch) for method in methods), SoftPrompt()]
    together = merge_prompts([([row], prompt) for row, prompt in enumerate(prompts)], batch)
    texts = backbone.codec.decode(backbone.generate(batch, together, max_new_tokens=MAX_NEW_TOKENS))
    for row, prompt in enumerate(prompts):
        alone = backbone.generate(batch_of(backbone, TEXTS[row : row + 1]), prompt, max_new_tokens=MAX_NEW_TOKENS)
        assert [texts[row]] == backbone.codec.decode(alone)


def test_beams_are_ranked_by_their_likelihood(backbone, methods):
    codec, lm = backbone.codec, methods[0].lm()
    lengths = {"max_new_tokens": 6, "min_new_tokens": 6}
    beams = lm.generate(batch_of(backbone, TEXTS[:1]), num_beams=3, num_return_sequences=3, **lengths)
    (row,) = batch_of(backbone, TEXTS[:1]).require_encoded()
    batch = codec.collate([codec.with_answer(row, ids) for ids in beams.tolist()])
    with torch.no_grad():
        scores = -lm.cross_entropy(batch).sum(1)
    assert_close(scores, scores.sort(descending=True).values)
    greedy = lm.generate(batch_of(backbone, TEXTS[:1]), **lengths)
    greedy_batch = codec.collate([codec.with_answer(row, greedy[0].tolist())])
    with torch.no_grad():
        assert scores[0] >= -lm.cross_entropy(greedy_batch).sum() - 1e-4


def test_a_conversation_continues_from_its_cache(backbone, methods):
    codec = backbone.codec
    for method in methods:
        batch = batch_of(backbone, TEXTS[:1])
        conversation = Conversation(backbone, batch, method.prompt(batch))
        first = conversation.answer(max_new_tokens=MAX_NEW_TOKENS)[0].tolist()
        turn = "\n<|im_start|>user\nAnd of Italy?<|im_end|>\n<|im_start|>assistant\n"
        conversation.add(turn)
        second = conversation.answer(max_new_tokens=MAX_NEW_TOKENS)[0].tolist()
        answer = [*first, *codec.ids(turn), *second]
        (row,) = batch.require_encoded()
        with torch.no_grad():
            logits = method(codec.collate([codec.with_answer(row, answer)]))[0]
        assert logits[-len(second) :].argmax(-1).tolist() == second
