"""`current_prompt` returns the prompt of the moment without changing the training."""

from dataclasses import replace

import pytest
import torch
from tiny import CLASSES, batch_of

from lightning_softprompt.methods import IDPG, MPT, DePT, LoRA, PromptTuning
from lightning_softprompt.training.replicas import Replicas, ReplicaSpec


def test_it_is_the_prompt_without_dropout_and_gradient(load):
    backbone = load("llama")
    module = PromptTuning(length=3, prompt_dropout=0.5, backbone=backbone.spec)
    module.attach(backbone)
    module.train()
    state = torch.get_rng_state()
    tokens = module.current_prompt().tokens
    assert torch.equal(tokens[0], module.tokens)
    assert not tokens.requires_grad
    assert module.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("build", [lambda: IDPG(length=2, bottleneck=4), lambda: DePT(length=2, rank=2, max_tokens=5)])
def test_a_prompt_that_depends_on_the_row_requires_rows(build, load):
    backbone = load("llama")
    module = build()
    module.attach(backbone)
    module.train()
    with pytest.raises(ValueError, match=r"requires rows, current_prompt\(batch\)"):
        module.current_prompt()
    assert module.training
    batch = batch_of(backbone.codec)
    with torch.no_grad():
        assert torch.equal(module.current_prompt(batch).tokens, module.prompt(batch).tokens)


def test_each_task_has_its_prompt(load):
    backbone = load("llama")
    module = MPT(length=2, classes_by_task={"first": CLASSES, "second": CLASSES})
    module.attach(backbone)
    with torch.no_grad():
        for parameter in module.u.parameters():
            parameter.add_(torch.randn_like(parameter))
    batch = replace(batch_of(backbone.codec), task_ids=torch.tensor([0, 1, 1, 0]))
    tokens = module.current_prompt(batch).tokens
    for task in (0, 1):
        assert torch.equal(module.current_prompt(task=task).tokens[0], tokens[task])
    assert not torch.equal(tokens[0], tokens[1])


def test_a_method_without_a_prompt_has_an_empty_one(load):
    module = LoRA(rank=2)
    module.attach(load("llama"))
    assert module.current_prompt().tokens is None


def test_replicas_have_that_of_the_first(load):
    backbone = load("llama")
    replicas = Replicas(PromptTuning(length=2, backbone=backbone.spec), ReplicaSpec(2))
    replicas.replicas.attach(backbone, replicas.seeds)
    assert torch.equal(replicas.current_prompt().tokens[0], replicas.methods[0].tokens)
