"""Questions and trained methods for tests of objectives that learn from sampled answers."""

from dataclasses import dataclass

import torch

from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.data.prompts import PromptDataModule
from lightning_softprompt.rewards.base import Reward

QUESTIONS = [{"prompt": text} for text in ("a dog is", "this film was", "it is a sad story", "the story")]


@dataclass(frozen=True)
class FirstTokens(Reward):
    """1 for an answer whose first token is in the first half of the vocabulary, else 0."""

    value: float = 1.0

    def __call__(self, lm, batch):
        return self.value * (batch.targets[:, 0] < 22).float()


def make_questions(folder, rows=QUESTIONS, **arguments):
    """Returns a data module of questions with the tokenizer of a tiny model."""
    defaults = {
        "backbone": BackboneSpec(name=str(folder)), "train": rows, "validation": rows, "cache": False, "batch_size": 3,
        "template": "{soft}{prompt} :{target}", "max_target_tokens": 6, "max_tokens": 40,
    }  # fmt: skip
    return PromptDataModule(**defaults | arguments)


def make_method(cls, backbone, objective, **arguments):
    """Returns a method on a backbone, at the start of a training."""
    method = cls(objective=objective, **arguments)
    method.attach(backbone, seed=1)
    method.start_values.remember()
    return method


def change(method, scale=0.3, seed=2):
    """Changes the trained values, as training does."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in method.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
