"""Requirements of generation for every method, family and decoding method."""

from functools import partial

import pytest
import torch
from tiny import CAUSAL, SEQ2SEQ, TEMPLATES, TEXTS, batch_of, encode_rows, list_answers, on_side, perturb, real
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, TextIteratorStreamer

from lightning_softprompt.backbones.execution import context_cache
from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.core.types import SoftPrompt
from lightning_softprompt.methods import PrefixTuning, PromptTuning
from lightning_softprompt.methods.optimizers import trainable_parameters
from lightning_softprompt.prompts.kv_prefix import NormalKeysValues
from lightning_softprompt.prompts.merge_rows import merge_prompts

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
FAMILIES = (*CAUSAL, *SEQ2SEQ)
MAX_NEW_TOKENS = 5
DETERMINISTIC = {  # decoding without sampling
    "greedy": {},
    "beams": {"num_beams": 3, "length_penalty": 0.5},
    "several": {"num_beams": 3, "num_return_sequences": 2},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "stop": {"stop": ["dog", "film good"]},
}


def decode_texts(codec, ids):
    return [text.strip() for text in codec.decode(ids)]


@pytest.mark.rotate(decoding=DETERMINISTIC)
def test_rows_get_the_same_answers_in_a_batch_and_alone(method, family, backbone, decoding):
    module, codec = method.on(backbone), backbone.codec
    rows = encode_rows(codec, TEMPLATES["middle"])
    generate = partial(module.lm().generate, max_new_tokens=MAX_NEW_TOKENS, **DETERMINISTIC[decoding])
    alone = []
    for row in rows:
        alone += decode_texts(codec, generate(codec.collate([row])))
    for side in ("right", "left"):
        batch = on_side(codec, side).collate(rows)
        assert decode_texts(codec, generate(batch)) == alone


@pytest.mark.rotate(shortcut=["static cache", "prompt lookup", "assistant"])
def test_static_caches_and_speculative_decoding_give_the_greedy_answer(method, family, backbone, load_once, shortcut):
    module, codec = method.on(backbone), backbone.codec
    batch = batch_of(codec, TEMPLATES["middle"])
    expected = module.lm().generate(batch, max_new_tokens=MAX_NEW_TOKENS)
    decoding = {
        "static cache": {"cache_implementation": "static"},
        "prompt lookup": {"prompt_lookup_num_tokens": 2},
        "assistant": {"assistant_model": load_once(family, seed=1).model},
    }[shortcut]
    result = module.lm().generate(batch, max_new_tokens=MAX_NEW_TOKENS, **decoding)
    assert list_answers(result) == list_answers(expected)


@torch.no_grad()
def test_beams_are_sorted_by_the_score_of_the_forward_pass(method, family, backbone):
    module, codec = method.on(backbone), backbone.codec
    row = encode_rows(codec, TEMPLATES["middle"])[0]
    beams = module.lm().generate(
        codec.collate([row]), max_new_tokens=3, min_new_tokens=3, num_beams=4, num_return_sequences=4
    )
    batches = [codec.collate([codec.with_answer(row, answer)]) for answer in beams.tolist()]
    scores = torch.stack([-backbone.cross_entropy(batch, module.prompt(batch)).sum() for batch in batches])
    assert_close(scores, scores.sort(descending=True).values)


def build_reference(backbone, tiny_folder, family):
    """Returns a batch, and a function that generates for it with another instance of the model in transformers."""
    codec = on_side(backbone.codec, "left" if family in CAUSAL else "right")  # BART counts padding before a row
    batch = batch_of(codec, TEMPLATES["front"], targets=[""] * len(TEXTS))
    auto = AutoModelForCausalLM if family in CAUSAL else AutoModelForSeq2SeqLM
    model = auto.from_pretrained(tiny_folder(family))
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.mask.long(), "pad_token_id": backbone.codec.pad_id}
    skip = batch.input_ids.shape[1] if family in CAUSAL else 1
    return batch, lambda **decoding: model.generate(**inputs, **decoding)[:, skip:]


@pytest.mark.parametrize("decoding", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}], ids=str)
@pytest.mark.methods("prompt_tuning", "prefix_tuning", "dept", "idpg", "late_state")  # one per kind of prompt
def test_without_its_prompt_a_method_generates_as_the_bare_model(method, family, backbone, tiny_folder, decoding):
    module = perturb(method.on(backbone))
    batch, reference = build_reference(backbone, tiny_folder, family)
    module.lm().generate(batch, max_new_tokens=MAX_NEW_TOKENS)  # must leave no state for the next call
    result = module.lm().generate(batch, prompted=False, max_new_tokens=MAX_NEW_TOKENS, **decoding)
    assert list_answers(result) == list_answers(reference(max_new_tokens=MAX_NEW_TOKENS, **decoding))


SAMPLING = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.05}


@pytest.mark.parametrize("setting", SAMPLING)
def test_sampling_draws_the_same_tokens_as_transformers(family, backbone, tiny_folder, setting):
    decoding = Decoding(MAX_NEW_TOKENS, do_sample=True, seed=3, **{setting: SAMPLING[setting]})
    batch, reference = build_reference(backbone, tiny_folder, family)
    with decoding.drawing():
        result = backbone.generate(batch, **decoding.options)
    torch.manual_seed(3)
    options = {"do_sample": True, "top_k": 0, setting: SAMPLING[setting]}
    assert list_answers(result) == list_answers(reference(max_new_tokens=MAX_NEW_TOKENS, **options))


def test_sampled_tokens_depend_only_on_the_seed(backbone, family):
    batch, state = batch_of(backbone.codec), torch.get_rng_state()

    def sample(seed):
        decoding = Decoding(12, do_sample=True, temperature=3.0, seed=seed)
        with decoding.drawing():
            return decoding.texts(backbone.codec, backbone.generate(batch, **decoding.options))

    assert sample(1) == sample(1) != sample(2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_penalties_apply_to_the_answer_only_at_any_position_of_the_prompt(family, backbone, template):
    prompt = SoftPrompt(tokens=backbone.embed(torch.tensor([[7, 8, 9]])))
    batch = batch_of(backbone.codec, template)
    expected = backbone.generate(batch, prompt, max_new_tokens=1)
    assert torch.equal(backbone.generate(batch, prompt, max_new_tokens=1, repetition_penalty=50.0), expected)
    long = backbone.generate(batch, prompt, max_new_tokens=8, min_new_tokens=8, no_repeat_ngram_size=1)
    assert all(len(set(row)) == len(row) for row in long.tolist())


def test_an_answer_ends_before_its_stop_text(family, backbone):
    batch = batch_of(backbone.codec, targets=[""] * len(TEXTS))
    answers = backbone.codec.decode(backbone.generate(batch, max_new_tokens=8))
    words_of_rows = [answer.split() for answer in answers]
    row = max(range(len(answers)), key=lambda i: len(set(words_of_rows[i])))
    words = words_of_rows[row]
    stop = max(words, key=len)  # no other word contains the longest one
    decoding = Decoding(8, stop=(stop,))
    stopped = backbone.generate(batch, **decoding.options)
    first = words.index(stop)
    assert decoding.texts(backbone.codec, stopped)[row].split() == words[:first]
    assert backbone.codec.decode(stopped)[row].split() == words[: first + 1]


def build_methods(backbone):
    """Returns one method per row: soft tokens, or keys and values, of different lengths; None for no prompt."""
    assert backbone.attentions
    torch.manual_seed(1)
    methods = [
        PromptTuning(backbone=backbone.spec, length=3),
        PrefixTuning(backbone=backbone.spec, length=2, width=None, init=NormalKeysValues(0.5)),
        PromptTuning(backbone=backbone.spec, length=5),
        PrefixTuning(backbone=backbone.spec, length=4, width=None, init=NormalKeysValues(0.5)),
    ]
    for method in methods:
        method.attach(backbone)
    return [*methods, None]


FIVE_TEXTS = (*TEXTS, "good")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_merged_prompts_of_different_methods_have_the_same_effect_as_alone(family, backbone, template):
    codec = backbone.codec
    batch = batch_of(codec, template, FIVE_TEXTS, ("very good indeed", "bad", "sad", "very great", "long"))
    methods = build_methods(backbone)
    rows = [batch.only([i]) for i in range(len(batch))]
    prompts = [
        SoftPrompt() if method is None else method.prompt(row) for method, row in zip(methods, rows, strict=True)
    ]
    merged = merge_prompts([([i], prompt) for i, prompt in enumerate(prompts)], batch)
    logits = real(batch, backbone(batch, merged))
    alone = [real(row, backbone(row, prompt)) for row, prompt in zip(rows, prompts, strict=True)]
    expected = torch.cat(alone)
    assert_close(logits, expected, **CLOSE)
    for gradient, expected_gradient in zip(gradients(logits, methods), gradients(expected, methods), strict=True):
        assert_close(gradient, expected_gradient, **CLOSE)
    generate = partial(backbone.generate, max_new_tokens=MAX_NEW_TOKENS)
    answers = [generate(row, prompt) for row, prompt in zip(rows, prompts, strict=True)]
    assert decode_texts(codec, generate(batch, merged)) == [decode_texts(codec, answer)[0] for answer in answers]


def gradients(logits, methods):
    """Returns the gradients of the parameters of all methods."""
    parameters = []
    for method in methods:
        parameters += [] if method is None else trainable_parameters(method).values()
    return torch.autograd.grad(logits.logsumexp(-1).sum(), parameters, allow_unused=True)


@pytest.mark.parametrize("family", CAUSAL)
def test_rows_without_a_prompt_are_supported_among_long_texts(family, backbone, monkeypatch):
    monkeypatch.setattr(context_cache, "MIN_FROZEN_TOKENS", 4)  # shorter texts are not cached
    batch = batch_of(backbone.codec, "{text} it was{soft} {target}", TEXTS * 2, ["good"] * 8)
    prompt = SoftPrompt(tokens=backbone.embed(torch.tensor([[7, 8, 9]])))
    merged = merge_prompts([([0, 2, 4, 5, 6, 7], prompt)], batch)
    alone = [backbone(batch.only([b]), prompt if b not in (1, 3) else None) for b in range(8)]
    assert_close(backbone(batch, merged), torch.cat(alone), **CLOSE)


def test_shared_keys_can_be_masked_in_some_rows(family, backbone):
    batch = batch_of(backbone.codec)
    kv = {}
    for kind, layers in backbone.keys_and_values(torch.tensor([7, 8, 9])).items():
        kv[kind] = {layer: (key[None], value[None]) for layer, (key, value) in enumerate(layers)}
    kv_mask = torch.tensor([[True] * 3, [False] * 3, [True] * 3, [False] * 3])
    backbone(batch, SoftPrompt(tokens=backbone.embed(torch.tensor([[7]]))))  # determines the execution path
    logits = backbone(batch, SoftPrompt(kv=kv, kv_mask=dict.fromkeys(kv, kv_mask)))
    assert_close(logits[::2], backbone(batch, SoftPrompt(kv=kv))[::2], **CLOSE)
    assert_close(logits[1::2], backbone(batch)[1::2], **CLOSE)


def test_prompts_that_cannot_be_merged_are_refused(backbone, family):
    batch = batch_of(backbone.codec)
    tokens = SoftPrompt(tokens=torch.zeros(1, 2, backbone.hidden_size))
    with pytest.raises(ValueError, match=r"each row takes one prompt, but rows \[1\] have more"):
        merge_prompts([([0, 1], tokens), ([1], tokens)], batch)
    assert merge_prompts([([], tokens)], batch) == SoftPrompt()
    with pytest.raises(ValueError, match="middle layer"):
        merge_prompts([([0], SoftPrompt(hidden={1: tokens.tokens}))], batch)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_an_answer_is_streamed_word_by_word(family, backbone, template):
    batch = batch_of(backbone.codec, template).only([0])
    prompt = SoftPrompt(tokens=backbone.embed(torch.tensor([[7, 8, 9]])))
    streamer = TextIteratorStreamer(backbone.codec.tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = backbone.generate(batch, prompt, max_new_tokens=6, min_new_tokens=6, streamer=streamer)
    assert "".join(streamer).split() == backbone.codec.decode(ids)[0].split()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0, "do_sample": True}, "temperature must be above 0, got 0.0"),
        ({"top_p": 2.0, "do_sample": True}, "top_p must be above 0 and up to 1"),
        ({"top_k": 5}, "set do_sample to true"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens=9 is above max_new_tokens=3"),
        ({"num_beams": 0}, "num_beams must be at least 1"),
        ({"length_penalty": 2.0}, "set num_beams above 1"),
        ({"stop": "dog"}, "stop must be a list"),
    ],
)
@pytest.mark.parametrize("family", ["llama"])
def test_contradictory_decoding_options_are_refused(family, options, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**options)


def test_decoding_with_code_from_the_hub_is_refused(backbone, family):
    with pytest.raises(ValueError, match=r"penalty_alpha.* download"):
        backbone.generate(batch_of(backbone.codec), penalty_alpha=0.6, top_k=4)
