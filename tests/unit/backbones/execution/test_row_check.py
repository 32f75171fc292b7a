"""Encoders whose results depend on padding run row by row."""

import tiny
import torch

from lightning_softprompt.core.types import SoftPrompt


def mix_positions(backbone):
    """Change a model so that it mixes all positions of a row, with its padding."""
    encoder = backbone.model.base_model.encoder
    forward = encoder.forward

    def forward_mixed(hidden, *args, **options):
        return forward(hidden + hidden.mean(1, keepdim=True), *args, **options)

    encoder.forward = forward_mixed
    return backbone


def test_a_model_that_padding_changes_runs_row_by_row(load):
    backbone, alone = mix_positions(load("bert")), mix_positions(load("bert"))
    batch, prompt = tiny.batch_of(backbone.codec), SoftPrompt(tokens=torch.randn(1, 3, 32))
    right = [alone(batch.only([b]), prompt)[0] for b in range(len(batch))]
    torch.testing.assert_close(backbone(batch, prompt), torch.stack(right))
    assert "one by one" in backbone.execution_description


def test_a_model_that_padding_does_not_change_runs_in_batches(load):
    backbone = load("bert")
    backbone(tiny.batch_of(backbone.codec))
    assert not backbone.row_check.runs_row_by_row
