"""Keys and values as parameters: initializers, reparameterization, and conversion to a soft prompt.

The keys and values of one kind of attention are [L, 2, P, N * D].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Pairs
from lightning_softprompt.prompts.networks import Activation, perceptron


class KeysValuesInit(ABC):
    """Creates the initial keys and values of a kind of attention."""

    @abstractmethod
    def __call__(self, backbone: Backbone, kind: str, length: int) -> Tensor:
        """Returns [L, 2, P, N * D] in float32 for P = `length`."""


@dataclass(frozen=True)
class NormalKeysValues(KeysValuesInit):
    """Values drawn from a normal distribution around 0.

    Args:
        std: Standard deviation; 0 starts from zeros, which attract attention without contributing content.
    """

    std: float = 0.02

    def __call__(self, backbone: Backbone, kind: str, length: int) -> Tensor:
        """Returns keys and values [L, 2, P, N * D]."""
        sites = backbone.attentions[kind]
        width = sites.heads * sites.size
        return torch.randn(len(sites), 2, length, width) * self.std


@dataclass(frozen=True)
class Activations(KeysValuesInit):
    """Keys and values that the frozen backbone computes for a text (Li and Liang 2021, section 7.4).

    A text that is too short is repeated.

    Args:
        text: Text such as an instruction for the task, or a word of it.
        start: Whether the special tokens at the start of a row precede the text.
    """

    text: str = "summarize"
    start: bool = False

    def __call__(self, backbone: Backbone, kind: str, length: int) -> Tensor:
        """Returns keys and values [L, 2, P, N * D]."""
        start = backbone.codec.start if self.start else ()
        ids = [*start, *backbone.codec.template_ids(self.text)]
        if not ids:
            raise ValueError(f"Activations requires a text with at least one token, got {self.text!r}")
        repeated = (ids * (length // len(ids) + 1))[:length]
        tensor = torch.tensor(repeated, device=backbone.word_embeddings.device)
        key_values = backbone.keys_and_values(tensor)[kind]  # [L, 2, N, P, D]
        return key_values.transpose(2, 3).flatten(3).float().cpu()


class FreeKeysValues(nn.Module):
    """Keys and values that are trained directly.

    Args:
        first: Their initial value [L, 2, P, N * D].
    """

    def __init__(self, first: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(first)

    def forward(self) -> Tensor:
        """Returns keys and values [L, 2, P, N * D]."""
        return self.values


class Reparameterized(nn.Module):
    """Keys and values computed from P embeddings by an MLP, which stabilizes training (Li and Liang 2021, section 4.3).

    Args:
        shape: Shape of the keys and values, [L, 2, P, N * D].
        embedding: Width of the embeddings.
        width: M, hidden width of the MLP.
        depth: Number of activations.
        activation: The activation.
    """

    def __init__(
        self, shape: Sequence[int], embedding: int, width: int, depth: int = 1, activation: Activation = "tanh"
    ) -> None:
        super().__init__()
        layers, two, length, size = self.shape = tuple(shape)
        self.tokens = nn.Parameter(torch.randn(length, embedding))
        widths = [embedding, *[width] * depth, layers * two * size]
        self.network = perceptron(widths, activation)

    def forward(self) -> Tensor:
        """Returns keys and values [L, 2, P, N * D]."""
        layers, two, length, size = self.shape
        output = self.network(self.tokens).view(length, layers, two, size)
        return output.permute(1, 2, 0, 3)  # type: ignore[no-any-return]

    @torch.no_grad()
    def fit(self, target: Tensor) -> None:
        """Solves the last layer by least squares so that the output is the target [L, 2, P, N * D]."""
        *_, last = self.network
        output = target.permute(2, 0, 1, 3).flatten(1)  # [P, L * 2 * N * D]
        last.bias.copy_(output.mean(0))  # type: ignore[operator]
        features = self.network[:-1](self.tokens)  # [P, M]
        residual = (output - last.bias).cpu()  # type: ignore[operator]
        # the last bits of PyTorch's default driver, gelsy, change from call to call
        weight = torch.linalg.lstsq(features.cpu(), residual, driver="gelsd").solution
        last.weight.copy_(weight.T)  # type: ignore[operator]


def build_key_values(
    first: Tensor, embedding: int, width: int | None, depth: int = 1, activation: Activation = "tanh"
) -> FreeKeysValues | Reparameterized:
    """Creates keys and values with the initial value `first` [L, 2, P, N * D].

    They are trained directly if `width` is None, otherwise computed by an MLP of that hidden width.
    """
    if width is None:
        return FreeKeysValues(first)
    network = Reparameterized(first.shape, embedding, width, depth, activation)
    network.fit(first)
    return network


class DeepPrompt(nn.Module):
    """A prompt in the layers of one kind of attention.

    Args:
        heads: N, the number of key and value heads.
        layers: Indices of the layers, in order.
        made: Module that returns the keys and values [L, 2, P, N * D] of those layers. Its name is in saved prompts.
    """

    def __init__(self, heads: int, layers: Sequence[int], made: nn.Module) -> None:
        super().__init__()
        self.heads, self.layers, self.made = heads, tuple(layers), made

    def forward(self) -> Pairs:
        """Returns keys and values [1, N, P, D] by layer."""
        by_head = self.made().unflatten(3, (self.heads, -1))  # [L, 2, P, N, D]
        pairs = by_head.transpose(2, 3)  # [L, 2, N, P, D]
        return {layer: (pair[:1], pair[1:]) for layer, pair in zip(self.layers, pairs, strict=True)}
