"""All execution paths give the same results, in float64, where no loose tolerance hides an error."""

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


def random_tokens(backbone, length=4, rows=1):
    return torch.randn(rows, length, backbone.hidden_size, dtype=backbone.model.dtype)


def count_calls(function, calls):
    """Returns a function that adds an entry to `calls` before each call of the given one."""

    def count_and_call(*args):
        calls.append(1)
        return function(*args)

    return count_and_call


@pytest.fixture
def short_contexts(monkeypatch):
    """Caches the keys and values of texts of any length."""
    monkeypatch.setattr(context_cache, "MIN_FROZEN_TOKENS", 1)


@pytest.mark.parametrize("template", ["middle", "end", "instruction before"])
@pytest.mark.parametrize("texts", [TEXTS, ["what ?"] * 3, TEXTS[:1]], ids=["different", "same", "alone"])
def test_cached_contexts_give_the_same_results(pair, short_contexts, template, texts):
    batch = batch_of(pair[0], TEMPLATES[template], texts)
    tokens = random_tokens(pair[0])
    plain = loss_and_gradients(pair[1], batch, tokens)
    computed = loss_and_gradients(pair[0], batch, tokens)
    cached = loss_and_gradients(pair[0], batch, tokens)
    torch.testing.assert_close(computed, plain, **EXACT)
    torch.testing.assert_close(cached, plain, **EXACT)
    assert isinstance(pair[0].path, Packed)


def test_cached_contexts_support_one_prompt_per_row(pair, short_contexts):
    batch = batch_of(pair[0], TEMPLATES["middle"], TEXTS)
    tokens = random_tokens(pair[0], rows=3)
    results = [loss_and_gradients(backbone, batch, tokens) for backbone in pair]
    torch.testing.assert_close(*results, **EXACT)


def test_a_repeated_context_runs_once(pair, short_contexts):
    backbone = pair[0]
    backbone(batch_of(backbone, TEMPLATES["front"], TEXTS))  # the first batch includes the trials of paths
    lengths = []

    def run(embeds):
        lengths.append(embeds.shape[1])
        return context_cache.keys_and_values(backbone.model, embeds, backbone.entry)

    backbone.path.contexts.run = run
    for texts in (TEXTS, TEXTS[::-1], ["what ?", "what ?"]):
        loss_and_gradients(backbone, batch_of(backbone, TEMPLATES["middle"], texts), random_tokens(backbone))
    assert sorted(lengths) == [5, 7, 10]  # BOS, "the film" and the text


@pytest.mark.parametrize("template", TEMPLATES)
def test_evaluation_caches_the_prompt_and_gives_the_logits_of_training(pair, template):
    backbone, tokens = pair[0], random_tokens(pair[0])
    runs = []
    for texts in (TEXTS, TEXTS[1:], TEXTS[:1], TEXTS):
        batch = batch_of(backbone, TEMPLATES[template], texts)
        expected = loss_and_gradients(pair[1], batch, tokens)[0]
        with torch.inference_mode():
            logits = backbone(batch, SoftPrompt(tokens=tokens))
        torch.testing.assert_close(logits[batch.targets != -100], expected, **EXACT)
        if not runs:
            backbone.path.contexts.run = count_calls(backbone.path.contexts.run, runs)
            runs.append(1)
    if template in ("front", "instruction before"):  # in other templates, rows differ before the prompt
        assert len(runs) == 1


def test_training_can_use_what_evaluation_cached(pair, short_contexts):
    batch, tokens = batch_of(pair[0], TEMPLATES["middle"], TEXTS), random_tokens(pair[0])
    with torch.inference_mode():
        pair[0](batch, SoftPrompt(tokens=tokens))
    torch.testing.assert_close(*(loss_and_gradients(backbone, batch, tokens) for backbone in pair), **EXACT)


def test_another_prompt_does_not_use_the_cached_one(pair):
    batch = batch_of(pair[0], TEMPLATES["front"], TEXTS)
    with torch.no_grad():
        for tokens in (random_tokens(pair[0]), random_tokens(pair[0])):
            prompt = SoftPrompt(tokens=tokens)
            torch.testing.assert_close(pair[0](batch, prompt), pair[1](batch, prompt), **EXACT)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("texts", [TEXTS, ["what ?"] * 3], ids=["different", "same"])
def test_two_passes_equal_padded_rows(pair, template, texts):
    two_pass, padded = pair
    two_pass.path_factories = [partial(TwoPass, attention="sdpa"), *two_pass.path_factories[2:]]
    batch, tokens = batch_of(two_pass, TEMPLATES[template], texts), random_tokens(two_pass)
    results = [loss_and_gradients(backbone, batch, tokens) for backbone in (two_pass, padded)]
    assert isinstance(two_pass.path, TwoPass)
    torch.testing.assert_close(*results, **EXACT)


def test_the_log_names_the_path_and_the_reason(load, caplog):
    backbone = load("llama", packed=False)
    with caplog.at_level(logging.INFO, logger="lightning_softprompt"):
        backbone(batch_of(backbone, TEMPLATES["front"], TEXTS))
    assert [record.message for record in caplog.records if "path" in record.message] == [
        "Execution path: padded batches; each row is computed in full (backbone.packed is false)"
    ]


def test_trials_of_a_bfloat16_model_run_in_float32(load, monkeypatch):
    backbone = load("llama", dtype="bfloat16")
    dtypes, call = [], Alone.__call__

    def record_dtype(self, rows, *args):
        dtypes.append(rows.embeds.dtype)
        return call(self, rows, *args)

    monkeypatch.setattr(Alone, "__call__", record_dtype)
    backbone(batch_of(backbone, TEMPLATES["front"], TEXTS))
    assert isinstance(backbone.path, Packed)
    assert set(dtypes) == {torch.float32}
    assert backbone.model.dtype == torch.bfloat16


def test_a_path_with_wrong_positions_is_rejected(load):
    class ShiftedColumns(Padded):
        def __call__(self, rows, columns, first):
            return super().__call__(rows, (columns - 1).clamp(min=0), first)

    backbone = load("llama")
    batch = batch_of(backbone, TEMPLATES["front"], TEXTS)
    backbone.path_factories = [partial(ShiftedColumns, attention="sdpa"), *backbone.path_factories[2:]]
    backbone(batch)
    assert type(backbone.path) is Padded
    assert "differ by" in backbone.reasons[0]


def test_a_path_with_wrong_gradients_is_rejected(load, monkeypatch):
    backward = packed_attention.PackedAttention.backward
    halved = staticmethod(lambda ctx, grad: backward(ctx, grad / 2))
    monkeypatch.setattr(packed_attention.PackedAttention, "backward", halved)
    backbone = load("llama")
    with torch.inference_mode():  # for example, a validation before the training
        backbone(batch_of(backbone, TEMPLATES["front"], TEXTS), SoftPrompt(tokens=random_tokens(backbone)))
    assert isinstance(backbone.path, TwoPass)
    assert "differ by" in backbone.reasons[0]


def test_a_batch_longer_than_a_sliding_window_ends_packing(load):
    """The first batch fits into the window."""
    backbone, plain = load("llama"), load("llama", packed=False)
    config = {k: v for k, v in backbone.model.config.to_dict().items() if k not in ("model_type", "architectures")}
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**{**config, "sliding_window": 12})).eval().requires_grad_(False)
    packed, padded = (CausalBackbone(model, each.codec, each.spec) for each in (backbone, plain))
    for texts in (["what ?", "the dog ?"], TEXTS):
        batch = batch_of(packed, TEMPLATES["front"], texts)
        prompt = SoftPrompt(tokens=random_tokens(packed))
        previous_path = type(packed.path)
        logits = packed(batch, prompt)
        model.set_attn_implementation("eager")
        rows = padded.splice(batch, prompt)
        mask = rows.mask.long()
        expected = model(inputs_embeds=rows.embeds, attention_mask=mask, use_cache=False).logits
        packed.path.enter()
        for b in range(len(batch)):
            column = int(rows.columns[b][batch.mask[b]][-1]) - 1
            torch.testing.assert_close(logits[b, 0], expected[b, column], rtol=1e-4, atol=1e-5)
    assert previous_path is Packed
    assert not isinstance(packed.path, Packed)


def test_the_cache_moves_the_least_recently_used_entry_to_disk_and_reads_it_from_there(tmp_path):
    computed = []

    def get(name, persistent=True):
        def compute():
            computed.append(name)
            return torch.full((4,), float(len(computed)))

        return cache.get(name, compute, persistent)

    cache = ContextCache(memory=32, disk=200, folder=tmp_path)
    values = {name: get(name) for name in "ab"}
    get("a")
    get("c")  # 16 bytes each: b goes to disk
    assert sorted(cache.entries) == ["a", "c"]
    assert [file.stem for file in tmp_path.glob("*")] == ["b"]
    torch.testing.assert_close(get("b"), values["b"])
    assert computed == ["a", "b", "c"]
    get("transient", persistent=False)
    get("e")
    get("f")
    assert "transient" not in [file.stem for file in tmp_path.glob("*")]
    assert sum(file.stat().st_size for file in tmp_path.glob("*")) <= 200
    assert cache.bytes <= 32


def test_an_invalid_file_of_the_cache_is_computed_again(tmp_path):
    cache = ContextCache(memory=0, disk=1 << 20, folder=tmp_path)
    first = cache.get("a", lambda: torch.ones(4))
    assert torch.equal(cache.get("a", lambda: torch.zeros(4)), first)
    (tmp_path / "a.safetensors").write_bytes(b"truncated")
    assert torch.equal(cache.get("a", lambda: torch.zeros(4)), torch.zeros(4))


def test_the_selection_of_a_path_leaves_no_gradient(load):
    backbone = load("llama")
    batch = batch_of(backbone, TEMPLATES["front"], TEXTS)
    tokens = torch.nn.Parameter(random_tokens(backbone))
    backbone(batch, SoftPrompt(tokens=tokens))
    assert tokens.grad is None


@pytest.mark.parametrize("template", TEMPLATES)
def test_generation_runs_a_shared_prompt_once_and_gives_the_same_answers(pair, template, monkeypatch):
    backbone, tokens = pair[0], random_tokens(pair[0])
    runs = []
    monkeypatch.setattr(backbone.prompts, "_run", count_calls(backbone.prompts._run, runs))
    for texts in (TEXTS, TEXTS[:1], TEXTS[1:]):
        batch = batch_of(backbone, TEMPLATES[template], texts)
        answers = backbone.generate(batch, SoftPrompt(tokens=tokens), max_new_tokens=6)
        with monkeypatch.context() as patch:
            patch.setattr(RowBatch, "prompt_end", 0)  # each row runs in one pass
            assert torch.equal(answers, backbone.generate(batch, SoftPrompt(tokens=tokens), max_new_tokens=6))
    if template in ("front", "instruction before"):
        assert len(runs) == 1


def test_rows_that_differ_only_in_their_answers_run_packed(pair):
    """Such rows are candidates of one row: their shared prefix includes the position before the first target."""
    batch = batch_of(pair[0], TEMPLATES["front"], ["what ?"] * 3, ["very good indeed", "bad", "sad ."])
    results = [loss_and_gradients(backbone, batch, random_tokens(pair[0]) * 0 + 1) for backbone in pair]
    assert isinstance(pair[0].path, Packed)
    torch.testing.assert_close(*results, **EXACT)


@pytest.mark.parametrize("options", [{}, {"checkpointing": True}], ids=["plain", "checkpointing"])
def test_compiled_layers_give_the_same_results_and_parameter_names(load, options):
    torch.compiler.reset()
    plain, compiled = load("llama"), load("llama", compiled=True, **options)
    tokens = random_tokens(plain)
    for texts in (TEXTS, TEXTS[:2]):  # rows of another length are not compiled again
        batch = batch_of(plain, TEMPLATES["front"], texts)
        results = [loss_and_gradients(backbone, batch, tokens) for backbone in (plain, compiled)]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            logits = [backbone(batch, SoftPrompt(tokens=tokens)) for backbone in (plain, compiled)]
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert isinstance(compiled.path, Packed)
    assert list(compiled.model.state_dict()) == list(plain.model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("linear_backend", ["plain", "prepacked"])
def test_the_packaged_backbone_packed_in_float32_is_close_to_padded(linear_backend):
    packed = load_backbone(BackboneSpec(linear_backend=linear_backend, packed=True))
    padded = load_backbone(BackboneSpec(linear_backend="plain", packed=False))
    texts = ["The film is a joyless, endless mess.", "Superb.", "It has its moments, and they are many. I liked it."]
    tokens = packed.word_embeddings[None, 100:120]
    for template in ("{soft}Review: {text} Sentiment:{target}", "Review: {text}{soft} Sentiment:{target}"):
        batch = batch_of(packed, template, texts, [" bad", " good", " good"])
        logits, loss, (gradient,) = loss_and_gradients(packed, batch, tokens)
        expected_logits, expected_loss, (expected_gradient,) = loss_and_gradients(padded, batch, tokens)
        for result, expected in (
            (logits, expected_logits),
            (loss, expected_loss),
            (gradient, expected_gradient),
        ):
            assert (result - expected).norm() < 1e-4 * expected.norm()
    assert isinstance(packed.path, Packed)


@pytest.mark.parametrize(
    ("template", "num_warnings"), [("{soft}{text} it is {target}", 1), ("{text} it is{soft}{target}", 0)]
)
def test_soft_tokens_outside_a_sliding_window_cause_one_warning(load, caplog, template, num_warnings):
    sizes = {"vocab_size": 44, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = MistralConfig(num_attention_heads=4, num_key_value_heads=2, sliding_window=6, **sizes)
    backbone = CausalBackbone(MistralForCausalLM(config), load("llama").codec, BackboneSpec())
    tokens = torch.randn(1, 2, 32)
    for _ in range(2):
        backbone(batch_of(backbone, template, ["a very long and sad story", "dull"]), SoftPrompt(tokens=tokens))
    warnings = [record for record in caplog.records if "sliding window of 6 tokens" in record.getMessage()]
    assert len(warnings) == num_warnings


def test_longer_rows_repeat_the_trials(load):
    """Some models encode the positions of long texts differently."""

    class WrongForLongRows(Padded):
        def __call__(self, rows, columns, first):
            error = 1 if rows.mask.shape[1] > 8 else 0
            return super().__call__(rows, (columns - error).clamp(min=0), first)

    backbone, plain = load("llama"), load("llama", packed=False)
    backbone.path_factories = [partial(WrongForLongRows, attention="sdpa"), *backbone.path_factories[2:]]
    short = batch_of(backbone, "{text} {target}", ["what ?", "what", "a dog"])
    backbone(short)
    assert type(backbone.path) is WrongForLongRows
    long = batch_of(backbone, TEMPLATES["middle"], TEXTS)
    torch.testing.assert_close(backbone(long), plain(long))
    assert type(backbone.path) is Padded


def test_batches_of_at_most_the_tried_size_need_no_trial(load, monkeypatch):
    backbone = load("llama")
    batch = batch_of(backbone, TEMPLATES["front"], TEXTS)
    backbone(batch)
    monkeypatch.setattr(causal, "select_path", None)
    backbone(batch)
    backbone(batch.only([0, 1]))


def test_longer_rows_repeat_a_part_of_the_trial_and_longer_prompts_all_of_it(load, monkeypatch):
    backbone, trials = load("llama"), []

    def record(*args):
        trials.append("longer rows" if args[-1] else "complete")
        return 0, []

    monkeypatch.setattr(causal, "select_path", record)

    def run(texts, length):
        tokens = torch.randn(1, length, 32)
        backbone(batch_of(backbone, TEMPLATES["front"], texts), SoftPrompt(tokens=tokens))

    pair = ["what ?", "sad ."]
    run(pair, 3)
    run(pair * 2, 3)
    assert trials == ["complete"]
    run(pair * 3, 3)
    run(["a dog ?", "sad ."], 3)
    run(["a dog ?", "sad ."], 4)
    assert trials == ["complete", "complete", "longer rows", "complete"]


def test_a_model_that_mixes_the_rows_of_a_batch_runs_row_by_row(load):
    backbone, plain = load("llama", packed=False), load("llama", packed=False)
    batch = batch_of(backbone, TEMPLATES["front"], TEXTS)
    forward = backbone.model.model.forward

    def mix_rows(*args, inputs_embeds, **options):
        mean = inputs_embeds.mean(0, keepdim=True)
        return forward(*args, inputs_embeds=mean.expand_as(inputs_embeds), **options)

    expected = plain(batch)
    backbone.model.model.forward = mix_rows
    torch.testing.assert_close(backbone(batch), expected)
    assert type(backbone.path) is Alone
    assert "one by one" in backbone.execution_description
