"""Our prompt tuning against PEFT's, on the same weights: logits, loss and gradients of the prompt."""

from copy import deepcopy

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from tiny import CAUSAL, TEMPLATES, batch_of, encoded
from torch.testing import assert_close

from lightning_softprompt.lm import PromptedLM
from lightning_softprompt.objectives.language_modeling import LanguageModeling
from lightning_softprompt.types import IGNORE, SoftPrompt

P = 4
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
TEMPLATE = TEMPLATES["front"]


@pytest.fixture
def tokens(backbone):
    return torch.randn(P, backbone.hidden_size, requires_grad=True)


def peft_of(backbone, task, tokens):
    """PEFT's model around a copy, with our prompt. For encoder-decoders it allocates 2 P rows and reads the first P."""
    config = PromptTuningConfig(task_type=task, num_virtual_tokens=P)
    model = get_peft_model(deepcopy(backbone.model), config).eval()
    weight = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight[:P] = tokens
    return model, weight


def before_everything(batch):
    """PEFT puts its tokens before BOS, our template after it."""
    batch.slots[:] = 0
    return batch


def ours(backbone, batch, tokens):
    lm = PromptedLM(backbone, lambda _: SoftPrompt(tokens=tokens[None]))
    return lm(batch), LanguageModeling()(lm, batch).loss


@pytest.mark.parametrize("family", CAUSAL)
def test_causal_models_agree(backbone, tokens):
    model, weight = peft_of(backbone, "CAUSAL_LM", tokens)
    for row in encoded(backbone.codec, TEMPLATE):
        ids, answers = torch.tensor([row.ids]), torch.tensor(row.answers)
        labels = torch.full_like(ids, IGNORE)
        labels[0, answers] = torch.tensor(row.targets)
        theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
        logits, loss = ours(backbone, before_everything(backbone.codec.collate([row])), tokens)
        assert_close(logits, theirs.logits[:, P + answers - 1], **CLOSE)
        assert_close(loss, theirs.loss, **CLOSE)
        (gradient,) = torch.autograd.grad(loss, tokens)
        assert_close(gradient, torch.autograd.grad(theirs.loss, weight)[0], **CLOSE)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders_agree(backbone, tokens):
    model, weight = peft_of(backbone, "SEQ_2_SEQ_LM", tokens)
    for row in encoded(backbone.codec, TEMPLATE):
        ids = torch.tensor([row.ids])
        theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([row.targets]))
        logits, loss = ours(backbone, before_everything(backbone.codec.collate([row])), tokens)
        assert_close(logits, theirs.logits, **CLOSE)
        assert_close(loss, theirs.loss, **CLOSE)
        (gradient,) = torch.autograd.grad(loss, tokens)
        (their_gradient,) = torch.autograd.grad(theirs.loss, weight)
        assert_close(gradient, their_gradient[:P], **CLOSE)
        assert not their_gradient[P:].any()


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_padding_on_the_left_changes_their_logits_and_not_ours(backbone, tokens):
    """Their soft tokens stand before the padding, so that positions of padded rows have a gap in them."""
    model, _ = peft_of(backbone, "CAUSAL_LM", tokens)
    rows = encoded(backbone.codec, TEMPLATE)
    padded, _ = ours(backbone, before_everything(batch_of(backbone.codec, TEMPLATE)), tokens)
    errors = []
    for b, row in enumerate(rows):
        ids = torch.tensor([row.ids])
        gap = torch.zeros(1, 5, dtype=torch.long)
        mask = torch.cat([gap, torch.ones_like(ids)], 1)
        said = model(input_ids=torch.cat([gap + backbone.codec.pad_id, ids], 1), attention_mask=mask).logits
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        places = P + torch.tensor(row.answers) - 1
        errors.append((said[:, 5 + places] - alone[:, places]).abs().max())
        assert_close(padded[b : b + 1, : len(places)], alone[:, places], **CLOSE)
    assert min(errors) > 0.1  # 2 to 4, where logits have a standard deviation of 1.4
