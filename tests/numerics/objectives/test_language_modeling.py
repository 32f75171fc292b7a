"""The loss of target tokens compared with loops."""

from statistics import fmean

import pytest
import torch
from tiny import CAUSAL, TEMPLATES, batch_of
from torch.testing import assert_close

from lightning_softprompt.methods import PromptTuning
from lightning_softprompt.objectives.language_modeling import LanguageModeling

FAMILIES = ("llama", "gpt2", "t5")


@pytest.fixture
def lm(backbone):
    method = PromptTuning(length=3, backbone=backbone.spec)
    method.attach(backbone)
    return method.lm()


def losses_of_rows(lm, batch):
    """Return the losses of the target tokens of each row."""
    log_probabilities = lm(batch).detach().log_softmax(-1)
    losses = []
    for row, targets in zip(log_probabilities, batch.targets, strict=True):
        losses.append([-float(row[u, token]) for u, token in enumerate(targets) if token >= 0])
    return losses


def test_the_average_is_over_tokens_or_over_rows(lm):
    batch = batch_of(lm.backbone.codec, TEMPLATES["middle"])
    rows = losses_of_rows(lm, batch)
    assert len({len(row) for row in rows}) > 1
    all_losses = [loss for row in rows for loss in row]
    assert_close(float(LanguageModeling()(lm, batch).loss), fmean(all_losses))
    assert_close(float(LanguageModeling(average="rows")(lm, batch).loss), fmean(map(fmean, rows)))


def test_label_smoothing_adds_the_mean_over_the_vocabulary(lm):
    batch = batch_of(lm.backbone.codec)
    is_target = batch.targets >= 0
    uniform = -lm(batch).log_softmax(-1).mean(-1)[is_target].mean()
    expected = 0.8 * LanguageModeling()(lm, batch).loss + 0.2 * uniform
    assert_close(LanguageModeling(label_smoothing=0.2)(lm, batch).loss, expected)


def source_losses(lm, row, soft):
    """Return the losses of the words of a row except the first, with soft tokens inserted by a loop."""
    words, embeds, positions = row.ids[: row.answers[0]], [], []
    for n, word in enumerate(words):
        embeds += [*soft] * (n in row.slots)
        positions.append(len(embeds) - 1)
        embeds.append(lm.backbone.embed(torch.tensor(word)))
    logits = lm.backbone.model(inputs_embeds=torch.stack(embeds)[None]).logits[0].detach()
    log_probabilities = logits.log_softmax(-1)
    return [-float(log_probabilities[position, word]) for position, word in zip(positions[1:], words[1:], strict=True)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("family", CAUSAL)
def test_the_source_loss_is_added_with_its_weight(lm, family, template, side):
    codec = type(lm.backbone.codec)(lm.backbone.codec.tokenizer, side)
    batch = batch_of(codec, template)
    outcome = LanguageModeling(source_weight=0.3)(lm, batch)
    tokens = lm.prompt(batch).tokens[0]
    losses = [loss for row in batch.require_encoded() for loss in source_losses(lm, row, tokens)]
    assert_close(float(outcome.logs["source_loss"]), fmean(losses), atol=1e-5, rtol=1e-5)
    assert outcome.logs["answer_loss"] == LanguageModeling()(lm, batch).loss
    assert_close(outcome.loss, outcome.logs["answer_loss"] + 0.3 * outcome.logs["source_loss"])
