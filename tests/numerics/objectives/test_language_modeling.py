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


def losses(lm, batch):
    """Of each row, token by token."""
    logits = lm(batch).log_softmax(-1)
    return [
        [-float(row[u, t]) for u, t in enumerate(said) if t >= 0]
        for row, said in zip(logits, batch.targets, strict=True)
    ]


def test_the_average_is_over_tokens_or_over_rows(lm):
    batch = batch_of(lm.backbone.codec, TEMPLATES["middle"])
    each = losses(lm, batch)
    assert len({len(row) for row in each}) > 1
    assert_close(float(LanguageModeling()(lm, batch).loss), fmean([loss for row in each for loss in row]))
    assert_close(float(LanguageModeling(average="rows")(lm, batch).loss), fmean(map(fmean, each)))


def test_smoothing_gives_a_share_to_all_words(lm):
    batch = batch_of(lm.backbone.codec)
    said = batch.targets >= 0
    even = -lm(batch).log_softmax(-1).mean(-1)[said].mean()
    expected = 0.8 * LanguageModeling()(lm, batch).loss + 0.2 * even
    assert_close(LanguageModeling(label_smoothing=0.2)(lm, batch).loss, expected)


def source_losses(lm, row, soft):
    """Of the words of a row but the first, its soft tokens put in by hand."""
    words, heard, said = row.ids[: row.answers[0]], [], []
    for n, word in enumerate(words):
        heard += [*soft] * (n in row.slots)
        said.append(len(heard) - 1)
        heard.append(lm.backbone.embed(torch.tensor(word)))
    logits = lm.backbone.model(inputs_embeds=torch.stack(heard)[None]).logits[0].log_softmax(-1)
    return [-float(logits[at, word]) for at, word in zip(said[1:], words[1:], strict=True)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("family", CAUSAL)
def test_the_source_counts_as_much_as_it_is_told_to(lm, family, template, side):
    codec = type(lm.backbone.codec)(lm.backbone.codec.tokenizer, side)
    batch = batch_of(codec, template)
    outcome = LanguageModeling(source_weight=0.3)(lm, batch)
    each = [loss for row in batch.require_encoded() for loss in source_losses(lm, row, lm.prompt(batch).tokens[0])]
    assert_close(float(outcome.logs["source_loss"]), fmean(each), atol=1e-5, rtol=1e-5)
    assert outcome.logs["answer_loss"] == LanguageModeling()(lm, batch).loss
    assert_close(outcome.loss, outcome.logs["answer_loss"] + 0.3 * outcome.logs["source_loss"])
