"""Frozen norms compared with the norms of the models and with finite differences."""

from copy import deepcopy

import pytest
import torch
from tiny import batch_of
from torch.testing import assert_close
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lightning_softprompt.backbones.kernels.rms_norm import RootMeanSquareNorm, use_frozen_rms_norm
from lightning_softprompt.core.types import SoftPrompt


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str)
def test_it_computes_what_the_model_computes(dtype, error):
    model = LlamaRMSNorm(24, eps=1e-3).to(dtype).requires_grad_(False)
    model.weight.normal_()
    ours = deepcopy(model)
    assert use_frozen_rms_norm(ours) == 1
    hidden, grad = torch.randn(2, 5, 24, dtype=dtype).requires_grad_(), torch.randn(2, 5, 24, dtype=dtype)
    both = [(norm(hidden), torch.autograd.grad(norm(hidden), hidden, grad)) for norm in (ours, model)]
    assert_close(*both, rtol=error, atol=error)


def test_autocast_changes_nothing():
    hidden, weight = torch.randn(3, 64, requires_grad=True), torch.randn(64)
    exact = torch.autograd.grad(RootMeanSquareNorm.apply(hidden, weight, 1e-2).square().sum(), hidden)
    with torch.autocast("cpu", torch.bfloat16):
        cast = torch.autograd.grad(RootMeanSquareNorm.apply(hidden, weight, 1e-2).square().sum(), hidden)
    assert_close(cast, exact)


def test_a_model_that_mixes_precisions_runs(load):
    backbone = load("t5", dtype="float16")  # transformers keeps parts of T5 in float32
    assert backbone(batch_of(backbone.codec)).isfinite().all()


def test_its_gradient_equals_finite_differences():
    hidden, weight = torch.randn(3, 7, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: RootMeanSquareNorm.apply(x, weight, 1e-2), hidden)


def test_a_norm_that_computes_something_else_is_not_changed():
    assert use_frozen_rms_norm(GemmaRMSNorm(8)) == 0  # it adds one to its weight
    assert use_frozen_rms_norm(torch.nn.LayerNorm(8)) == 0


def test_an_unfrozen_weight_gets_a_gradient():
    norm = LlamaRMSNorm(8)
    use_frozen_rms_norm(norm)
    norm(torch.randn(2, 8)).sum().backward()
    assert norm.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_backbones_use_them_and_save_less(family, load):
    backbone, saved = load(family), []
    assert use_frozen_rms_norm(backbone.model) == 0  # all are replaced already
    tokens = backbone.embed(torch.tensor([[7, 8]])).requires_grad_()

    def pack(tensor):
        saved.append(tensor.nbytes)
        return tensor

    def count_saved():
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            backbone(batch_of(backbone.codec), SoftPrompt(tokens=tokens))
        return sum(saved)

    count_saved()  # the first run selects an execution path
    ours = count_saved()
    for module in backbone.modules():
        if "RMSNorm" in type(module).__name__ or "T5LayerNorm" in type(module).__name__:
            del module.forward
    assert ours < count_saved()


class GatedNorm(torch.nn.Module):
    """A norm as in state-space layers: plain without a gate, and another function with one."""

    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = torch.nn.Parameter(torch.ones(4)), 1e-6

    def forward(self, hidden, gate=None):
        hidden = hidden if gate is None else hidden * gate.sigmoid()
        return self.weight * hidden * (hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def test_a_norm_with_a_second_input_keeps_its_forward():
    norm = GatedNorm()
    assert use_frozen_rms_norm(norm) == 0
    assert norm(torch.ones(1, 4), torch.ones(1, 4)).shape == (1, 4)
