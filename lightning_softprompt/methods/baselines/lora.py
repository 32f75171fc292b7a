"""LoRA (Hu et al., ICLR 2022), as a baseline, in the implementation of HF PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule


class LoRA(SoftPromptModule):
    """A low-rank update of the backbone's matrices, as a baseline: W + B A * alpha / R.

    It requires the package peft, `pip install 'lightning-softprompt[lora]'`. `prompted=False` uses the backbone with
    its update.

    Paper: Hu et al. 2022, arXiv 2106.09685
    Enters: linear layers
    Parameters: R * (inputs + outputs) of each layer

    Args:
        rank: R.
        alpha: Scale of the update.
        layers: Suffixes of the names of the linear layers to update, such as `q_proj` (default: all except the head).
        common: Arguments of every method.
    """

    default_rate = 1e-3
    changes_backbone = True

    def __init__(self, rank: int = 8, alpha: int = 16, layers: Sequence[str] | None = None, **common: Any) -> None:
        super().__init__(**common)
        if find_spec("peft") is None:
            raise ValueError("LoRA requires the package peft; pip install 'lightning-softprompt[lora]'")
        self.rank, self.alpha, self.layers = rank, alpha, layers

    def build(self, backbone: Backbone) -> None:
        """Creates `update` in float32 or wider, named by the backbone's weights."""
        from peft import LoraConfig, inject_adapter_in_model

        backbone.unfreeze()
        layers = "all-linear" if self.layers is None else list(self.layers)
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=layers, lora_dropout=0.0)
        inject_adapter_in_model(config, backbone.model)
        adapter = {name: weight for name, weight in backbone.model.named_parameters() if weight.requires_grad}
        for weight in adapter.values():
            if weight.dtype.itemsize < torch.float32.itemsize:  # small updates would be lost in half precision
                weight.data = weight.data.float()
        self.update = nn.ParameterDict({name.replace(".", "/"): weight for name, weight in adapter.items()})

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the update to the matrices, and puts the layers without adapters back."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        model = self.loaded.model
        adapted = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
        for name, layer in adapted.items():
            layer.merge()
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer.get_base_layer())

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns an empty prompt."""
        return SoftPrompt()
