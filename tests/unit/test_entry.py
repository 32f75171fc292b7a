"""How embeddings enter a model is found by running it."""

import pytest
import tiny
import torch

from lightning_softprompt.backbones.base import BackboneSpec
from lightning_softprompt.backbones.entry import Entry, EntryUnsupportedError, find_entry
from lightning_softprompt.backbones.load import load_backbone
from lightning_softprompt.backbones.precise import in_float32


class Toy(torch.nn.Module):
    """A causal stack whose states are sums over the tokens before."""

    def __init__(self, of_ids=0.0, scale=1.0, looks_ahead=False):
        super().__init__()
        self.table, self.extra = torch.nn.Embedding(tiny.V, 4), torch.nn.Embedding(tiny.V, 4)
        self.of_ids, self.scale, self.looks_ahead = of_ids, scale, looks_ahead

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids=None, inputs_embeds=None, use_cache=False):
        if inputs_embeds is None:
            inputs_embeds = self.table(input_ids) * self.scale
        if self.of_ids and input_ids is not None:
            inputs_embeds = inputs_embeds + self.extra(input_ids)
        return (inputs_embeds.flip(1).cumsum(1) if self.looks_ahead else inputs_embeds.cumsum(1),)


def found(stack):
    return find_entry(stack, tiny.V, (tiny.BOS,), tiny.UNK, is_causal=True)


def test_a_plain_model_is_given_embeddings():
    assert found(Toy()).entry == Entry()


def test_a_model_that_scales_what_it_embeds_is_given_ids():
    stack = Toy(scale=3.0)
    entry = found(stack).entry
    assert entry.by_ids
    embeds = torch.randn(2, 5, 4)
    torch.testing.assert_close(entry.run(stack, embeds)[0], 3 * embeds.cumsum(1))


@pytest.mark.parametrize(("stack", "reason"), [(Toy(of_ids=1.0), "elsewhere"), (Toy(looks_ahead=True), "later tokens")])
def test_a_model_that_soft_tokens_cannot_enter_is_refused(stack, reason):
    with pytest.raises(EntryUnsupportedError, match=reason):
        found(stack)


def test_a_backbone_that_soft_tokens_cannot_enter_is_refused_by_its_type(tiny_folder, monkeypatch):
    monkeypatch.setattr("lightning_softprompt.backbones.load.find_entry", lambda *_: found(Toy(of_ids=1.0)))
    with pytest.raises(ValueError, match=r"of type llama is not supported.*token ids elsewhere"):
        load_backbone(BackboneSpec(name=str(tiny_folder("llama"))))


def test_learned_positions_are_counted(load):
    assert load("gpt2").learned_positions == tiny.WINDOW
    assert load("llama").learned_positions is None
    assert load("llama").window == tiny.WINDOW


def test_a_half_precision_model_computes_in_float32_without_a_copy(load):
    half = load("llama", dtype="bfloat16").model
    weights = {name: weight.data_ptr() for name, weight in half.named_parameters()}
    exact = load("llama", dtype="bfloat16").model.float()
    embeds = torch.randn(1, 5, 32)
    results = []
    with in_float32(half):
        for model in (half, exact):
            leaf = embeds.clone().requires_grad_()
            logits = model(inputs_embeds=leaf, use_cache=False).logits
            results.append((logits.detach(), torch.autograd.grad(logits.logsumexp(-1).sum(), leaf)[0]))
    torch.testing.assert_close(*results)
    assert results[0][0].dtype == torch.float32
    assert {name: weight.data_ptr() for name, weight in half.named_parameters()} == weights
    assert half.dtype == torch.bfloat16
