"""How a model accepts embeddings is determined by running it."""

import pytest
import tiny
import torch
from architectures import Architecture, save
from torch.nn.functional import scaled_dot_product_attention

from lightning_softprompt.backbones.execution.float32_reference import in_float32
from lightning_softprompt.backbones.insertion.embeddings import Entry, EntryUnsupportedError, check_attends, find_entry
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.refusals import UnsupportedBackboneError


class Toy(torch.nn.Module):
    """A causal stack whose states are cumulative sums over tokens."""

    def __init__(self, id_scale=0.0, scale=1.0, looks_ahead=False, ignores_others=False):
        super().__init__()
        self.table, self.extra = torch.nn.Embedding(tiny.V, 4), torch.nn.Embedding(tiny.V, 4)
        self.id_scale, self.scale, self.looks_ahead, self.ignores_others = id_scale, scale, looks_ahead, ignores_others

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids=None, inputs_embeds=None, use_cache=False):
        if inputs_embeds is None:
            inputs_embeds = self.table(input_ids) * self.scale
        if self.id_scale and input_ids is not None:
            inputs_embeds = inputs_embeds + self.extra(input_ids)
        if self.ignores_others:
            return (inputs_embeds,)
        return (inputs_embeds.flip(1).cumsum(1) if self.looks_ahead else inputs_embeds.cumsum(1),)


def find_toy_entry(stack):
    return find_entry(stack, tiny.V, (tiny.BOS,), tiny.UNK, is_causal=True)


def test_a_plain_model_receives_embeddings():
    assert find_toy_entry(Toy()).entry == Entry()


def test_a_model_that_scales_embeddings_receives_ids():
    stack = Toy(scale=3.0)
    entry = find_toy_entry(stack).entry
    assert entry.by_ids
    embeds = torch.randn(2, 5, 4)
    torch.testing.assert_close(entry.run(stack, embeds)[0], 3 * embeds.cumsum(1))


REFUSED = [
    (Toy(id_scale=1.0), "outside of its embedding module"),
    (Toy(looks_ahead=True), "later tokens"),
]


@pytest.mark.parametrize(("stack", "reason"), REFUSED)
def test_a_model_that_soft_tokens_cannot_enter_is_refused(stack, reason):
    with pytest.raises(EntryUnsupportedError, match=reason):
        find_toy_entry(stack)


def test_a_model_whose_tokens_do_not_affect_each_other_is_refused():
    check_attends(Toy(), tiny.V, is_causal=True)
    with pytest.raises(EntryUnsupportedError, match="do not depend on the other tokens"):
        check_attends(Toy(ignores_others=True), tiny.V, is_causal=True)


def test_a_backbone_that_soft_tokens_cannot_enter_is_refused_by_its_type(tiny_folder, monkeypatch):
    monkeypatch.setattr(
        "lightning_softprompt.backbones.loading.find_entry", lambda *_: find_toy_entry(Toy(id_scale=1.0))
    )
    with pytest.raises(ValueError, match=r"of type llama is not supported.*token ids outside of its embedding module"):
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


def test_a_half_precision_head_computes_in_float32_if_it_is_called_alone(tmp_path):
    half = load_backbone(BackboneSpec(name=str(save(Architecture("roberta"), tmp_path)), dtype="bfloat16")).model
    states, head = torch.randn(1, 3, 32), half.get_output_embeddings()
    with in_float32(half):
        torch.testing.assert_close(head(states), states @ head.weight.float().T + head.bias.float())
        assert half.lm_head(states).dtype == torch.float32
    assert head.weight.dtype == torch.bfloat16


def test_states_and_masks_in_half_precision_are_converted_to_float32(load):
    half = load("llama", dtype="bfloat16").model
    query = torch.randn(1, 2, 3, 8)
    with in_float32(half):
        assert half.lm_head(torch.randn(1, 3, 32).bfloat16()).dtype == torch.float32
        mask = torch.zeros(3, 3, dtype=torch.bfloat16)
        assert scaled_dot_product_attention(query, query, query, attn_mask=mask).dtype == torch.float32


UNSUPPORTED = {
    "fsmt": "transformers does not provide its word embeddings",
    "perceiver": "transformers does not provide its word embeddings",
    "ibert": "its embedding module returns a tuple of several",
    "prophetnet": "one state for each token is required",
    "mra": "its states do not depend on the other tokens of a row",
}


@pytest.mark.parametrize(("name", "reason"), UNSUPPORTED.items())
def test_an_architecture_that_is_not_supported_is_refused_with_an_explanation(name, reason, tmp_path):
    folder = save(Architecture(name), tmp_path)
    with pytest.raises(UnsupportedBackboneError, match=rf"of type {name} is not supported: .*{reason}"):
        load_backbone(BackboneSpec(name=str(folder)))
