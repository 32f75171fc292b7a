"""Attention kernels against their plain form, and that against PyTorch's own attention and gradients."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lightning_softprompt.backbones.kernels.attention import (
    attend,
    attend_backward,
    cuda,
    cuda_backward,
    plain,
    plain_backward,
)

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


def on(device, dtype, parts):
    return [None if part is None else part.to(device, dtype if part.is_floating_point() else None) for part in parts]


def test_the_cuda_kernel_is_called_as_it_wants_to_be(case):
    grad, parts, how = case
    *parts, grad, mask = on("meta", torch.float32, [*parts, grad, how["mask"]])  # shapes without numbers
    out, lse = cuda(*parts, how["causal"], how["scale"], mask)
    grads = cuda_backward(grad, *parts, out, lse, how["causal"], how["scale"], mask)
    assert (out.shape, lse.shape) == (grad.shape, grad.shape[:3])
    assert [g.shape for g in grads] == [part.shape for part in parts]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_kernel_and_plain_form_agree(case, dtype):
    grad, parts, how = case
    *parts, grad, mask = on("cuda", dtype, [*parts, grad, how["mask"]])
    how = {**how, "mask": mask}
    ours, theirs = attend(parts, **how), plain(*parts, *how.values())
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(ours, theirs, **close)
    grads = attend_backward(grad, [*parts, *ours], **how)
    torch.testing.assert_close(grads, plain_backward(grad, *parts, *theirs, *how.values()), **close)
