"""The vocabulary projection for targets, for some words, in chunks, and of models that change the logits."""

import pytest
import torch
from tiny import batch_of
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from lightning_softprompt.backbones.execution import lm_head
from lightning_softprompt.core.types import IGNORE, SoftPrompt


def make_prompt(backbone, length=3):
    return SoftPrompt(tokens=torch.randn(1, length, backbone.hidden_size).requires_grad_())


def test_logits_of_some_words_equal_columns_of_all_logits(backbone):
    batch, soft = batch_of(backbone.codec), make_prompt(backbone)
    words = torch.tensor([7, 3, 3, 11])
    assert_close(backbone(batch, soft, words), backbone(batch, soft)[..., words])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_in_chunks_equals_the_one_of_the_logits(backbone, monkeypatch, smoothing):
    monkeypatch.setattr(lm_head, "CHUNK", 2)
    batch, soft = batch_of(backbone.codec), make_prompt(backbone)
    expected = cross_entropy(
        backbone(batch, soft).flatten(0, 1).float(),
        batch.targets.flatten(),
        reduction="none",
        label_smoothing=smoothing,
    ).view(batch.targets.shape)
    losses = backbone.cross_entropy(batch, soft, smoothing)
    assert_close(losses, expected)
    assert (losses[batch.targets == IGNORE] == 0).all()
    grads = [torch.autograd.grad(loss.sum(), soft.tokens)[0] for loss in (losses, expected)]
    assert_close(*grads)


def test_the_model_projects_no_row_after_the_first_run(backbone, monkeypatch):
    batch, soft = batch_of(backbone.codec), make_prompt(backbone)
    backbone(batch, soft)
    seen = []
    handle = backbone.head.layer.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[:-1].numel()))
    backbone(batch, soft, torch.tensor([3, 4]))
    handle.remove()
    assert seen == [0]


def test_logits_that_a_model_changes_after_its_head_are_preserved(load, family):
    backbone, plain = load(family), load(family)
    forward = backbone.model.forward

    def forward_with_cap(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = 2 * torch.tanh(out.logits / 2)
        return out

    backbone.model.forward = forward_with_cap
    batch, soft = batch_of(backbone.codec), make_prompt(backbone)
    expected = 2 * torch.tanh(plain(batch, soft) / 2)
    for _ in range(2):
        assert_close(backbone(batch, soft), expected)
    assert backbone.head.is_plain is False
    words = torch.tensor([3, 8])
    assert_close(backbone(batch, soft, words), expected[..., words])
    losses = cross_entropy(expected.flatten(0, 1), batch.targets.flatten(), reduction="none")
    assert_close(backbone.cross_entropy(batch, soft).flatten(), losses)
