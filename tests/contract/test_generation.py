"""What generation keeps, for every method, family and way of decoding."""

from functools import partial

import pytest
import torch
from tiny import CAUSAL, EOS, SEQ2SEQ, TEMPLATES, TEXTS, batch_of, encode_rows, on_side, real
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, TextIteratorStreamer

from lightning_softprompt.backbones.execution import context_cache
from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.core.types import SoftPrompt
from lightning_softprompt.methods import PrefixTuning, PromptTuning
from lightning_softprompt.prompts.kv_prefix import NormalKeysValues
from lightning_softprompt.prompts.merge_rows import merge_prompts

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
FAMILIES = (*CAUSAL, *SEQ2SEQ)
MOST = 5
SURE = {  # ways of decoding that draw nothing
    "greedy": {},
    "beams": {"num_beams": 3, "length_penalty": 0.5},
    "several": {"num_beams": 3, "num_return_sequences": 2},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "stop": {"stop": ["dog", "film good"]},
}


def said(ids):
    """Answers without what fills them."""
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in ids.tolist()]


def texts(codec, ids):
    return [text.strip() for text in codec.decode(ids)]


@pytest.mark.parametrize("decoding", SURE.values(), ids=SURE.keys())
def test_rows_are_answered_in_a_batch_as_alone(method, family, backbone, decoding):
    module, codec = method.on(backbone), backbone.codec
    rows = encode_rows(codec, TEMPLATES["middle"])
    generate = partial(module.lm().generate, max_new_tokens=MOST, **decoding)
    alone = [text for row in rows for text in texts(codec, generate(codec.collate([row])))]
    for side in ("right", "left"):
        assert texts(codec, generate(on_side(codec, side).collate(rows))) == alone


@pytest.mark.parametrize(
    "decoding", [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}, "assisted"], ids=str
)
def test_another_way_to_the_greedy_answer(method, family, backbone, load, decoding):
    module, codec = method.on(backbone), backbone.codec
    batch = batch_of(codec, TEMPLATES["middle"])
    if decoding == "assisted":
        decoding = {"assistant_model": load(family, seed=1).model}
    expected = module.lm().generate(batch, max_new_tokens=MOST)
    assert said(module.lm().generate(batch, max_new_tokens=MOST, **decoding)) == said(expected)


@torch.no_grad()
def test_beams_are_scored_as_the_forward_pass_scores_them(method, family, backbone):
    module, codec = method.on(backbone), backbone.codec
    row = encode_rows(codec, TEMPLATES["middle"])[0]
    beams = module.lm().generate(
        codec.collate([row]), max_new_tokens=3, min_new_tokens=3, num_beams=4, num_return_sequences=4
    )
    of_text = [codec.collate([codec.with_answer(row, answer)]) for answer in beams.tolist()]
    scores = torch.stack([-backbone.cross_entropy(batch, module.prompt(batch)).sum() for batch in of_text])
    assert_close(scores, scores.sort(descending=True).values)


def ours_and_transformers(backbone, tiny_folder, family):
    """A batch, and what transformers generates for its text from a model of its own."""
    codec = on_side(backbone.codec, "left" if family in CAUSAL else "right")  # BART counts padding before a row
    batch = batch_of(codec, TEMPLATES["front"], targets=[""] * len(TEXTS))
    auto = AutoModelForCausalLM if family in CAUSAL else AutoModelForSeq2SeqLM
    model = auto.from_pretrained(tiny_folder(family))
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.mask.long(), "pad_token_id": backbone.codec.pad_id}
    skip = batch.input_ids.shape[1] if family in CAUSAL else 1
    return batch, lambda **decoding: model.generate(**inputs, **decoding)[:, skip:]


@pytest.mark.parametrize("decoding", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}], ids=str)
def test_a_prompt_that_is_switched_off_is_the_bare_model(method, family, backbone, tiny_folder, decoding):
    module = method.on(backbone)
    batch, theirs = ours_and_transformers(backbone, tiny_folder, family)
    module.lm().generate(batch, max_new_tokens=MOST)  # what a prompt left behind would show
    ours = module.lm().generate(batch, prompted=False, max_new_tokens=MOST, **decoding)
    assert said(ours) == said(theirs(max_new_tokens=MOST, **decoding))


SAMPLING = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.05}


@pytest.mark.parametrize("setting", SAMPLING)
def test_sampling_is_that_of_transformers(family, backbone, tiny_folder, setting):
    decoding = Decoding(MOST, do_sample=True, seed=3, **{setting: SAMPLING[setting]})
    batch, theirs = ours_and_transformers(backbone, tiny_folder, family)
    with decoding.drawing():
        ours = backbone.generate(batch, **decoding.options)
    torch.manual_seed(3)
    shaped = {"top_k": 0, setting: SAMPLING[setting]}
    assert said(ours) == said(theirs(max_new_tokens=MOST, do_sample=True, **shaped))


def test_what_is_drawn_comes_from_the_seed_alone(backbone, family):
    batch, state = batch_of(backbone.codec), torch.get_rng_state()

    def drawn(seed):
        decoding = Decoding(12, do_sample=True, temperature=3.0, seed=seed)
        with decoding.drawing():
            return decoding.texts(backbone.codec, backbone.generate(batch, **decoding.options))

    assert drawn(1) == drawn(1) != drawn(2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_penalties_look_at_the_answer_alone_wherever_the_prompt_stands(family, backbone, template):
    prompt = SoftPrompt(tokens=backbone.embed(torch.tensor([[7, 8, 9]])))
    batch = batch_of(backbone.codec, template)
    free = backbone.generate(batch, prompt, max_new_tokens=1)
    assert torch.equal(backbone.generate(batch, prompt, max_new_tokens=1, repetition_penalty=50.0), free)
    long = backbone.generate(batch, prompt, max_new_tokens=8, min_new_tokens=8, no_repeat_ngram_size=1)
    assert all(len(set(row)) == len(row) for row in long.tolist())


def test_an_answer_ends_before_the_text_that_stops_it(family, backbone):
    batch = batch_of(backbone.codec, targets=[""] * len(TEXTS))
    answers = backbone.codec.decode(backbone.generate(batch, max_new_tokens=8))
    row = max(range(len(answers)), key=lambda i: len(set(answers[i].split())))
    whole = answers[row].split()
    word = max(whole, key=len)  # which no other contains
    decoding = Decoding(8, stop=(word,))
    stopped = backbone.generate(batch, **decoding.options)
    first = whole.index(word)
    assert decoding.texts(backbone.codec, stopped)[row].split() == whole[:first]
    assert backbone.codec.decode(stopped)[row].split() == whole[: first + 1]


def several(backbone, family):
    """Rows with prompts of different methods and lengths: soft tokens, keys and values, one for each row, and none."""
    kinds = backbone.attentions
    torch.manual_seed(1)
    made = [
        PromptTuning(backbone=backbone.spec, length=3),
        PrefixTuning(backbone=backbone.spec, length=2, width=None, init=NormalKeysValues(0.5)),
        PromptTuning(backbone=backbone.spec, length=5),
        PrefixTuning(backbone=backbone.spec, length=4, width=None, init=NormalKeysValues(0.5)),
    ]
    for method in made:
        method.attach(backbone)
    assert kinds
    return [*made, None]


TEXTS_OF_FIVE = (*TEXTS, "good")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_prompts_of_different_methods_and_lengths_act_in_one_batch_as_alone(family, backbone, template):
    codec = backbone.codec
    batch = batch_of(codec, template, TEXTS_OF_FIVE, ("very good indeed", "bad", "sad", "very great", "long"))
    chosen = several(backbone, family)
    prompts = [SoftPrompt() if method is None else method.prompt(batch.only([i])) for i, method in enumerate(chosen)]
    together = merge_prompts([([i], prompt) for i, prompt in enumerate(prompts)], batch)
    logits = real(batch, backbone(batch, together))
    alone = [real(batch.only([i]), backbone(batch.only([i]), prompt)) for i, prompt in enumerate(prompts)]
    assert_close(logits, torch.cat(alone), **CLOSE)
    gradients = torch.autograd.grad(logits.logsumexp(-1).sum(), leaves(chosen), allow_unused=True)
    expected = torch.autograd.grad(torch.cat(alone).logsumexp(-1).sum(), leaves(chosen), allow_unused=True)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert_close(ours, theirs, **CLOSE)
    whole = texts(codec, backbone.generate(batch, together, max_new_tokens=MOST))
    each = [texts(codec, backbone.generate(batch.only([i]), p, max_new_tokens=MOST))[0] for i, p in enumerate(prompts)]
    assert whole == each


def leaves(methods):
    return [p for method in methods if method is not None for p in method.parameters() if p.requires_grad]


@pytest.mark.parametrize("family", CAUSAL)
def test_a_row_without_a_prompt_may_stand_among_long_texts(family, backbone, monkeypatch):
    monkeypatch.setattr(context_cache, "MIN_FROZEN_TOKENS", 4)  # tokens from which the text before soft ones is kept
    batch = batch_of(backbone.codec, "{text} it was{soft} {target}", TEXTS * 2, ["good"] * 8)
    prompt = SoftPrompt(tokens=backbone.embed(torch.tensor([[7, 8, 9]])))
    together = merge_prompts([([0, 2, 4, 5, 6, 7], prompt)], batch)
    alone = [backbone(batch.only([b]), prompt if b not in (1, 3) else None) for b in range(8)]
    assert_close(backbone(batch, together), torch.cat(alone), **CLOSE)


def test_keys_that_rows_share_may_be_there_for_some_only(family, backbone):
    batch = batch_of(backbone.codec)
    kv = {kind: dict(enumerate(zip(*pairs.transpose(0, 1)[:, :, None], strict=True)))
          for kind, pairs in backbone.keys_and_values(torch.tensor([7, 8, 9])).items()}  # fmt: skip
    inside = torch.tensor([[True] * 3, [False] * 3, [True] * 3, [False] * 3])
    backbone(batch, SoftPrompt(tokens=backbone.embed(torch.tensor([[7]]))))  # decides how rows run
    some = backbone(batch, SoftPrompt(kv=kv, kv_mask=dict.fromkeys(kv, inside)))
    assert_close(some[::2], backbone(batch, SoftPrompt(kv=kv))[::2], **CLOSE)
    assert_close(some[1::2], backbone(batch)[1::2], **CLOSE)


def test_what_cannot_be_mixed_says_so(backbone, family):
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
    ("options", "said"),
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
def test_decoding_that_makes_no_sense_is_refused(family, options, said):
    with pytest.raises(ValueError, match=said):
        Decoding(**options)


def test_code_from_a_hub_is_refused(backbone, family):
    with pytest.raises(ValueError, match=r"penalty_alpha.* download"):
        backbone.generate(batch_of(backbone.codec), penalty_alpha=0.6, top_k=4)
