"""Packed rows give what padded rows give, in float64 so that no loose bound hides a fault."""

import pytest
import torch
from exact import TEMPLATES, batch_of, loss_and_gradients, saved_bytes

from lightning_softprompt.backbones.execution.packing import pack
from lightning_softprompt.backbones.execution.paths import Packed, Padded, TwoPass
from lightning_softprompt.backbones.execution.row_batch import RowBatch
from lightning_softprompt.core.types import SoftPrompt

FAMILIES = ("llama", "gpt2")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("length", [1, 6])
def test_packed_equals_padded(pair, template, length):
    batch = batch_of(pair[0], TEMPLATES[template], ["the movie was great", "what ?", "that dog is one dog the movie"])
    tokens = torch.randn(1, length, pair[0].hidden_size, dtype=torch.float64)
    ours, plain = (loss_and_gradients(backbone, batch, tokens) for backbone in pair)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)
    assert isinstance(pair[0].path, Packed)
    assert isinstance(pair[1].path, Padded)


def test_packed_equals_padded_with_a_prompt_for_each_row_and_a_shift(pair):
    batch = batch_of(pair[0], TEMPLATES["front"], ["the movie was great", "what ?", "that dog is one dog"])
    tokens = torch.randn(3, 4, pair[0].hidden_size, dtype=torch.float64)
    shift = torch.randn(3, batch.input_ids.shape[1], pair[0].hidden_size, dtype=torch.float64)
    ours, plain = (loss_and_gradients(backbone, batch, tokens, shift) for backbone in pair)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


def test_packed_equals_padded_where_rows_are_the_same_or_alone(pair):
    for texts in (["the movie was great"] * 3, ["the movie was great"]):
        batch = batch_of(pair[0], TEMPLATES["front"], texts)
        tokens = torch.randn(1, 3, pair[0].hidden_size, dtype=torch.float64)
        ours, plain = (loss_and_gradients(backbone, batch, tokens) for backbone in pair)
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


def test_the_shared_head_is_what_all_rows_begin_with(load):
    backbone = load("llama")
    batch = batch_of(backbone, TEMPLATES["instruction before"], ["the movie was great", "the dog ?"])
    prompt = SoftPrompt(tokens=torch.randn(1, 3, backbone.hidden_size))

    def head(prompt):
        return RowBatch.of(backbone.splice(batch, prompt), batch, prompt).shared_prefix

    instruction = len(backbone.codec.ids("is this film good ?"))
    assert head(prompt) == 1 + instruction + 3 + 1  # BOS, instruction, soft tokens, "the"
    own = SoftPrompt(tokens=torch.randn(2, 3, backbone.hidden_size))
    assert head(own) == 1 + instruction
    shifted = SoftPrompt(tokens=prompt.tokens, shift=torch.zeros(1, 1, 1))
    assert head(shifted) == 0


def test_equal_rows_that_are_shorter_than_the_rest_come_first(pair):
    batch = batch_of(pair[0], TEMPLATES["front"], ["what ?", "what ?", "that dog is one dog"], ["good"] * 3)
    tokens = torch.randn(1, 3, pair[0].hidden_size, dtype=torch.float64)
    ours, plain = (loss_and_gradients(backbone, batch, tokens) for backbone in pair)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


def test_a_model_of_no_numbers_is_not_taken_for_exact(load):
    backbone = load("llama")
    backbone.model.model.norm.weight.data.fill_(float("nan"))
    backbone(batch_of(backbone, TEMPLATES["front"], ["the movie was great", "what ?"]))
    assert isinstance(backbone.path, Padded)
    assert "differ by inf" in backbone.reasons[0]


def test_one_row_alone_is_tried_out_beside_itself(load):
    backbone = load("llama")
    backbone(batch_of(backbone, TEMPLATES["front"], ["the movie was great"]))
    assert isinstance(backbone.path, Packed)


def test_packing_lays_rows_side_by_side():
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    rows = torch.arange(15.0).view(3, 5, 1)
    packing = pack(mask, 2)
    assert packing.pack(rows)[0, :, 0].tolist() == [0, 1, 2, 3, 7, 8, 9, 12]
    assert packing.positions[0].tolist() == [0, 1, 2, 3, 2, 3, 4, 2]
    assert packing.columns(torch.tensor([[1, 3], [0, 4], [2, 2]]))[0].tolist() == [1, 3, 0, 6, 7, 7]


def test_a_model_whose_attention_wants_more_runs_in_two_passes(load, caplog):
    backbone = load("llama")
    backbone.model.config.sliding_window = 4
    for layer in backbone.model.model.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, forward=forward, **options: forward(*args, s_aux=1, **options)
    batch = batch_of(backbone, TEMPLATES["front"], ["the movie was great", "what ?"])
    backbone(batch)
    assert isinstance(backbone.path, TwoPass)
    assert "s_aux" in backbone.reasons[0]


def test_a_packed_step_computes_what_the_tokens_that_differ_cost(pair):
    """The head runs once: floating-point operations fall with the tokens that run."""
    from torch.utils.flop_counter import FlopCounterMode

    batch = batch_of(pair[0], TEMPLATES["front"], ["the movie was great"] * 7 + ["what ?"])
    tokens = torch.randn(1, 20, pair[0].hidden_size, dtype=torch.float64)
    for backbone in pair:  # the first batch of its extent tries paths out
        loss_and_gradients(backbone, batch, tokens)
    counts = []
    for backbone in pair:
        with FlopCounterMode(display=False) as counter:
            loss_and_gradients(backbone, batch, tokens)
        counts.append(counter.get_total_flops())
    spliced = pair[0].splice(batch, SoftPrompt(tokens=tokens)).mask
    head = 1 + 20
    tokens_run = head + int(spliced.sum()) - len(batch) * head
    assert counts[0] / counts[1] < 1.05 * tokens_run / spliced.numel() + 0.05


def test_a_packed_step_keeps_what_the_tokens_that_differ_take(pair):
    batch = batch_of(pair[0], TEMPLATES["front"], ["the movie was great"] * 7 + ["what ?"])
    tokens = torch.randn(1, 20, pair[0].hidden_size, dtype=torch.float64)
    pair[0](batch)
    packed, padded = (saved_bytes(lambda b=backbone: loss_and_gradients(b, batch, tokens))[0] for backbone in pair)
    assert packed < 0.4 * padded


def test_no_token_runs_that_no_target_is_said_from(load):
    backbone = load("llama")
    batch = batch_of(backbone, TEMPLATES["front"], ["the movie was great", "what ?"], ["good", "bad one"])
    prompt = SoftPrompt(tokens=torch.randn(1, 3, backbone.hidden_size))
    backbone(batch, prompt)
    seen = {}
    layers = backbone.model.model.layers
    for name, module in (("first", layers[0].mlp.up_proj), ("last", layers[-1].mlp.up_proj)):
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: args[0].shape[1]}))
    backbone(batch, prompt)
    head, targets = 1 + 3, 1 + 2
    own = int(batch.source.sum()) - 2 + (2 - 1)  # the second row's first answer token says its second
    assert seen == {"first": head + own, "last": targets}
