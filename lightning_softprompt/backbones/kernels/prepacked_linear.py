"""Frozen linear layers whose weights are packed once for the CPU's matrix products.

PyTorch's float32 products use MKL, which takes a slow path on CPUs that are not made by Intel; oneDNN does not. Weights
that never change can be packed in its layout once, for the forward and for the backward product. The arithmetic is
float32 as before, with another order of sums. The weights take three times the memory.

In bfloat16, the products are twice as fast again on CPUs that support it. This is an approximation: everything except
the products stays in float32.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lightning_softprompt.core.backbone_spec import LinearBackend
from lightning_softprompt.system.atomic_files import write_if_possible
from lightning_softprompt.system.cache_dirs import cache_folder
from lightning_softprompt.system.processor import cpu_name

log = logging.getLogger(__name__)
_plain: ContextVar[bool] = ContextVar("plain", default=False)
WIDE = 256  # below, calls cost more than products
MIN_SPEEDUP = 1.15  # times faster


def prepack(model: nn.Module, linear_backend: LinearBackend, hidden_size: int) -> bool:
    """Packs the weights of linear layers for oneDNN if that is requested or faster, and returns whether it did.

    Layers on another device or in another precision than float32 are unchanged.

    Raises:
        ValueError: If the requested products need instructions that this CPU, or a library that this PyTorch, lacks.
    """
    if linear_backend == "plain":
        return False
    if linear_backend == "auto" and (hidden_size < WIDE or not is_faster_here()):
        return False
    dtype = torch.bfloat16 if linear_backend == "bf16" else torch.float32
    if not is_supported(dtype):
        precision = str(dtype).removeprefix("torch.")
        cpu = f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"
        raise ValueError(
            f"backbone.linear_backend={linear_backend} requires oneDNN products in {precision}, which this CPU ({cpu}) "
            "does not run. Set --backbone.linear_backend auto"
        )
    for layer in model.modules():
        if type(layer) is nn.Linear and layer is not model.get_output_embeddings():  # type: ignore[operator]
            layer.forward = Prepacked(layer, dtype)  # type: ignore[method-assign, assignment]
    precision = ", in bfloat16" if linear_backend == "bf16" else ""
    log.info(
        "Frozen weights are packed for faster products on this CPU%s; --backbone.linear_backend plain disables it",
        precision,
    )
    return True


@contextmanager
def plain_products() -> Iterator[None]:
    """Uses PyTorch's own products, in the precision of the weights, within the context."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


class Prepacked:
    """The forward function of a frozen linear layer, whose weights are packed at the first use.

    Args:
        layer: The layer.
        dtype: Precision of its products.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype = torch.float32) -> None:
        self.layer = layer
        self.dtype = dtype
        self.packed: tuple[Tensor, Tensor, Tensor | None] | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        weight, bias = self.layer.weight, self.layer.bias
        is_float32 = rows.dtype == torch.float32 and weight.dtype == torch.float32
        if _plain.get() or not is_float32 or rows.device.type != "cpu":
            return linear(rows, weight, bias)
        if self.packed is None:
            cast = weight.detach().to(self.dtype)
            cast_bias = None if bias is None else bias.to(self.dtype)
            self.packed = pack_weight(cast), pack_weight(cast.t()), cast_bias
        out = FrozenLinear.apply(rows.flatten(0, -2), *self.packed)
        return out.view(
            *rows.shape[:-1], out.shape[-1]
        )  # outside of autograd's function: models may change it in place


class FrozenLinear(torch.autograd.Function):
    """A product with frozen weights. Only the input has a gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, transposed: Tensor, bias: Tensor | None) -> Tensor:
        """[R, in] -> [R, out], in the precision of the input."""
        ctx.transposed = transposed
        return product(rows.to(weight.dtype), weight, bias).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """[R, out] -> [R, in]."""
        weight = ctx.transposed
        of_rows = product(grad.contiguous().to(weight.dtype), weight)
        return of_rows.to(grad.dtype), None, None, None


def pack_weight(weight: Tensor) -> Tensor:
    """Packs a weight [out, in] in oneDNN's layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)  # type: ignore[no-any-return]


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., in] -> [..., out] with a packed weight."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")  # type: ignore[no-any-return]


@cache
def is_supported(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of this precision on this CPU, tested with a small product.

    Names of instruction sets would not answer it: environment variables can disable some of them.
    """
    try:
        product(torch.zeros(2, 16, dtype=dtype), pack_weight(torch.zeros(16, 16, dtype=dtype)))
    except (RuntimeError, AttributeError):  # instructions that the CPU lacks, or a PyTorch built without oneDNN
        return False
    return True


def is_faster_here(file: Path | None = None) -> bool:
    """Whether oneDNN is faster on this machine; measured once and cached, so that all runs use the same path."""
    file = file or cache_folder() / "compute.json"
    cpu = f"{cpu_name()} {torch.backends.cpu.get_cpu_capability()}"
    key = f"{platform.machine()} {cpu} torch {torch.__version__}"
    known = read_gains(file)
    if key not in known:
        known[key] = round(gain(), 3)
        write_gains(file, known)
    return known[key] > MIN_SPEEDUP


def read_gains(file: Path) -> dict[str, float]:
    """Returns the measured gains by machine. If the file is missing or damaged, they are measured again."""
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    is_valid = isinstance(known, dict) and all(isinstance(value, float | int) for value in known.values())
    return known if is_valid else {}


def write_gains(file: Path, known: dict[str, float]) -> None:
    """Replaces the file atomically. A failure is only logged: each run then measures again."""
    write_if_possible(file, lambda draft: draft.write_text(json.dumps(known, indent=2)))


def gain() -> float:
    """Measures how many times faster oneDNN's float32 product is than PyTorch's; 0 if it is not supported."""
    if not is_supported(torch.float32):
        return 0.0
    rows, weight = torch.randn(512, 576), torch.randn(1536, 576)
    packed = pack_weight(weight)
    plain = min(seconds(partial(linear, rows, weight)) for _ in range(10))
    prepacked = min(seconds(partial(product, rows, packed)) for _ in range(10))
    return plain / prepacked


def seconds(call: Callable[[], Tensor]) -> float:
    """Measures one call, in seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
