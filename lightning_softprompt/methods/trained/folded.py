"""A trained prompt without what made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.checkpoints.folding import PREFIX, parameter_name, tensor_name, tensors_to_prompt
from lightning_softprompt.checkpoints.prompt_file import read_prompt
from lightning_softprompt.checkpoints.restore import readout_tensors
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule


class Folded(SoftPromptModule):
    """The prompt of any method that gives every row the same, as plain soft tokens, keys and values.

    `softprompt fold` makes its file. It can be tested, used, and trained further, each number freely.

    Paper: none
    Enters: where the folded method did
    Parameters: P * H, or P * 2 * L * N * D

    Args:
        path: What `softprompt fold` wrote.
        shapes: Of the tensors by name, where they come from a checkpoint.
        blocks: Soft tokens at each slot, where they come from a checkpoint.
        common: Arguments of every method.
    """

    trained = True

    def __init__(
        self,
        path: str | None = None,
        shapes: Mapping[str, Sequence[int]] | None = None,
        blocks: Sequence[int] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if (path is None) == (shapes is None):
            raise ValueError("Folded wants a path, which `softprompt fold` writes")
        self.path, self.shapes, self.blocks = path, shapes, blocks

    def build(self, backbone: Backbone) -> None:
        """Makes `parts`, by name."""
        tensors = {name: torch.zeros(*shape) for name, shape in (self.shapes or {}).items()}
        if self.path is not None:
            saved = read_prompt(Path(self.path))
            saved.check(backbone, Path(self.path))
            tensors = {tensor_name(name): t for name, t in saved.tensors.items() if name.startswith(PREFIX)}
            self.trained_readout = readout_tensors(saved)
            self.blocks = saved.method.get("blocks")
            shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
            self.hparams.update(path=None, shapes=shapes, blocks=self.blocks)  # a checkpoint needs no other file
        parts = {parameter_name(name).removeprefix(PREFIX): nn.Parameter(tensor) for name, tensor in tensors.items()}
        self.parts = nn.ParameterDict(parts)

    def prompt(self, batch: Batch) -> SoftPrompt:
        """The same for every row."""
        parts = {tensor_name(name): part for name, part in self.parts.items()}
        return tensors_to_prompt(parts, None if self.blocks is None else tuple(self.blocks))
