"""Gated perceptrons compared with the perceptrons of the models and with finite differences."""

from copy import deepcopy

import pytest
import torch
from tiny import batch_of
from torch.testing import assert_close
from transformers import GemmaConfig, LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP

from lightning_softprompt.backbones.kernels.gated_mlp import GatedUnit, use_lean_gated_mlp
from lightning_softprompt.core.types import SoftPrompt

SIZES = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 3}


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_it_computes_what_the_model_computes(dtype, error, trained):
    model = LlamaMLP(LlamaConfig(**SIZES)).to(dtype).requires_grad_(trained)
    ours = deepcopy(model)
    assert use_lean_gated_mlp(ours) == 1
    hidden = torch.randn(2, 5, 12, dtype=dtype).requires_grad_()
    results = []
    for module in (ours, model):
        leaves = [hidden, *(module.parameters() if trained else ())]
        out = module(hidden)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert_close(*results, rtol=error, atol=error)


def test_its_gradient_equals_finite_differences():
    both = [torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(GatedUnit.apply, both)


def test_a_perceptron_that_computes_something_else_is_not_changed():
    assert use_lean_gated_mlp(GemmaMLP(GemmaConfig(**SIZES, hidden_activation="gelu_pytorch_tanh"))) == 0
    assert use_lean_gated_mlp(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.SiLU())) == 0


@pytest.mark.parametrize("family", ["llama"])
def test_backbones_use_them_and_save_a_third_less_for_the_backward_pass(family, load):
    backbone, saved = load(family), []
    assert use_lean_gated_mlp(backbone.model) == 0  # all are replaced already
    tokens, batch = backbone.embed(torch.tensor([[7, 8]])).requires_grad_(), batch_of(backbone.codec)
    inner = backbone.model.config.intermediate_size

    def pack(tensor):
        saved.append(tensor.numel() * (tensor.dim() == 3 and tensor.shape[2] == inner))  # weights have two axes
        return tensor

    def count_saved():
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            backbone(batch, SoftPrompt(tokens=tokens))
        return sum(saved)

    count_saved()  # the first run selects an execution path
    ours = count_saved()
    perceptrons = [module for module in backbone.modules() if "MLP" in type(module).__name__]
    for module in perceptrons:
        del module.forward
    assert ours * 3 == count_saved() * 2 > 0
