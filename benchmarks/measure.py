"""Measures seconds, floating-point operations and bytes of a call."""

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


def measure_seconds(call: Call) -> float:
    """Measures a call, including its work on a GPU."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def count_flops(call: Call) -> int:
    """Counts the floating-point operations of matrix products. PyTorch does not count CPU attention."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def count_saved_bytes(call: Call) -> int:
    """Counts the bytes of distinct storages that a call saves for the backward pass, without weights."""
    bytes_by_storage: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf or tensor.requires_grad:
            storage = tensor.untyped_storage()
            bytes_by_storage[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        call()
    return sum(bytes_by_storage.values())


def measure_peak_bytes(call: Call) -> int:
    """Measures the peak memory of a call, minus the memory in use before it, of the GPU or else of the process."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    CLEAR.write_text("5")  # Linux: resets the peak
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def measure_peak_rate(linear_backend: str, dtype: torch.dtype, device: torch.device) -> float:
    """Measures the floating-point operations per second of the fastest matrix product of the size of a layer.

    No run on this machine can exceed it.
    """
    big = 4 if device.type == "cuda" else 1
    rows, weight = (torch.randn(big * n, big * 576, device=device, dtype=dtype) for n in (2048, 1536))
    multiply: Call = lambda: linear(rows, weight)  # noqa: E731
    if linear_backend == "bf16":
        rows, weight = rows.bfloat16(), weight.bfloat16()
    if linear_backend != "plain":
        packed = pack_weight(weight)
        multiply = lambda: product(rows, packed)  # noqa: E731
    return 2 * rows.numel() * len(weight) / min(measure_seconds(multiply) for _ in range(30))
