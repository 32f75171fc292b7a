"""Demonstrations as a prompt: initially in-context learning; loss and gradients equal PEFT's CPT; bounded updates."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from peft import CPTConfig, get_peft_model
from tiny import CAUSAL, CLASSES, TEMPLATES, batch_of, encode_rows
from torch.testing import assert_close

from lightning_softprompt.core.types import IGNORE, Classes
from lightning_softprompt.methods import ContextAware
from lightning_softprompt.objectives.language_modeling import LanguageModeling
from lightning_softprompt.prompts.demonstrations import FORMAT, INPUT, LABEL, SEAM

FAMILIES = CAUSAL
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
TYPES = {FORMAT: 1, INPUT: 2, LABEL: 4, SEAM: 0}


@pytest.fixture
def module(backbone):
    method = ContextAware(epsilon_input=0.3, epsilon_format=0.2, decay=0.9, backbone=backbone.spec, classes=CLASSES)
    method.attach(backbone)
    return method


def test_each_token_has_its_kind_and_weight(module):
    words = module.loaded.codec.tokenizer.convert_ids_to_tokens(module.context.ids)
    assert words == ["a", "funny", "dog", "it", "was", "good", "dull", "it", "was", "bad"]
    first = [INPUT, INPUT, INPUT, FORMAT, FORMAT, LABEL]
    second = [INPUT, FORMAT, FORMAT, LABEL]
    assert module.context.kinds.tolist() == first + second
    weights = [0.0] * 10
    weights[5], weights[9] = 0.9**2, 0.9  # of the labels
    assert_close(module.weights, torch.tensor(weights))


@torch.no_grad()
def test_an_untrained_prompt_is_in_context_learning(module, backbone):
    batch = batch_of(backbone.codec)
    shown = batch_of(backbone.codec, "a funny dog it was good dull it was bad {text} it was {target}")
    real = batch.targets != IGNORE
    assert_close(module(batch)[real], backbone(shown)[real], **CLOSE)


def test_loss_and_gradients_equal_those_of_peft(module, backbone):
    """The loss of PEFT is the mean over the tokens of all answers, and ours is a sum of two terms."""
    types = [TYPES[kind] for kind in module.context.kinds.tolist()]
    types[6:] = [kind + 4 if kind > 0 else kind for kind in types[6:]]  # of the second demonstration
    config = CPTConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=len(types), cpt_token_ids=module.context.ids.tolist(),
        cpt_mask=[1] * len(types), cpt_tokens_type_mask=types, opt_weighted_loss_type="decay",
        opt_loss_decay_factor=0.9, opt_projection_epsilon=0.3, opt_projection_format_epsilon=0.2,
    )  # fmt: skip
    model = get_peft_model(deepcopy(backbone.model), config).eval()
    delta = torch.randn(len(types), backbone.hidden_size) * 0.001  # within the bounds
    module.delta.data = delta.clone()
    model.prompt_encoder["default"].delta_embedding.weight.data = delta * (module.reach > 0)
    module.context = replace(module.context, start=())  # PEFT has nothing before the demonstrations
    module.train()
    for row in encode_rows(backbone.codec, TEMPLATES["front"]):
        batch = backbone.codec.collate([row])
        batch.slots[:] = 0
        module.zero_grad()
        model.zero_grad()
        lm = module.lm()
        answer_loss = LanguageModeling()(lm, batch).loss * len(row.targets)
        loss = answer_loss + lm.prompt(batch).penalties["context"]
        loss.backward()
        ids, answers = torch.tensor([row.ids]), torch.tensor(row.answers)
        labels, kinds = torch.full_like(ids, IGNORE), torch.ones_like(ids)
        labels[0, answers] = torch.tensor(row.targets)
        kinds[0, answers] = 4
        peft_output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, input_type_mask=kinds)
        count = len(row.targets) + 2
        assert_close(loss, peft_output.loss * count, **CLOSE)
        (peft_output.loss * count).backward()
        grad = model.prompt_encoder["default"].delta_embedding.weight.grad
        assert_close(module.delta.grad, grad, **CLOSE)


def test_each_step_is_bounded_and_labels_do_not_change(module, backbone):
    unit = (backbone.hidden_size / 2048) ** 0.5
    optimizer = module.configure_optimizers()
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    batch = batch_of(backbone.codec, labels=(0, 1, 1, 0))
    module.train()
    module.objective(module.lm(), batch).loss.backward()
    optimizer.step()
    moved = module.delta.norm(dim=1)
    reach = {INPUT: 0.3 * unit, FORMAT: 0.2 * unit, LABEL: 0.0, SEAM: 0.0}
    for distance, kind in zip(moved.tolist(), module.context.kinds.tolist(), strict=True):
        assert distance == pytest.approx(reach[kind], rel=1e-5)  # a learning rate of 1 exceeds every bound
    inside = module.delta.detach().clone() * 0.5
    module.delta.data = inside.clone()
    module.project()
    assert_close(module.delta.detach(), inside)


def test_missing_demonstrations_and_other_backbones_are_rejected(backbone, load):
    for classes in (None, Classes(CLASSES.words, CLASSES.template)):
        with pytest.raises(ValueError, match=r"set data\.demonstrations"):
            ContextAware(backbone=backbone.spec, classes=classes).attach(backbone)
    bert = load("bert")
    with pytest.raises(ValueError, match="requires a decoder-only backbone"):
        ContextAware(backbone=bert.spec, classes=CLASSES).attach(bert)
