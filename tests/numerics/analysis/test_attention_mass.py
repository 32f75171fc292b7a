"""Attention mass on every family and path, against the attention weights of plain transformers."""

from dataclasses import replace

import pytest
import torch
from tiny import CAUSAL, MASKED, SEQ2SEQ, batch_of
from torch.testing import assert_close
from transformers import DynamicCache

from lightning_softprompt.analysis.attention_mass import SOFT, measure_attention
from lightning_softprompt.backbones.execution import context_cache
from lightning_softprompt.backbones.execution.path_trial import Extent
from lightning_softprompt.core.types import IGNORE, SoftPrompt

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
COUNT = 4  # groups: soft tokens, and three of text
TEMPLATE = "it was {soft}{text} it was {target}"


def make_groups(batch):
    """Groups that differ from row to row, so that rows share no prefix."""
    positions = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
    return 1 + (positions + torch.arange(len(batch))[:, None]) % (COUNT - 1)


def sum_by_group(weights, groups):
    """Sums weights [heads, U, K] over the keys of each group [K]: [U, heads, G]."""
    sums = torch.stack([weights[..., groups == number].sum(-1) for number in range(COUNT)], dim=-1)
    return sums.transpose(0, 1)


def eager_masses(backbone, batch, prompt, groups):
    """The masses [layers, U, heads, G] of each row, which runs alone with the attention weights of transformers."""
    backbone.model.set_attn_implementation("eager")
    for b in range(len(batch)):
        row = replace(batch.only([b]), encoded=None)
        rows = backbone.splice(row, prompt)
        length = int(rows.mask.sum())
        embeds = rows.embeds[:, :length]
        soft = prompt.tokens.shape[1]
        row_groups = torch.cat([torch.full((soft,), SOFT), groups[b]])[rows.order[0, :length]]
        real = batch.targets[b] != IGNORE
        if backbone.probed_attentions == "cross":
            decoder_ids = backbone.decoder_ids(row.targets)
            out = backbone.model(inputs_embeds=embeds, decoder_input_ids=decoder_ids, output_attentions=True)
            first = len(backbone.opening) - 1
            masses = [sum_by_group(layer[0, :, first:], row_groups) for layer in out.cross_attentions]
        else:
            out = backbone.model(inputs_embeds=embeds, output_attentions=True)
            columns = rows.columns[0][(row.mask & ~row.source)[0]]
            if backbone.is_causal:
                columns = columns - 1
            masses = [sum_by_group(layer[0][:, columns], row_groups) for layer in out.attentions]
        yield real, torch.stack(masses)


@pytest.fixture
def prompt(backbone):
    return SoftPrompt(tokens=torch.randn(1, 3, backbone.hidden_size))


def check(backbone, batch, prompt, masses, groups):
    assert_close(masses.sum(-1), torch.ones(masses.shape[:-1]), **CLOSE)
    for b, (real, expected) in enumerate(eager_masses(backbone, batch, prompt, groups)):
        assert_close(masses[:, b, real], expected[:, : int(real.sum())], **CLOSE)


@pytest.mark.parametrize("family", [*CAUSAL, *MASKED, *SEQ2SEQ])
def test_masses_are_sums_of_the_attention_weights_of_transformers(load, family):
    backbone = load(family)
    prompt = SoftPrompt(tokens=torch.randn(1, 3, backbone.hidden_size))
    batch = batch_of(backbone.codec, TEMPLATE)
    with torch.no_grad():
        expected = backbone(batch, prompt)
        groups = make_groups(batch)
        masses = measure_attention(backbone, batch, prompt, groups, COUNT)
        assert_close(backbone(batch, prompt), expected, atol=0, rtol=0)
        check(backbone, batch, prompt, masses, groups)


@torch.no_grad()
@pytest.mark.parametrize("family", CAUSAL)
def test_every_path_measures_the_same(load, family):
    backbone = load(family)
    prompt = SoftPrompt(tokens=torch.randn(1, 3, backbone.hidden_size))
    batch = batch_of(backbone.codec, TEMPLATE)
    groups = make_groups(batch)
    results = []
    for factory in backbone.path_factories:
        backbone.path, backbone.tried = factory(backbone.model, backbone.head), Extent(1000, 1000, 1000)
        if type(backbone.path).__name__ in ("Packed", "Padded"):
            backbone.path.enter()
            results.append(measure_attention(backbone, batch, prompt, groups, COUNT))
    assert len(results) == 2
    assert_close(*results, **CLOSE)


@torch.no_grad()
def test_keys_and_values_of_a_prompt_have_the_mass_of_a_cache_in_transformers(load):
    backbone = load("llama")
    sites = backbone.attentions["self"]
    pairs = {layer: tuple(torch.randn(1, sites.heads, 2, sites.size) for _ in "kv") for layer in range(len(sites))}
    batch = batch_of(backbone.codec, "{soft}{text} it was {target}")
    groups = make_groups(batch)
    masses = measure_attention(backbone, batch, SoftPrompt(kv={"self": pairs}), groups, COUNT)
    assert_close(masses.sum(-1), torch.ones(masses.shape[:-1]), **CLOSE)
    backbone.model.set_attn_implementation("eager")
    for b in range(len(batch)):
        cache = DynamicCache(config=backbone.model.config)
        for layer, (key, value) in pairs.items():
            cache.update(key, value, layer)
        ids = batch.input_ids[b][batch.mask[b]]
        out = backbone.model(input_ids=ids[None], past_key_values=cache, output_attentions=True)
        row_groups = torch.cat([torch.full((2,), SOFT), groups[b][batch.mask[b]]])
        real = batch.targets[b] != IGNORE
        columns = (~batch.source[b][batch.mask[b]]).nonzero()[:, 0] - 1
        for number, layer in enumerate(out.attentions):
            expected = sum_by_group(layer[0][:, columns], row_groups)
            assert_close(masses[number, b, real], expected, **CLOSE)


@torch.no_grad()
def test_cached_passages_count_as_their_groups(load, monkeypatch):
    """Text before the soft tokens is cached as keys and values, and its masses are the same."""
    monkeypatch.setattr(context_cache, "MIN_FROZEN_TOKENS", 8)
    backbone = load("llama")
    text = " ".join(["a funny dog"] * 4)
    batch = batch_of(backbone.codec, f"{text} {{soft}}{{text}} it was {{target}}")
    prompt = SoftPrompt(tokens=torch.randn(1, 3, backbone.hidden_size))
    groups = make_groups(batch)
    for _ in range(2):  # the second time from the cache
        masses = measure_attention(backbone, batch, prompt, groups, COUNT)
        check(backbone, batch, prompt, masses, groups)
        backbone.path.enter()  # after the eager attention
    assert backbone.contexts.entries


def test_groups_out_of_range_are_refused(load):
    backbone = load("llama")
    batch = batch_of(backbone.codec, TEMPLATE)
    with pytest.raises(ValueError, match="groups must be numbers from 0 to 3"):
        measure_attention(backbone, batch, None, make_groups(batch) + 1, COUNT)
