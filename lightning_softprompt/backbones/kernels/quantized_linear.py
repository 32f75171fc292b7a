"""Frozen linear layers whose weights are quantized to 8 or 4 bits, by transformers' own quantization configs.

A product dequantizes its weight when it runs, in the forward and in the backward pass, and then frees it. The gradient
is exactly that of the quantized weights, up to the order of sums, and a step holds one full matrix at a time. The
packages' own products do not have these properties: torchao's keeps every full weight for the backward pass, and
bitsandbytes' int8 product also rounds the states that it multiplies.

The embeddings, the head and the norms are not quantized.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
    """A quantization of weights.

    Args:
        package: The package that implements it.
        bits: Bits of a weight.
        block: Number of weights that share a scale; None if all weights of a row do.
        config: Creates the quantization config of transformers.
        dequantize: Computes the weight [out, in] in a precision from a layer's quantized weight.
    """

    package: str
    bits: int
    block: int | None
    config: Callable[[], Any]
    dequantize: Callable[[Any, torch.dtype], Tensor]

    def bytes_of(self, weight: Tensor) -> int:
        """Returns the bytes of a weight [out, in] when it is quantized."""
        scales = len(weight) if self.block is None else -(-weight.numel() // self.block)
        return weight.numel() * self.bits // 8 + SCALE * scales


def _create_torchao_config() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _dequantize_torchao(weight: Any, dtype: torch.dtype) -> Tensor:
    return weight.qdata.to(dtype).mul_(weight.scale.to(dtype))


def _create_bitsandbytes_config(**options: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


def _dequantize_rows(weight: Any, dtype: torch.dtype) -> Tensor:
    scales = weight.SCB.to(weight.device) / 127  # [out]
    return weight.data.to(dtype).mul_(scales.to(dtype)[:, None])


def _dequantize_blocks(weight: Any, dtype: torch.dtype) -> Tensor:
    state = weight.quant_state
    if state.shape[-1] % state.blocksize:  # bitsandbytes 0.50 silently computes wrong values for these on a CPU
        return _dequantize_by_table(weight.data, state).to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state).to(dtype)


def _dequantize_by_table(packed: Tensor, state: Any) -> Tensor:
    """Computes the weight [out, in]: a byte holds two codes, and each block of the flat weight has a scale."""
    codes = len(state.code)
    high, low = state.code.repeat_interleave(codes), state.code.repeat(codes)
    pairs = torch.stack([high, low], dim=1)  # the two values of each byte
    count = state.shape.numel()
    values = embedding(packed.flatten().int(), pairs).flatten()[:count]
    missing = -count % state.blocksize
    blocks = pad(values, (0, missing)).view(-1, state.blocksize)
    scaled = blocks * state.absmax[:, None]
    return scaled.flatten()[:count].view(state.shape)


_INT8 = partial(_create_bitsandbytes_config, load_in_8bit=True)
_NF4 = partial(_create_bitsandbytes_config, load_in_4bit=True, bnb_4bit_quant_type="nf4")
SCHEMES: dict[str, Scheme] = {
    "torchao-int8": Scheme("torchao", 8, None, _create_torchao_config, _dequantize_torchao),
    "bitsandbytes-int8": Scheme("bitsandbytes", 8, None, _INT8, _dequantize_rows),
    "bitsandbytes-nf4": Scheme("bitsandbytes", 4, 64, _NF4, _dequantize_blocks),
}


def quantization_config(kind: Quantization) -> Any:
    """Returns the quantization config of transformers.

    Raises:
        ValueError: If the package for it is missing, or does not run here.
    """
    scheme = SCHEMES[kind]
    if find_spec(scheme.package) is None:
        raise ValueError(
            f"backbone.quantization {kind} requires the package {scheme.package}; "
            f"pip install 'lightning-softprompt[quantized]'"
        )
    try:
        return scheme.config()
    except (ImportError, RuntimeError, OSError) as error:
        raise ValueError(f"backbone.quantization {kind}: {scheme.package} does not run here: {error}") from error


def refuse_with_quantized(kind: Quantization, linear_backend: str, compiled: bool) -> None:
    """Refuses options that do not support quantized weights.

    Raises:
        ValueError: Naming the option.
    """
    if linear_backend not in ("auto", "plain"):
        raise ValueError(
            f"backbone.linear_backend {linear_backend} packs float32 weights, and backbone.quantization {kind} stores "
            "none; remove one of the two options"
        )
    if compiled:
        raise ValueError(
            f"backbone.compiled does not compile the products of backbone.quantization {kind}; remove one of the two "
            "options"
        )


def use_exact_dequant_linear(model: nn.Module, kind: Quantization) -> dict[str, DequantLinear]:
    """Replaces the products of a model's quantized layers; returns them by names of weights.

    Raises:
        ValueError: If the model has no quantized layer.
    """
    scheme = SCHEMES[kind]
    layers = {f"{name}.weight": module for name, module in model.named_modules() if is_quantized(module)}
    if not layers:
        raise ValueError(
            f"backbone.quantization {kind} quantizes no layer of {type(model).__name__}, since it has no plain "
            "linear layers; use another quantization, or none"
        )
    products = {name: DequantLinear(layer, scheme) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.forward = products[name]
    log.info("%d matrices are quantized to %d bits by %s", len(products), scheme.bits, scheme.package)
    return products


def matrices(model: PreTrainedModel) -> list[Tensor]:
    """Returns the weights of a model that quantization applies to, before it is quantized."""
    head = model.get_output_embeddings()
    return [m.weight for m in model.modules() if type(m) is nn.Linear and m is not head]


def is_quantized(module: nn.Module) -> bool:
    """Whether the type of a module's weight is that of a quantization package."""
    weight = module._parameters.get("weight")
    return weight is not None and type(weight) is not nn.Parameter


class DequantLinear:
    """The forward function of a linear layer whose weight is quantized.

    Args:
        layer: The layer.
        scheme: The quantization of its weight.
    """

    def __init__(self, layer: nn.Module, scheme: Scheme) -> None:
        self.layer, self.scheme = layer, scheme

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Returns the dequantized weight [out, in] in a precision."""
        return self.scheme.dequantize(self.layer.weight, dtype).detach()

    def __call__(self, rows: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return QuantizedLinear.apply(rows, self.weight, self.layer.bias)  # type: ignore[no-any-return]


class QuantizedLinear(torch.autograd.Function):
    """A product with frozen weights, which are dequantized for it. Only the input has a gradient."""

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
