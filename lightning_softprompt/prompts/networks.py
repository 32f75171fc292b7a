"""Small networks for the reparameterization of soft prompts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Activation = Literal["tanh", "relu", "gelu", "identity"]
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "identity": nn.Identity,
}


def perceptron(widths: Sequence[int], activation: Activation = "relu") -> nn.Sequential:
    """Creates linear layers of the given widths, with the activation between them.

    Raises:
        ValueError: If the activation is unknown.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(get_args(Activation))}, got {activation!r}")
    layers: list[nn.Module] = []
    for inner, outer in pairwise(widths):
        layers += [nn.Linear(inner, outer), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


class Recurrent(nn.Module):
    """A bidirectional LSTM over soft tokens, then a perceptron (Liu et al. 2021, arXiv 2103.10385, equation 3).

    Args:
        width: H.
        state: Width of the LSTM in each direction.
        layers: Number of layers of the LSTM.
        perceptron: The following network, from twice `state` to H.
    """

    def __init__(self, width: int, state: int, layers: int, perceptron: nn.Module) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, state, layers, bidirectional=True, batch_first=True)
        self.perceptron = perceptron

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps [P, H] to [P, H]; in float32, independent of the precision of the run."""
        with torch.autocast(tokens.device.type, enabled=False):
            states, _ = self.lstm(at_least_float32(tokens)[None])
            return self.perceptron(states[0])  # type: ignore[no-any-return]


class HypercomplexLinear(nn.Module):
    """A linear map whose matrix is a sum of n Kronecker products (Zhang et al. 2021, arXiv 2102.08597, equation 3).

    Args:
        inner: Width of the input.
        outer: Width of the output.
        n: Number of products.

    Raises:
        ValueError: If n does not divide both widths.
    """

    def __init__(self, inner: int, outer: int, n: int) -> None:
        super().__init__()
        if inner % n or outer % n:
            raise ValueError(f"hypercomplex must divide {inner} and {outer}, got {n}")
        self.rules = nn.Parameter(torch.randn(n, n, n) / n)
        blocks = torch.randn(n, outer // n, inner // n)
        self.blocks = nn.Parameter(blocks / inner**0.5)
        self.bias = nn.Parameter(torch.zeros(outer))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., inner] to [..., outer]."""
        products = torch.einsum("kij,kab->iajb", self.rules, self.blocks)
        weight = products.flatten(2).flatten(0, 1)  # [outer, inner]
        return nn.functional.linear(x, weight, self.bias)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Converts half precision to float32, the precision of prompts; wider types stay."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
