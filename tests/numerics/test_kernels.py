"""Attention kernels against their plain form, and that against PyTorch's own attention and gradients."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lightning_softprompt.backbones.kernels import attend, attend_backward, plain, plain_backward

CASES = {"causal": (7, 7, True), "all": (5, 9, False), "masked": (6, 11, False)}


@pytest.fixture(params=CASES)
def case(request):
    """Grouped heads: six of the query, two of the keys."""
    queries, keys, causal = CASES[request.param]
    shapes = ((6, queries), (2, keys), (2, keys), (6, queries))
    query, key, value, grad = (torch.randn(2, heads, size, 8, dtype=torch.float64) for heads, size in shapes)
    mask = None
    if request.param == "masked":
        mask = torch.rand(2, 1, queries, keys) > 0.5
        mask[..., 0] = True
    return grad, [query, key, value], {"causal": causal, "scale": 0.3, "mask": mask}


def test_kernel_and_plain_form_agree(case):
    grad, parts, how = case
    ours, theirs = attend(parts, **how), plain(*parts, *how.values())
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    grads = attend_backward(grad, [*parts, *ours], **how)
    torch.testing.assert_close(grads, plain_backward(grad, *parts, *theirs, *how.values()), rtol=1e-10, atol=1e-10)


def test_plain_form_is_attention(case):
    grad, parts, how = case
    parts = [part.requires_grad_() for part in parts]
    out = scaled_dot_product_attention(
        *parts, attn_mask=how["mask"], is_causal=how["causal"], scale=how["scale"], enable_gqa=True
    )
    out.backward(grad)
    detached = [part.detach() for part in parts]
    ours, lse = plain(*detached, *how.values())
    torch.testing.assert_close(ours, out.detach())
    torch.testing.assert_close(plain_backward(grad, *detached, ours, lse, *how.values()), [part.grad for part in parts])
