"""All ways to run a batch give the same, in float64 so that no loose bound hides a fault."""

import logging
from functools import partial

import pytest
import torch
from exact import EXACT, TEMPLATES, batch_of, loss_and_gradients
from transformers import MistralConfig, MistralForCausalLM

from lightning_softprompt.backbones import causal
from lightning_softprompt.backbones.causal import CausalBackbone
from lightning_softprompt.backbones.execution import context_cache, packed_attention
from lightning_softprompt.backbones.execution.context_cache import ContextCache
from lightning_softprompt.backbones.execution.paths import Alone, Packed, Padded, TwoPass
from lightning_softprompt.backbones.execution.row_batch import RowBatch
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import SoftPrompt

FAMILIES = ("llama", "gpt2")
TEXTS = ["the movie was great", "what ?", "that dog is one dog the movie"]


def soft(backbone, length=4, rows=1):
    return torch.randn(rows, length, backbone.hidden_size, dtype=backbone.model.dtype)


@pytest.fixture
def short_contexts(monkeypatch):
    monkeypatch.setattr(context_cache, "MIN_FROZEN_TOKENS", 1)


@pytest.mark.parametrize("template", ["middle", "end", "instruction before"])
@pytest.mark.parametrize("texts", [TEXTS, ["what ?"] * 3, TEXTS[:1]], ids=["different", "same", "alone"])
def test_kept_contexts_change_nothing(pair, short_contexts, template, texts):
    batch = batch_of(pair[0], TEMPLATES[template], texts)
    tokens = soft(pair[0])
    plain = loss_and_gradients(pair[1], batch, tokens)
    computed = loss_and_gradients(pair[0], batch, tokens)
    kept = loss_and_gradients(pair[0], batch, tokens)
    torch.testing.assert_close(computed, plain, **EXACT)
    torch.testing.assert_close(kept, plain, **EXACT)
    assert isinstance(pair[0].path, Packed)


def test_kept_contexts_serve_prompts_of_each_row(pair, short_contexts):
    batch = batch_of(pair[0], TEMPLATES["middle"], TEXTS)
    tokens = soft(pair[0], rows=3)
    results = [loss_and_gradients(backbone, batch, tokens) for backbone in pair]
    torch.testing.assert_close(*results, **EXACT)


def test_a_context_runs_once_however_often_it_comes(pair, short_contexts, monkeypatch):
    backbone = pair[0]
    backbone(batch_of(backbone, TEMPLATES["front"], TEXTS))  # the first batch tries the paths out
    lengths, run = [], context_cache.keys_and_values
    backbone.path.contexts.run = lambda embeds: (
        lengths.append(embeds.shape[1]) or run(backbone.model, embeds, backbone.entry)
    )
    for texts in (TEXTS, TEXTS[::-1], ["what ?", "what ?"]):
        loss_and_gradients(backbone, batch_of(backbone, TEMPLATES["middle"], texts), soft(backbone))
    assert sorted(lengths) == [5, 7, 10]  # BOS, "the film" and the text


@pytest.mark.parametrize("template", TEMPLATES)
def test_evaluation_keeps_the_prompt_for_the_pass_and_gives_what_training_gives(pair, template):
    backbone, tokens = pair[0], soft(pair[0])
    runs = []
    for texts in (TEXTS, TEXTS[1:], TEXTS[:1], TEXTS):
        batch = batch_of(backbone, TEMPLATES[template], texts)
        expected = loss_and_gradients(pair[1], batch, tokens)[0]
        with torch.inference_mode():
            logits = backbone(batch, SoftPrompt(tokens=tokens))
        torch.testing.assert_close(logits[batch.targets != -100], expected, **EXACT)
        if not runs:
            run, kept = backbone.path.contexts.run, backbone.path.contexts
            kept.run = lambda embeds, run=run: runs.append(1) or run(embeds)
            runs.append(1)
    if template in ("front", "instruction before"):  # elsewhere, rows differ before the prompt
        assert len(runs) == 1


def test_what_evaluation_kept_can_be_trained_with(pair, short_contexts):
    batch, tokens = batch_of(pair[0], TEMPLATES["middle"], TEXTS), soft(pair[0])
    with torch.inference_mode():
        pair[0](batch, SoftPrompt(tokens=tokens))
    torch.testing.assert_close(*(loss_and_gradients(backbone, batch, tokens) for backbone in pair), **EXACT)


def test_another_prompt_is_not_taken_for_the_kept_one(pair):
    batch = batch_of(pair[0], TEMPLATES["front"], TEXTS)
    with torch.no_grad():
        for tokens in (soft(pair[0]), soft(pair[0])):
            prompt = SoftPrompt(tokens=tokens)
            torch.testing.assert_close(pair[0](batch, prompt), pair[1](batch, prompt), **EXACT)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("texts", [TEXTS, ["what ?"] * 3], ids=["different", "same"])
def test_two_passes_equal_padded_rows(pair, template, texts):
    ours, plain = pair
    ours.path_factories = [partial(TwoPass, attention="sdpa"), *ours.path_factories[2:]]
    batch, tokens = batch_of(ours, TEMPLATES[template], texts), soft(ours)
    results = [loss_and_gradients(backbone, batch, tokens) for backbone in (ours, plain)]
    assert isinstance(ours.path, TwoPass)
    torch.testing.assert_close(*results, **EXACT)


def test_the_log_says_which_path_runs_and_why(load, caplog):
    backbone = load("llama", packed=False)
    with caplog.at_level(logging.INFO, logger="lightning_softprompt"):
        backbone(batch_of(backbone, TEMPLATES["front"], TEXTS))
    assert [record.message for record in caplog.records if "path" in record.message] == [
        "Execution path: padded batches; each row is computed in full (backbone.packed is false)"
    ]


def test_half_precision_is_tried_out_in_float32(load, monkeypatch):
    backbone = load("llama", dtype="bfloat16")
    dtypes, states = [], Alone.__call__
    monkeypatch.setattr(
        Alone, "__call__", lambda self, rows, *a: dtypes.append(rows.embeds.dtype) or states(self, rows, *a)
    )
    backbone(batch_of(backbone, TEMPLATES["front"], TEXTS))
    assert isinstance(backbone.path, Packed)
    assert set(dtypes) == {torch.float32}
    assert backbone.model.dtype == torch.bfloat16


def test_a_path_that_is_off_is_not_taken(load):
    """As one whose positions are wrong."""

    class Off(Padded):
        def __call__(self, rows, columns, first):
            return super().__call__(rows, (columns - 1).clamp(min=0), first)

    backbone = load("llama")
    batch = batch_of(backbone, TEMPLATES["front"], TEXTS)
    backbone.path_factories = [partial(Off, attention="sdpa"), *backbone.path_factories[2:]]
    backbone(batch)
    assert type(backbone.path) is Padded
    assert "differ by" in backbone.reasons[0]


def test_a_path_with_wrong_gradients_is_not_taken(load, monkeypatch):
    backward = packed_attention.PackedAttention.backward
    halved = staticmethod(lambda ctx, grad: backward(ctx, grad / 2))
    monkeypatch.setattr(packed_attention.PackedAttention, "backward", halved)
    backbone = load("llama")
    with torch.inference_mode():  # a validation before all training, say
        backbone(batch_of(backbone, TEMPLATES["front"], TEXTS), SoftPrompt(tokens=soft(backbone)))
    assert isinstance(backbone.path, TwoPass)
    assert "differ by" in backbone.reasons[0]


def test_a_batch_too_long_for_a_sliding_window_ends_the_packing_and_not_the_run(load):
    """The first batch fits."""
    backbone, plain = load("llama"), load("llama", packed=False)
    config = {k: v for k, v in backbone.model.config.to_dict().items() if k not in ("model_type", "architectures")}
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**{**config, "sliding_window": 12})).eval().requires_grad_(False)
    ours, theirs = (CausalBackbone(model, b.codec, b.spec) for b in (backbone, plain))
    for texts in (["what ?", "the dog ?"], TEXTS):
        batch = batch_of(ours, TEMPLATES["front"], texts)
        prompt = SoftPrompt(tokens=soft(ours))
        before = type(ours.path)
        logits = ours(batch, prompt)
        model.set_attn_implementation("eager")
        rows = theirs.splice(batch, prompt)
        mask = rows.mask.long()
        right = model(inputs_embeds=rows.embeds, attention_mask=mask, use_cache=False).logits
        ours.path.enter()
        for b in range(len(batch)):
            column = int(rows.columns[b][batch.mask[b]][-1]) - 1
            torch.testing.assert_close(logits[b, 0], right[b, column], rtol=1e-4, atol=1e-5)
    assert before is Packed
    assert not isinstance(ours.path, Packed)


def test_the_cache_drops_what_was_used_longest_ago_and_takes_it_back_from_disk(tmp_path):
    made = []

    def get(name, persistent=True):
        return cache.get(name, lambda: made.append(name) or torch.full((4,), float(len(made))), persistent)

    cache = ContextCache(memory=32, disk=200, folder=tmp_path)
    values = {name: get(name) for name in "ab"}
    get("a")
    get("c")  # 16 bytes each: b goes to disk
    assert sorted(cache.entries) == ["a", "c"]
    assert [file.stem for file in tmp_path.glob("*")] == ["b"]
    torch.testing.assert_close(get("b"), values["b"])
    assert made == ["a", "b", "c"]
    get("transient", persistent=False)
    get("e")
    get("f")
    assert "transient" not in [file.stem for file in tmp_path.glob("*")]
    assert sum(file.stat().st_size for file in tmp_path.glob("*")) <= 200
    assert cache.bytes <= 32


def test_a_broken_file_of_the_cache_is_made_anew(tmp_path):
    cache = ContextCache(memory=0, disk=1 << 20, folder=tmp_path)
    first = cache.get("a", lambda: torch.ones(4))
    assert torch.equal(cache.get("a", lambda: torch.zeros(4)), first)
    (tmp_path / "a.safetensors").write_bytes(b"cut off")
    assert torch.equal(cache.get("a", lambda: torch.zeros(4)), torch.zeros(4))


def test_choosing_needs_no_gradient_of_the_prompt(load):
    backbone = load("llama")
    batch = batch_of(backbone, TEMPLATES["front"], TEXTS)
    tokens = torch.nn.Parameter(soft(backbone))
    backbone(batch, SoftPrompt(tokens=tokens))
    assert tokens.grad is None


@pytest.mark.parametrize("template", TEMPLATES)
def test_generation_runs_a_shared_prompt_once_a_pass_and_says_the_same(pair, template, monkeypatch):
    backbone, tokens = pair[0], soft(pair[0])
    runs, run = [], backbone.prompts._run
    monkeypatch.setattr(backbone.prompts, "_run", lambda embeds: runs.append(embeds.shape[1]) or run(embeds))
    for texts in (TEXTS, TEXTS[:1], TEXTS[1:]):
        batch = batch_of(backbone, TEMPLATES[template], texts)
        said = backbone.generate(batch, SoftPrompt(tokens=tokens), max_new_tokens=6)
        with monkeypatch.context() as patch:
            patch.setattr(RowBatch, "prompt_end", 0)  # the whole row at once
            assert torch.equal(said, backbone.generate(batch, SoftPrompt(tokens=tokens), max_new_tokens=6))
    if template in ("front", "instruction before"):
        assert len(runs) == 1


def test_rows_that_differ_in_their_answers_alone_run_packed(pair):
    """As the candidates of one row do: the shared head ends behind the first target's place."""
    batch = batch_of(pair[0], TEMPLATES["front"], ["what ?"] * 3, ["very good indeed", "bad", "sad ."])
    results = [loss_and_gradients(backbone, batch, soft(pair[0]) * 0 + 1) for backbone in pair]
    assert isinstance(pair[0].path, Packed)
    torch.testing.assert_close(*results, **EXACT)


@pytest.mark.parametrize("options", [{}, {"checkpointing": True}], ids=["kept", "recomputed"])
def test_compiled_layers_compute_the_same_under_the_same_names(load, options):
    torch.compiler.reset()
    plain, ours = load("llama"), load("llama", compiled=True, **options)
    tokens = soft(plain)
    for texts in (TEXTS, TEXTS[:2]):  # rows of another length compile nothing anew
        batch = batch_of(plain, TEMPLATES["front"], texts)
        results = [loss_and_gradients(backbone, batch, tokens) for backbone in (plain, ours)]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            logits = [backbone(batch, SoftPrompt(tokens=tokens)) for backbone in (plain, ours)]
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert isinstance(ours.path, Packed)
    assert list(ours.model.state_dict()) == list(plain.model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("linear_backend", ["plain", "prepacked"])
def test_the_packaged_backbone_gives_in_float32_what_padded_rows_give(linear_backend):
    ours = load_backbone(BackboneSpec(linear_backend=linear_backend, packed=True))
    plain = load_backbone(BackboneSpec(linear_backend="plain", packed=False))
    texts = ["The film is a joyless, endless mess.", "Superb.", "It has its moments, and they are many. I liked it."]
    tokens = ours.word_embeddings[None, 100:120]
    for template in ("{soft}Review: {text} Sentiment:{target}", "Review: {text}{soft} Sentiment:{target}"):
        batch = batch_of(ours, template, texts, [" bad", " good", " good"])
        results = [loss_and_gradients(backbone, batch, tokens) for backbone in (ours, plain)]
        for a, b in zip(*([r[0], r[1][None], r[2][0][0]] for r in results), strict=True):
            assert (a - b).norm() < 1e-4 * b.norm()
    assert isinstance(ours.path, Packed)


@pytest.mark.parametrize(("template", "told"), [("{soft}{text} it is {target}", 1), ("{text} it is{soft}{target}", 0)])
def test_soft_tokens_out_of_a_sliding_windows_reach_are_warned_of_once(load, caplog, template, told):
    sizes = {"vocab_size": 44, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = MistralConfig(num_attention_heads=4, num_key_value_heads=2, sliding_window=6, **sizes)
    backbone = CausalBackbone(MistralForCausalLM(config), load("llama").codec, BackboneSpec())
    tokens = torch.randn(1, 2, 32)
    for _ in range(2):
        backbone(batch_of(backbone, template, ["a very long and sad story", "dull"]), SoftPrompt(tokens=tokens))
    assert sum("sliding window of 6 tokens" in record.getMessage() for record in caplog.records) == told


def test_paths_are_tried_out_again_where_a_batch_has_longer_rows(load):
    """As where a model rotates long texts in another way."""

    class OffWhereLong(Padded):
        def __call__(self, rows, columns, first):
            off = 1 if rows.mask.shape[1] > 8 else 0
            return super().__call__(rows, (columns - off).clamp(min=0), first)

    backbone, plain = load("llama"), load("llama", packed=False)
    backbone.path_factories = [partial(OffWhereLong, attention="sdpa"), *backbone.path_factories[2:]]
    short = batch_of(backbone, "{text} {target}", ["what ?", "what", "a dog"])
    backbone(short)
    assert type(backbone.path) is OffWhereLong
    long = batch_of(backbone, TEMPLATES["middle"], TEXTS)
    torch.testing.assert_close(backbone(long), plain(long))
    assert type(backbone.path) is Padded


def test_nothing_is_tried_out_for_a_batch_that_goes_no_further(load, monkeypatch):
    backbone = load("llama")
    batch = batch_of(backbone, TEMPLATES["front"], TEXTS)
    backbone(batch)
    monkeypatch.setattr(causal, "select_path", None)
    backbone(batch)
    backbone(batch.only([0, 1]))


def test_a_row_alone_is_the_last_resort(load):
    """As where a model mixes the rows of a batch."""
    backbone, plain = load("llama", packed=False), load("llama", packed=False)
    batch = batch_of(backbone, TEMPLATES["front"], TEXTS)
    forward = backbone.model.model.forward

    def mixing(*args, inputs_embeds, **options):
        return forward(*args, inputs_embeds=inputs_embeds.mean(0, keepdim=True).expand_as(inputs_embeds), **options)

    right = plain(batch)
    backbone.model.model.forward = mixing
    torch.testing.assert_close(backbone(batch), right)
    assert type(backbone.path) is Alone
    assert "one by one" in backbone.execution_description
