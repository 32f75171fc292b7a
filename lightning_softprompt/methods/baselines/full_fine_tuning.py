"""Full fine-tuning, as a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule


class FullFineTuning(SoftPromptModule):
    """Full fine-tuning of all weights of the backbone, or of some layers, as a baseline.

    Checkpoints contain all trained weights. `prompted=False` uses the fine-tuned backbone, not the original one.

    Paper: none
    Enters: all weights
    Parameters: the parameters of the backbone, or of the selected layers

    Args:
        layers: Suffixes of the names of the layers to train, such as `embed_tokens`, `layers.0` or `mlp` (default: all
            layers). If the head shares its weights with the embedding table, `embed_tokens` trains both.
        common: Arguments of every method.
    """

    default_rate = 2e-5
    changes_backbone = True

    def __init__(self, layers: Sequence[str] | None = None, **common: Any) -> None:
        super().__init__(**common)
        if layers is not None and (isinstance(layers, str) or not layers):
            raise ValueError(f"layers must be a list of names such as [embed_tokens], got {layers!r}")
        self.layers = layers

    def build(self, backbone: Backbone) -> None:
        """Registers the trained weights of the backbone as `weights`, without copying them.

        Raises:
            ValueError: If the backbone has no layer of a name.
        """
        selected = [""] if self.layers is None else find_layers(backbone.model, self.layers)
        backbone.unfreeze()
        for name in selected:
            backbone.model.get_submodule(name).requires_grad_()
        weights = {name: weight for name, weight in backbone.model.named_parameters() if weight.requires_grad}
        self.weights = nn.ParameterDict({name.replace(".", "/"): weight for name, weight in weights.items()})

    def merge(self) -> None:
        """Does nothing, since the trained weights are those of the model."""

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns an empty prompt."""
        return SoftPrompt()


def find_layers(model: nn.Module, suffixes: Sequence[str]) -> list[str]:
    """Returns the names of the layers of a model that end with a suffix, as a whole or after a dot.

    Raises:
        ValueError: If a suffix fits no layer with weights.

    >>> find_layers(nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1))), ["0"])
    ['0', '1.0']
    """
    layers = {name: layer for name, layer in model.named_modules() if any(True for _ in layer.parameters())}
    names: list[str] = []
    for suffix in suffixes:
        found = [name for name in layers if name == suffix or name.endswith(f".{suffix}")]
        if not found:
            last_parts = sorted({name.rpartition(".")[2] for name in layers if name})
            raise ValueError(f"no layer of {type(model).__name__} ends with {suffix!r}; names end with {last_parts}")
        names += found
    return names
