"""Attention kernels compared with their plain form, and the plain form with the attention of PyTorch."""

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
    """Grouped heads: six for queries, two for keys."""
    queries, keys, causal = CASES[request.param]
    shapes = ((6, queries), (2, keys), (2, keys), (6, queries))
    query, key, value, grad = (torch.randn(2, heads, size, 8, dtype=torch.float64) for heads, size in shapes)
    mask = None
    if request.param == "masked":
        mask = torch.rand(2, 1, queries, keys) > 0.5
        mask[..., 0] = True
    return grad, [query, key, value], {"causal": causal, "scale": 0.3, "mask": mask}


def test_kernel_and_plain_form_agree(case):
    grad, parts, options = case
    ours, theirs = attend(parts, **options), plain(*parts, *options.values())
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    grads = attend_backward(grad, [*parts, *ours], **options)
    torch.testing.assert_close(grads, plain_backward(grad, *parts, *theirs, *options.values()), rtol=1e-10, atol=1e-10)


def test_plain_form_equals_attention_of_pytorch(case):
    grad, parts, options = case
    parts = [part.requires_grad_() for part in parts]
    out = scaled_dot_product_attention(
        *parts, attn_mask=options["mask"], is_causal=options["causal"], scale=options["scale"], enable_gqa=True
    )
    out.backward(grad)
    detached = [part.detach() for part in parts]
    ours, lse = plain(*detached, *options.values())
    torch.testing.assert_close(ours, out.detach())
    torch.testing.assert_close(
        plain_backward(grad, *detached, ours, lse, *options.values()), [part.grad for part in parts]
    )


def on(device, dtype, parts):
    return [None if part is None else part.to(device, dtype if part.is_floating_point() else None) for part in parts]


def test_the_cuda_kernel_is_called_with_valid_shapes(case):
    grad, parts, options = case
    *parts, grad, mask = on("meta", torch.float32, [*parts, grad, options["mask"]])  # shapes without numbers
    out, lse = cuda(*parts, options["causal"], options["scale"], mask)
    grads = cuda_backward(grad, *parts, out, lse, options["causal"], options["scale"], mask)
    assert (out.shape, lse.shape) == (grad.shape, grad.shape[:3])
    assert [g.shape for g in grads] == [part.shape for part in parts]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_kernel_and_plain_form_agree(case, dtype):
    grad, parts, options = case
    *parts, grad, mask = on("cuda", dtype, [*parts, grad, options["mask"]])
    options = {**options, "mask": mask}
    ours, theirs = attend(parts, **options), plain(*parts, *options.values())
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(ours, theirs, **close)
    grads = attend_backward(grad, [*parts, *ours], **options)
    torch.testing.assert_close(grads, plain_backward(grad, *parts, *theirs, *options.values()), **close)
