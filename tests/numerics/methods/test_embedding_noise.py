"""`embedding_noise` adds the noise of NEFTune to the embeddings of the input, in training only, for any method."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny import batch_of, more_padding
from torch.testing import assert_close

from lightning_softprompt.methods import ADePT, Combined, LoRA, PrefixTuning, PromptTuning
from lightning_softprompt.objectives.language_modeling import LanguageModeling
from lightning_softprompt.prompts.dropout import embedding_noise

METHODS = {
    "soft tokens": partial(PromptTuning, length=3),
    "shift": partial(ADePT, length=2),
    "prefix": partial(PrefixTuning, length=2, width=8),
}


def noise_of(batch, alpha=5.0, seed=0, epoch=0):
    return embedding_noise(batch, 8, alpha, seed, epoch)


def test_noise_is_uniform_within_the_limit_of_the_paper_and_zero_on_padding(load):
    batch = batch_of(load("llama").codec)
    noise = noise_of(replace(batch, row_ids=(0, 1, 2, 3), global_row_ids=(0, 1, 2, 3)))
    for b, mask in enumerate(batch.mask):
        values, limit = noise[b, mask], 5 / (mask.sum() * 8) ** 0.5
        assert (noise[b, ~mask] == 0).all()
        assert 0.8 * limit < values.abs().max() <= limit
        assert_close(values.std(), limit / 3**0.5, rtol=0.25, atol=0)


def test_noise_depends_on_seed_epoch_and_row_but_not_on_other_rows_or_padding(load):
    codec = load("llama").codec
    batch = batch_of(codec)
    noise = noise_of(batch)
    assert torch.equal(noise, noise_of(batch))
    assert not torch.equal(noise, noise_of(batch, seed=1))
    assert not torch.equal(noise, noise_of(batch, epoch=1))
    padded = more_padding(batch, 2, 3, codec.pad_id)
    assert torch.equal(noise[batch.mask], noise_of(padded)[padded.mask])
    alone = batch.only([2])
    assert torch.equal(noise[2][batch.mask[2]], noise_of(alone)[alone.mask])


@pytest.mark.parametrize("build", METHODS.values(), ids=METHODS)
def test_packed_rows_give_the_loss_of_padded_rows(load, build):
    losses = []
    for packed in (True, False):
        backbone = load("llama", packed=packed).double()
        module = build(embedding_noise=5.0)
        module.attach(backbone, seed=0)
        module.double().train()
        batch = batch_of(backbone.codec)
        torch.manual_seed(3)
        losses.append(LanguageModeling()(module.lm(), batch).loss.detach())
        assert torch.equal(LanguageModeling()(module.eval().lm(), batch).loss, loss_without(build, backbone, batch))
    assert_close(*losses, atol=1e-6, rtol=1e-6)
    assert not torch.isclose(losses[0], LanguageModeling()(module.lm(), batch).loss.detach(), atol=1e-4)


def loss_without(build, backbone, batch):
    module = build()
    module.attach(backbone, seed=0)
    return LanguageModeling()(module.double().eval().lm(), batch).loss


def test_the_noise_is_added_to_the_input_embeddings(load):
    backbone = load("llama")
    module = PromptTuning(length=3, embedding_noise=5.0)
    module.attach(backbone)
    module.train()
    batch = batch_of(backbone.codec)
    shift = module.prompt_with_dropout(batch).shift
    assert torch.equal(shift, embedding_noise(batch, backbone.hidden_size, 5.0, torch.initial_seed(), 0))
    assert module.eval().prompt_with_dropout(batch).shift is None


def test_only_the_combination_sets_the_noise_of_its_parts():
    with pytest.raises(ValueError, match="cannot set embedding_noise; set embedding_noise of Combined"):
        Combined(parts=[PromptTuning(embedding_noise=1.0), LoRA()])
    with pytest.raises(ValueError, match="embedding_noise must be a finite number"):
        PromptTuning(embedding_noise=-1.0)
