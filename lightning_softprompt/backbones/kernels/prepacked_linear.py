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
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lightning_softprompt.core.backbone_spec import LinearBackend

log = logging.getLogger(__name__)
_plain: ContextVar[bool] = ContextVar("plain", default=False)
WIDE = 256  # below, calls cost more than products
MIN_SPEEDUP = 1.15  # times faster


def prepack(model: nn.Module, compute: LinearBackend, hidden_size: int) -> bool:
    """Reorders the weights of linear layers for oneDNN if that is requested or faster; returns whether it did.

    Layers on another device or in another precision than float32 are unchanged.

    Raises:
        ValueError: If the requested products need instructions that this CPU, or a library that this PyTorch, lacks.
    """
    if compute == "plain" or (compute == "auto" and (hidden_size < WIDE or not is_faster_here())):
        return False
    dtype = torch.bfloat16 if compute == "bf16" else torch.float32
    if not is_supported(dtype):
        raise ValueError(
            f"backbone.linear_backend={compute} requires oneDNN products in {str(dtype).removeprefix('torch.')}, which this "
            f"CPU ({cpu_name()}, {torch.backends.cpu.get_cpu_capability()}) does not run. Set --backbone.linear_backend auto"
        )
    for layer in model.modules():
        if type(layer) is nn.Linear and layer is not model.get_output_embeddings():  # type: ignore[operator]
            layer.forward = Prepacked(layer, dtype)  # type: ignore[method-assign, assignment]
    kind = ", in bfloat16" if compute == "bf16" else ""
    log.info("frozen weights are laid out for oneDNN%s (backbone.linear_backend=plain switches it off)", kind)
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
            self.packed = pack_weight(cast), pack_weight(cast.t()), None if bias is None else bias.to(self.dtype)
        out = FrozenLinear.apply(rows.flatten(0, -2), *self.packed)
        return out.view(*rows.shape[:-1], out.shape[-1])  # out here, where models may change the result in place


class FrozenLinear(torch.autograd.Function):
    """A product with frozen weights, of which only the input has a gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, forth: Tensor, back: Tensor, bias: Tensor | None) -> Tensor:
        """[R, in] -> [R, out], in the precision of the input."""
        ctx.back = back
        return product(rows.to(forth.dtype), forth, bias).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """[R, out] -> [R, in]."""
        return product(grad.contiguous().to(ctx.back.dtype), ctx.back).to(grad.dtype), None, None, None


def pack_weight(weight: Tensor) -> Tensor:
    """A weight [out, in] in oneDNN's layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)  # type: ignore[no-any-return]


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., in] -> [..., out] with a weight that is laid out."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")  # type: ignore[no-any-return]


@cache
def is_supported(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of this precision here, which a small product shows.

    Instruction sets differ between CPUs and can be lowered by environment variables, so they are not looked up by name.
    """
    try:
        product(torch.zeros(2, 16, dtype=dtype), pack_weight(torch.zeros(16, 16, dtype=dtype)))
    except (RuntimeError, AttributeError):  # instructions that the CPU lacks, or a PyTorch built without oneDNN
        return False
    return True


def is_faster_here(file: Path | None = None) -> bool:
    """Whether oneDNN is faster here, measured once per machine and cached, so that repeated runs take the same path."""
    file = file or user_cache_path("lightning-softprompt") / "compute.json"
    key = f"{platform.machine()} {cpu_name()} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__}"
    known = read_gains(file)
    if key not in known:
        known[key] = round(gain(), 3)
        write_gains(file, known)
    return known[key] > MIN_SPEEDUP


def read_gains(file: Path) -> dict[str, float]:
    """The measured gains by machine; empty if the file is missing or damaged, since they can be measured again."""
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    is_valid = isinstance(known, dict) and all(isinstance(value, float | int) for value in known.values())
    return known if is_valid else {}


def write_gains(file: Path, known: dict[str, float]) -> None:
    """Replaces the file as a whole. A folder that is not writable is reported and costs one measurement per run."""
    draft = file.with_suffix(f".{time.monotonic_ns()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(known, indent=2))
        draft.replace(file)
    except OSError as error:
        log.info("the measured speed of products is not cached: %s", error)


def cpu_name() -> str:
    """The processor as Linux names it; elsewhere as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def gain() -> float:
    """How many times faster oneDNN's float32 product is than PyTorch's own; 0 if it is not supported."""
    if not is_supported(torch.float32):
        return 0.0
    rows, weight = torch.randn(512, 576), torch.randn(1536, 576)
    packed = pack_weight(weight)
    ways: list[Callable[[], Tensor]] = [partial(linear, rows, weight), partial(product, rows, packed)]
    plain, ours = (min(seconds(way) for _ in range(10)) for way in ways)
    return plain / ours


def seconds(call: Callable[[], Tensor]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
