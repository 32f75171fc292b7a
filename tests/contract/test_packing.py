"""Packed rows give the same results as padded rows, in float64, where no loose tolerance hides an error."""

from functools import partial

import pytest
import torch
from exact import EXACT, TEMPLATES, batch_of, loss_and_gradients, saved_bytes

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
    packed, padded = (loss_and_gradients(backbone, batch, tokens) for backbone in pair)
    torch.testing.assert_close(packed, padded, **EXACT)
    assert isinstance(pair[0].path, Packed)
    assert isinstance(pair[1].path, Padded)


def test_packed_equals_padded_with_a_prompt_for_each_row_and_a_shift(pair):
    batch = batch_of(pair[0], TEMPLATES["front"], ["the movie was great", "what ?", "that dog is one dog"])
    tokens = torch.randn(3, 4, pair[0].hidden_size, dtype=torch.float64)
    shift = torch.randn(3, batch.input_ids.shape[1], pair[0].hidden_size, dtype=torch.float64)
    packed, padded = (loss_and_gradients(backbone, batch, tokens, shift) for backbone in pair)
    torch.testing.assert_close(packed, padded, **EXACT)


def test_packed_equals_padded_for_equal_rows_and_a_single_row(pair):
    for texts in (["the movie was great"] * 3, ["the movie was great"]):
        batch = batch_of(pair[0], TEMPLATES["front"], texts)
        tokens = torch.randn(1, 3, pair[0].hidden_size, dtype=torch.float64)
        packed, padded = (loss_and_gradients(backbone, batch, tokens) for backbone in pair)
        torch.testing.assert_close(packed, padded, **EXACT)


def test_the_shared_prefix_is_the_common_beginning_of_all_rows(load):
    backbone = load("llama")
    batch = batch_of(backbone, TEMPLATES["instruction before"], ["the movie was great", "the dog ?"])
    prompt = SoftPrompt(tokens=torch.randn(1, 3, backbone.hidden_size))

    def prefix_length(prompt):
        return RowBatch.of(backbone.splice(batch, prompt), batch, prompt).shared_prefix

    instruction = len(backbone.codec.ids("is this film good ?"))
    assert prefix_length(prompt) == 1 + instruction + 3 + 1  # BOS, instruction, soft tokens, "the"
    prompt_of_each_row = SoftPrompt(tokens=torch.randn(2, 3, backbone.hidden_size))
    assert prefix_length(prompt_of_each_row) == 1 + instruction
    shifted = SoftPrompt(tokens=prompt.tokens, shift=torch.zeros(1, 1, 1))
    assert prefix_length(shifted) == 0


def test_packed_equals_padded_for_equal_rows_before_a_longer_row(pair):
    batch = batch_of(pair[0], TEMPLATES["front"], ["what ?", "what ?", "that dog is one dog"], ["good"] * 3)
    tokens = torch.randn(1, 3, pair[0].hidden_size, dtype=torch.float64)
    packed, padded = (loss_and_gradients(backbone, batch, tokens) for backbone in pair)
    torch.testing.assert_close(packed, padded, **EXACT)


def test_a_model_that_returns_nan_is_not_packed(load):
    backbone = load("llama")
    backbone.model.model.norm.weight.data.fill_(float("nan"))
    backbone(batch_of(backbone, TEMPLATES["front"], ["the movie was great", "what ?"]))
    assert isinstance(backbone.path, Padded)
    assert "differ by inf" in backbone.reasons[0]


def test_a_single_row_runs_packed(load):
    backbone = load("llama")
    backbone(batch_of(backbone, TEMPLATES["front"], ["the movie was great"]))
    assert isinstance(backbone.path, Packed)


def test_packing_concatenates_what_follows_the_shared_prefix():
    lengths = torch.tensor([4, 5, 3])
    mask = torch.arange(5) < lengths[:, None]
    rows = torch.arange(15.0).view(3, 5, 1)
    packing = pack(mask, 2)
    assert torch.equal(packing.pack(rows)[0, :, 0], torch.tensor([0.0, 1, 2, 3, 7, 8, 9, 12]))
    assert torch.equal(packing.positions[0], torch.tensor([0, 1, 2, 3, 2, 3, 4, 2]))
    columns = torch.tensor([[1, 3], [0, 4], [2, 2]])
    assert torch.equal(packing.columns(columns)[0], torch.tensor([1, 3, 0, 6, 7, 7]))


def test_a_model_whose_attention_has_further_arguments_runs_in_two_passes(load):
    backbone = load("llama")
    backbone.model.config.sliding_window = 4
    for layer in backbone.model.model.layers:
        layer.self_attn.forward = partial(layer.self_attn.forward, s_aux=1)
    batch = batch_of(backbone, TEMPLATES["front"], ["the movie was great", "what ?"])
    backbone(batch)
    assert isinstance(backbone.path, TwoPass)
    assert "s_aux" in backbone.reasons[0]


def test_the_operations_of_a_packed_step_are_proportional_to_its_distinct_tokens(pair):
    """The shared prefix runs once."""
    from torch.utils.flop_counter import FlopCounterMode

    batch = batch_of(pair[0], TEMPLATES["front"], ["the movie was great"] * 7 + ["what ?"])
    tokens = torch.randn(1, 20, pair[0].hidden_size, dtype=torch.float64)
    for backbone in pair:  # the first batch of this size includes the trials
        loss_and_gradients(backbone, batch, tokens)
    counts = []
    for backbone in pair:
        with FlopCounterMode(display=False) as counter:
            loss_and_gradients(backbone, batch, tokens)
        counts.append(counter.get_total_flops())
    mask = pair[0].splice(batch, SoftPrompt(tokens=tokens)).mask
    prefix = 1 + 20
    packed_tokens = prefix + int(mask.sum()) - len(batch) * prefix
    assert counts[0] / counts[1] < 1.05 * packed_tokens / mask.numel() + 0.05


def test_a_packed_step_saves_less_for_the_backward_pass(pair):
    batch = batch_of(pair[0], TEMPLATES["front"], ["the movie was great"] * 7 + ["what ?"])
    tokens = torch.randn(1, 20, pair[0].hidden_size, dtype=torch.float64)
    pair[0](batch)
    sizes = []
    for backbone in pair:
        size, _ = saved_bytes(partial(loss_and_gradients, backbone, batch, tokens))
        sizes.append(size)
    packed, padded = sizes
    assert packed < 0.4 * padded


def test_tokens_that_no_target_depends_on_do_not_run(load):
    backbone = load("llama")
    batch = batch_of(backbone, TEMPLATES["front"], ["the movie was great", "what ?"], ["good", "bad one"])
    prompt = SoftPrompt(tokens=torch.randn(1, 3, backbone.hidden_size))
    backbone(batch, prompt)
    lengths = {}
    layers = backbone.model.model.layers

    def record_length(name, _, args, out):
        lengths[name] = args[0].shape[1]

    for name, layer in (("first", layers[0]), ("last", layers[-1])):
        layer.mlp.up_proj.register_forward_hook(partial(record_length, name))
    backbone(batch, prompt)
    prefix, targets = 1 + 3, 1 + 2
    text = int(batch.source.sum()) - 2  # without BOS, which is in the prefix
    first_answer_tokens = 2 - 1  # the second row predicts its second token from its first one
    assert lengths == {"first": prefix + text + first_answer_tokens, "last": targets}
