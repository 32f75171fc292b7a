"""The loss of target tokens against loops over them."""

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
    """Of each row, token by token."""
    logits = lm(batch).log_softmax(-1)
    return [
        [-float(row[u, t]) for u, t in enumerate(targets) if t >= 0]
        for row, targets in zip(logits, batch.targets, strict=True)
    ]


def test_the_average_is_over_tokens_or_over_rows(lm):
    batch = batch_of(lm.backbone.codec, TEMPLATES["middle"])
    each = losses_of_rows(lm, batch)
    assert len({len(row) for row in each}) > 1
    assert_close(float(LanguageModeling()(lm, batch).loss), fmean([loss for row in each for loss in row]))
    assert_close(float(LanguageModeling(average="rows")(lm, batch).loss), fmean(map(fmean, each)))


def test_smoothing_gives_a_share_to_all_words(lm):
    batch = batch_of(lm.backbone.codec)
    is_target = batch.targets >= 0
    even = -lm(batch).log_softmax(-1).mean(-1)[is_target].mean()
    expected = 0.8 * LanguageModeling()(lm, batch).loss + 0.2 * even
    assert_close(LanguageModeling(label_smoothing=0.2)(lm, batch).loss, expected)


def source_losses(lm, row, soft):
    """Of the words of a row but the first, its soft tokens put in by hand."""
    words, embeds, positions = row.ids[: row.answers[0]], [], []
    for n, word in enumerate(words):
        embeds += [*soft] * (n in row.slots)
        positions.append(len(embeds) - 1)
        embeds.append(lm.backbone.embed(torch.tensor(word)))
    logits = lm.backbone.model(inputs_embeds=torch.stack(embeds)[None]).logits[0].log_softmax(-1)
    return [-float(logits[at, word]) for at, word in zip(positions[1:], words[1:], strict=True)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("family", CAUSAL)
def test_the_source_loss_has_its_weight(lm, family, template, side):
    codec = type(lm.backbone.codec)(lm.backbone.codec.tokenizer, side)
    batch = batch_of(codec, template)
    outcome = LanguageModeling(source_weight=0.3)(lm, batch)
    each = [loss for row in batch.require_encoded() for loss in source_losses(lm, row, lm.prompt(batch).tokens[0])]
    assert_close(float(outcome.logs["source_loss"]), fmean(each), atol=1e-5, rtol=1e-5)
    assert outcome.logs["answer_loss"] == LanguageModeling()(lm, batch).loss
    assert_close(outcome.loss, outcome.logs["answer_loss"] + 0.3 * outcome.logs["source_loss"])
