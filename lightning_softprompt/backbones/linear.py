"""Frozen linear layers with their weights laid out once for the CPU's matrix products.

PyTorch's float32 products go through MKL, which takes a slow path on CPUs of another maker than its own; oneDNN does
not, and weights that never change can be brought into its layout once, for the forward and for the backward product.
Same float32 arithmetic, another order of sums. It holds the weights three times.

The same in bfloat16 is twice as fast again where the CPU multiplies it, and an approximation: everything but the
products stays float32.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from platformdirs import user_cache_path
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

log = logging.getLogger(__name__)
Compute = Literal["auto", "plain", "prepacked", "bf16"]
_plain: ContextVar[bool] = ContextVar("plain", default=False)
WIDE = 256  # below, calls cost more than products
PAYS = 1.15  # times faster


def prepack(model: nn.Module, compute: Compute, hidden_size: int) -> bool:
    """Lays out the weights of a model's linear layers, where it is asked for or pays; gives whether it did.

    Layers on another device or in another precision than float32 run as they would have.
    """
    if compute == "plain" or (compute == "auto" and (hidden_size < WIDE or not pays())):
        return False
    dtype = torch.bfloat16 if compute == "bf16" else torch.float32
    for layer in model.modules():
        if type(layer) is nn.Linear and layer is not model.get_output_embeddings():  # type: ignore[operator]
            layer.forward = Prepacked(layer, dtype)  # type: ignore[method-assign, assignment]
    kind = ", in bfloat16" if compute == "bf16" else ""
    log.info("frozen weights are laid out for oneDNN%s (backbone.compute=plain switches it off)", kind)
    return True


@contextmanager
def plain_products() -> Iterator[None]:
    """Within it, all products are PyTorch's own, in the precision of the weights."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


class Prepacked:
    """The forward of a frozen linear layer, its weights laid out when first used.

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
        if _plain.get() or rows.dtype != torch.float32 or weight.dtype != torch.float32 or rows.device.type != "cpu":
            return linear(rows, weight, bias)
        if self.packed is None:
            cast = weight.detach().to(self.dtype)
            self.packed = laid_out(cast), laid_out(cast.t()), None if bias is None else bias.to(self.dtype)
        return FrozenLinear.apply(rows, *self.packed)


class FrozenLinear(torch.autograd.Function):
    """A product with frozen weights, of which only the input has a gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, forth: Tensor, back: Tensor, bias: Tensor | None) -> Tensor:
        """[..., in] -> [..., out], in the precision of the input."""
        ctx.back = back
        return product(rows.to(forth.dtype), forth, bias).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """[..., out] -> [..., in]."""
        return product(grad.contiguous().to(ctx.back.dtype), ctx.back).to(grad.dtype), None, None, None


def laid_out(weight: Tensor) -> Tensor:
    """A weight [out, in] in oneDNN's layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)  # type: ignore[no-any-return]


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., in] -> [..., out] with a weight that is laid out."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def pays(file: Path | None = None) -> bool:
    """Whether oneDNN is faster here, measured once a machine and then remembered, so that runs repeat each other."""
    file = file or user_cache_path("lightning-softprompt") / "compute.json"
    key = f"{platform.machine()} {cpu_name()} torch {torch.__version__}"
    known: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
    if key not in known:
        known[key] = round(gain(), 3)
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(f".{time.monotonic_ns()}")
        draft.write_text(json.dumps(known, indent=2))
        draft.replace(file)
    return known[key] > PAYS


def cpu_name() -> str:
    """The processor as Linux names it; elsewhere as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def gain() -> float:
    """How many times faster oneDNN's float32 product is than PyTorch's own; 0 where it is not to be had."""
    if not torch.backends.mkldnn.is_available():
        return 0.0
    rows, weight = torch.randn(512, 576), torch.randn(1536, 576)
    packed = laid_out(weight)
    ways: list[Callable[[], Tensor]] = [partial(linear, rows, weight), partial(product, rows, packed)]
    plain, ours = (min(seconds(way) for _ in range(10)) for way in ways)
    return plain / ours


def seconds(call: Callable[[], Tensor]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
