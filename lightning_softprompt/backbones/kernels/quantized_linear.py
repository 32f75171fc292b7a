"""Frozen linear layers whose weights are held in 8 or 4 bits, by transformers' own quantisation configs.

A product takes its weight apart when it runs, forth and back, and keeps nothing of it: the gradient is that of the
weights as they are held, to the last bit but the order of sums, and a step holds one matrix in full at a time. The
packages' own products would not do: torchao's keeps every weight in full for the backward pass, and bitsandbytes'
int8 rounds the states that it multiplies, too.

The embeddings, the head and the norms stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding, linear, pad
from transformers import PreTrainedModel

from lightning_softprompt.core.backbone_spec import Quantization

log = logging.getLogger(__name__)
SCALE = 4  # bytes of a scale


@dataclass(frozen=True)
class Scheme:
    """A way of holding weights in few bits.

    Args:
        package: Whose it is.
        bits: Of a weight.
        block: How many weights share a scale; None means all of a row.
        config: Makes what transformers is to be given.
        apart: From a layer's weight and a precision to the weight [out, in] in that precision.
    """

    package: str
    bits: int
    block: int | None
    config: Callable[[], Any]
    dequantize: Callable[[Any, torch.dtype], Tensor]

    def bytes_of(self, weight: Tensor) -> int:
        """What a weight [out, in] takes when it is held so."""
        scales = len(weight) if self.block is None else -(-weight.numel() // self.block)
        return weight.numel() * self.bits // 8 + SCALE * scales


def _torchao_int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _torchao_apart(weight: Any, dtype: torch.dtype) -> Tensor:
    return weight.qdata.to(dtype).mul_(weight.scale.to(dtype))


def _bitsandbytes(**kind: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**kind)


def _rows_apart(weight: Any, dtype: torch.dtype) -> Tensor:
    return weight.data.to(dtype).mul_((weight.SCB.to(weight.device) / 127).to(dtype)[:, None])


def _blocks_apart(weight: Any, dtype: torch.dtype) -> Tensor:
    state = weight.quant_state
    if state.shape[-1] % state.blocksize:  # for which bitsandbytes 0.50 on a CPU gives other numbers, silently
        return _looked_up(weight.data, state).to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state).to(dtype)


def _looked_up(halves: Tensor, state: Any) -> Tensor:
    """The weight [out, in], two numbers of the code in a byte, and a scale to each block of the flat weight."""
    pairs = torch.stack([state.code.repeat_interleave(len(state.code)), state.code.repeat(len(state.code))], dim=1)
    count = state.shape.numel()
    values = embedding(halves.flatten().int(), pairs).flatten()[:count]
    blocks = pad(values, (0, -count % state.blocksize)).view(-1, state.blocksize) * state.absmax[:, None]
    return blocks.flatten()[:count].view(state.shape)


SCHEMES: dict[str, Scheme] = {
    "torchao-int8": Scheme("torchao", 8, None, _torchao_int8, _torchao_apart),
    "bitsandbytes-int8": Scheme(
        "bitsandbytes", 8, None, lambda: _bitsandbytes(load_in_8bit=True), _rows_apart
    ),
    "bitsandbytes-nf4": Scheme(
        "bitsandbytes", 4, 64, lambda: _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"), _blocks_apart
    ),
}  # fmt: skip


def quantization_config(kind: Quantization) -> Any:
    """What transformers is given to hold weights so.

    Raises:
        ValueError: If the package for it is missing, or does not run here.
    """
    scheme = SCHEMES[kind]
    if find_spec(scheme.package) is None:
        raise ValueError(
            f"backbone.quantization {kind} wants the package {scheme.package}; "
            f"pip install 'lightning-softprompt[quantized]'"
        )
    try:
        return scheme.config()
    except (ImportError, RuntimeError, OSError) as error:
        raise ValueError(f"backbone.quantization {kind}: {scheme.package} does not run here: {error}") from error


def refuse_with_quantized(kind: Quantization, compute: str, compiled: bool) -> None:
    """Refuses options that quantised weights cannot have.

    Raises:
        ValueError: Naming the option.
    """
    if compute not in ("auto", "plain"):
        raise ValueError(
            f"backbone.linear_backend {compute} lays float32 weights out beforehand, and backbone.quantization {kind} holds "
            f"none; leave one of them out"
        )
    if compiled:
        raise ValueError(
            f"backbone.compiled does not compile the products of backbone.quantization {kind}; leave one out"
        )


def use_exact_dequant_linear(model: nn.Module, kind: Quantization) -> dict[str, DequantLinear]:
    """Gives the quantised layers of a model our products; by the names of their weights.

    Raises:
        ValueError: If it has none.
    """
    scheme = SCHEMES[kind]
    found = {f"{name}.weight": module for name, module in model.named_modules() if is_quantized(module)}
    if not found:
        raise ValueError(
            f"backbone.quantization {kind}: no layer of {type(model).__name__} is held so, since it has no plain "
            f"linear layers; take another quantization, or none"
        )
    for module in found.values():
        module.forward = DequantLinear(module, scheme)
    log.info("%d matrices are held in %d bits by %s", len(found), scheme.bits, scheme.package)
    return {name: module.forward for name, module in found.items()}


def matrices(model: PreTrainedModel) -> list[Tensor]:
    """The weights of a model, not quantised yet, that would be."""
    head = model.get_output_embeddings()
    return [m.weight for m in model.modules() if type(m) is nn.Linear and m is not head]


def is_quantized(module: nn.Module) -> bool:
    """Whether a module's weight is a parameter of a package's own kind."""
    weight = module._parameters.get("weight")
    return weight is not None and type(weight) is not nn.Parameter


class DequantLinear:
    """The forward of a linear layer whose weight is quantised.

    Args:
        layer: The layer.
        scheme: How its weight is held.
    """

    def __init__(self, layer: nn.Module, scheme: Scheme) -> None:
        self.layer, self.scheme = layer, scheme

    def weight(self, dtype: torch.dtype) -> Tensor:
        """[out, in] in a precision."""
        return self.scheme.dequantize(self.layer.weight, dtype).detach()

    def __call__(self, rows: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return QuantizedLinear.apply(rows, self.weight, self.layer.bias)  # type: ignore[no-any-return]


class QuantizedLinear(torch.autograd.Function):
    """A product with frozen weights that are taken apart for it, of which only the input has a gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Callable[[torch.dtype], Tensor], bias: Tensor | None) -> Tensor:
        """[..., in] -> [..., out]."""
        ctx.weight, ctx.dtype = weight, rows.dtype
        return linear(rows, weight(rows.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """[..., out] -> [..., in]."""
        return (grad @ ctx.weight(grad.dtype)).to(ctx.dtype), None, None


def in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in which all is float32 but what is quantised, and the products of that, too."""
    copy = deepcopy(model)
    if not any(type(vars(module).get("forward")) is DequantLinear for module in copy.modules()):
        return copy.float()  # type: ignore[no-any-return]
    for tensor in (*copy.parameters(), *copy.buffers()):
        if tensor.is_floating_point() and type(tensor) in (nn.Parameter, Tensor):
            tensor.data = tensor.data.float()
    return copy
