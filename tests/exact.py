"""Shared by the tests of exactness: batches in float64, where no loose tolerance hides an error."""

import torch
from torch.nn.functional import cross_entropy

from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import IGNORE, SoftPrompt

EXACT = {"rtol": 1e-9, "atol": 1e-9}
TEMPLATES = {
    "front": "{soft}{text} it is {target}",
    "middle": "the film {text}{soft} it is {target}",
    "instruction before": "is this film good ? {soft}{text} it is {target}",
    "end": "{text} it is{soft}{target}",
}


def batch_of(backbone, template, texts, targets=None):
    template = Template(template)
    targets = targets or ["good", "bad", "one"] * len(texts)
    rows = [backbone.codec.encode(template.pieces({"text": t}), y) for t, y in zip(texts, targets, strict=False)]
    return backbone.codec.collate(rows)


def loss_and_gradients(backbone, batch, tokens, shift=None):
    leaves = [t.clone().requires_grad_() for t in (tokens, shift) if t is not None]
    prompt = SoftPrompt(tokens=leaves[0], shift=leaves[1] if shift is not None else None)
    logits = backbone(batch, prompt)
    loss = cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
    loss.backward()
    return logits.detach()[batch.targets != IGNORE], loss.detach(), [leaf.grad for leaf in leaves]


def rms_norm(module, hidden):
    return module.weight * hidden * (hidden.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()


def saved_bytes(step):
    """Return the bytes that a step saves for the backward pass, without the weights, and the result of the step."""
    sizes = {}  # each storage counts once

    def keep(tensor):
        if not tensor.is_leaf or tensor.requires_grad:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = step()
    return sum(sizes.values()), result
