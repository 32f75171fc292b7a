"""Seconds, floating-point operations and bytes of a call."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from lightning_softprompt.backbones.kernels.prepacked_linear import pack_weight, product

Call = Callable[[], object]
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def seconds(call: Call) -> float:
    """Of one call, till a GPU is done with it."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def flops(call: Call) -> int:
    """Floating-point operations of matrix products; PyTorch counts none of CPU attention."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def saved_bytes(call: Call) -> int:
    """Bytes of distinct storages kept for the backward pass, weights left out."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf or tensor.requires_grad:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(kept.values())


def peak_bytes(call: Call) -> int:
    """The most memory that a call takes above what was held before it: the GPU's, or the process's."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    CLEAR.write_text("5")  # Linux: the peak is counted anew
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def rate(linear_backend: str, dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of this machine's best product of layers' size: what no run can exceed."""
    big = 4 if device.type == "cuda" else 1
    rows, weight = (torch.randn(big * n, big * 576, device=device, dtype=dtype) for n in (2048, 1536))
    way: Call = lambda: linear(rows, weight)  # noqa: E731
    if linear_backend == "bf16":
        rows, weight = rows.bfloat16(), weight.bfloat16()
    if linear_backend != "plain":
        packed = pack_weight(weight)
        way = lambda: product(rows, packed)  # noqa: E731
    return 2 * rows.numel() * len(weight) / min(seconds(way) for _ in range(30))
