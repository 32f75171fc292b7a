"""Keys and values of a prompt compared with a text before the row, caches of transformers, and a loop."""

import pytest
import torch
import transformers
from tiny import CAUSAL, SEQ2SEQ, TEMPLATES, batch_of, encode_rows, real
from torch.testing import assert_close
from transformers import DynamicCache

from lightning_softprompt.backbones.causal import CausalBackbone
from lightning_softprompt.backbones.insertion.key_values import InjectionUnsupportedError, check_like_text, sites_of
from lightning_softprompt.core.types import SoftPrompt

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def random_pairs(backbone, kind, rows=1, length=3, layers=None):
    sites = backbone.attentions[kind]
    shape = (rows, sites.heads, length, sites.size)
    layers = range(len(sites)) if layers is None else layers
    return {layer: (torch.randn(shape), torch.randn(shape)) for layer in layers}


def prompt_of_text(backbone, ids):
    layers = backbone.keys_and_values(torch.tensor(ids))["self"]
    pairs = {index: (layer[:1], layer[1:]) for index, layer in enumerate(layers)}
    return SoftPrompt(kv={"self": pairs})


def prepend_text(codec, batch, ids):
    """Return the rows of a batch with a text before them."""
    rows = []
    for row in batch.encoded:
        answers = tuple(column + len(ids) for column in row.answers)
        slots = tuple(slot + len(ids) for slot in row.slots)
        rows.append(row._replace(ids=(*ids, *row.ids), answers=answers, slots=slots))
    return codec.collate(rows)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_keys_and_values_of_a_text_have_the_effect_of_the_text(family, load, packed):
    backbone = load(family, packed=packed)
    ids = backbone.codec.ids("it is a sad story")
    batch = batch_of(backbone.codec)
    logits = backbone(batch, prompt_of_text(backbone, ids))
    expected = backbone(prepend_text(backbone.codec, batch, ids))
    assert_close(real(batch, logits), real(batch, expected), **CLOSE)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 3}])
def test_generation_with_keys_and_values_of_a_text_equals_generation_after_the_text(backbone, options):
    ids = backbone.codec.ids("it is a sad story")
    batch = batch_of(backbone.codec)
    output = backbone.generate(batch, prompt_of_text(backbone, ids), max_new_tokens=5, **options)
    expected = backbone.generate(prepend_text(backbone.codec, batch, ids), max_new_tokens=5, **options)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_each_row_can_have_different_keys_and_values(backbone):
    batch = batch_of(backbone.codec)
    pairs = random_pairs(backbone, "self", rows=len(batch))
    logits = backbone(batch, SoftPrompt(kv={"self": pairs}))
    output = backbone.generate(batch, SoftPrompt(kv={"self": pairs}), max_new_tokens=4)
    for b, row in enumerate(encode_rows(backbone.codec, TEMPLATES["front"])):
        of_row = slice(b, b + 1)
        row_pairs = {layer: (key[of_row], value[of_row]) for layer, (key, value) in pairs.items()}
        prompt = SoftPrompt(kv={"self": row_pairs})
        alone = backbone.codec.collate([row])
        expected = backbone(alone, prompt)
        assert_close(logits[b : b + 1, : expected.shape[1]], expected, **CLOSE)
        words = backbone.generate(alone, prompt, max_new_tokens=4)[0]
        assert torch.equal(output[b, : len(words)], words)


def cache_of(pairs, rows):
    cache = DynamicCache()
    for layer, (key, value) in pairs.items():
        cache.update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), layer)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert"])
def test_a_masked_model_attends_to_keys_and_values_as_to_a_cache(backbone):
    (row, *_) = encode_rows(backbone.codec, TEMPLATES["front"])
    batch = backbone.codec.collate([row])
    pairs = random_pairs(backbone, "self")
    ids, length = batch.input_ids, 3
    output = backbone.model(
        input_ids=ids,
        attention_mask=torch.ones(1, length + ids.shape[1]),
        position_ids=torch.arange(ids.shape[1])[None],
        past_key_values=cache_of(pairs, 1),
    )
    expected = output.logits[0, list(row.answers)]
    assert_close(backbone(batch, SoftPrompt(kv={"self": pairs}))[0], expected, **CLOSE)


def attention_loop(query, key, value, pair, scale, bias):
    """Compute attention head by head and query by query; keys and values of a prompt precede the row."""
    key, value = torch.cat([pair[0], key], dim=1), torch.cat([pair[1], value], dim=1)
    out = torch.zeros_like(query)
    for head in range(query.shape[0]):
        for position, q in enumerate(query[head]):
            scores = torch.stack([(q * k).sum() * scale for k in key[head]])
            scores[-bias.shape[-1] :] += bias[head, position]
            weights = scores.softmax(0)
            out[head, position] = sum(w * v for w, v in zip(weights, value[head], strict=True))
    return out


@torch.no_grad()
@pytest.mark.parametrize("kind", ["encoder", "decoder", "cross"])
@pytest.mark.parametrize("family", ["t5"])
def test_attention_with_relative_positions_equals_a_loop(backbone, kind, monkeypatch):
    """Keys of the prompt have no relative position."""
    (row, *_) = encode_rows(backbone.codec, TEMPLATES["front"])
    batch = backbone.codec.collate([row])
    pairs = random_pairs(backbone, kind)
    ours = backbone(batch, SoftPrompt(kv={kind: pairs}))
    layer_of = {module: n for n, module in enumerate(backbone.attentions[kind].modules)}

    def loop(module, query, key, value, mask, scaling=None, position_bias=None, **_):
        bias = position_bias[0].expand(query.shape[1], query.shape[2], key.shape[2]).clone()
        if mask is not None:
            bias = bias.masked_fill(~mask[0].expand_as(bias), float("-inf"))
        elif module in backbone.attentions["decoder"].modules:
            bias = bias.masked_fill(torch.ones_like(bias, dtype=torch.bool).triu(1), float("-inf"))
        pair = key[0, :, :0], value[0, :, :0]
        if module in layer_of:
            pair = [tensor[0] for tensor in pairs[layer_of[module]]]
        out = attention_loop(query[0], key[0], value[0], pair, scaling, bias)
        return out[None].transpose(1, 2), None

    monkeypatch.setitem(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS._global_mapping, "softprompt", loop)
    assert_close(ours, backbone(batch, SoftPrompt(kv={kind: {}})), **CLOSE)


@torch.no_grad()
def test_each_kind_of_attention_attends_to_keys_and_values(backbone, family):
    batch = batch_of(backbone.codec)
    bare = real(batch, backbone(batch))
    assert set(backbone.attentions) == ({"encoder", "decoder", "cross"} if family in SEQ2SEQ else {"self"})
    for kind, sites in backbone.attentions.items():
        for layer in range(len(sites)):
            prompt = SoftPrompt(kv={kind: random_pairs(backbone, kind, layers=[layer])})
            change = real(batch, backbone(batch, prompt)) - bare
            assert (change.abs().amax(-1) > 1e-4).all()
    assert_close(real(batch, backbone(batch)), bare)


def test_an_unknown_kind_of_attention_is_named_in_the_error(backbone):
    prompt = SoftPrompt(kv={"elsewhere": random_pairs(backbone, next(iter(backbone.attentions)))})
    batch = batch_of(backbone.codec)
    if set(backbone.attentions) == {"self"} and isinstance(backbone, CausalBackbone):
        with pytest.raises(ValueError, match="elsewhere"):
            backbone.generate(batch, prompt, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"elsewhere.*the backbone has"):
        backbone(batch, prompt)


TINY = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
UNSUPPORTED = {
    "BloomForCausalLM": {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "DebertaV2ForMaskedLM": {**TINY, "relative_attention": True},
    "AlbertForMaskedLM": {**TINY, "embedding_size": 16},
    "JambaForCausalLM": {
        **TINY,
        "num_key_value_heads": 2,
        "use_mamba_kernels": False,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models_are_rejected_by_name(name):
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**UNSUPPORTED[name])).eval()
    with pytest.raises(InjectionUnsupportedError, match=name.removesuffix("ForCausalLM").removesuffix("ForMaskedLM")):
        sites_of(model)
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()  # the model is unchanged


GROUPED = {**TINY, "num_key_value_heads": 2, "head_dim": 8}
CHANGED_SCORES = {
    "Gemma2ForCausalLM": {**GROUPED, "attn_logit_softcapping": 5.0, "sliding_window": 64},
    "GptOssForCausalLM": {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 64},
}


@pytest.mark.parametrize("name", CHANGED_SCORES)
def test_attention_with_caps_and_sinks_treats_keys_and_values_as_a_text(name):
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**CHANGED_SCORES[name], initializer_range=0.3, attn_implementation="eager")).eval()
    check_like_text(model, model.model, sites_of(model), 1e-5)


def test_keys_without_the_effect_of_a_text_are_rejected(load):
    model = load("llama").model
    sites = sites_of(model)
    with pytest.raises(InjectionUnsupportedError, match="if a text is replaced by its keys and values"):
        check_like_text(model, ScaledByLength(model.model), sites, 1e-3)


class ScaledByLength(torch.nn.Module):
    """A stack whose output is multiplied by the number of tokens."""

    def __init__(self, stack):
        super().__init__()
        self.stack = stack

    def forward(self, input_ids, **options):
        return (self.stack(input_ids=input_ids, **options)[0] * input_ids.shape[1],)


def test_gradients_reach_every_key_and_value_with_layers_recomputed(family, load):
    plain, recomputed = load(family), load(family, checkpointing=True)
    batch = batch_of(plain.codec)
    kind = next(iter(plain.attentions))
    pairs = random_pairs(plain, kind)
    leaves = [tensor.requires_grad_() for pair in pairs.values() for tensor in pair]
    kv = {kind: pairs}
    results = []
    for backbone in (plain, recomputed):
        loss = backbone.cross_entropy(batch, SoftPrompt(kv=kv)).sum()
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert_close(results[0], results[1], **CLOSE)
