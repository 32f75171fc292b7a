"""A trained prompt as plain tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.checkpoints.folding import PREFIX, parameter_name, tensor_name, tensors_to_prompt
from lightning_softprompt.checkpoints.prompt_file import read_prompt
from lightning_softprompt.checkpoints.prompt_sources import report_prompt_source
from lightning_softprompt.checkpoints.restore import readout_tensors
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule


class Folded(SoftPromptModule):
    """The prompt of any method that is the same for every row, as plain soft tokens, keys and values.

    `softprompt fold` writes its file. It can be evaluated, used and trained further as free parameters.

    Paper: none
    Enters: same as the folded method
    Parameters: P * H, or P * 2 * L * N * D

    Args:
        path: File written by `softprompt fold`.
        shapes: Shapes of the tensors by name; set by checkpoints.
        blocks: Number of soft tokens at each slot; set by checkpoints.
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
            raise ValueError("Folded requires `path`, a file written by `softprompt fold`")
        self.path, self.shapes, self.blocks = path, shapes, blocks

    def build(self, backbone: Backbone) -> None:
        """Creates `parts`, the named tensors."""
        tensors = {name: torch.zeros(*shape) for name, shape in (self.shapes or {}).items()}
        if self.path is not None:
            saved = read_prompt(Path(self.path))
            report_prompt_source(Path(self.path))
            saved.check(backbone, Path(self.path))
            parameters = {name: tensor for name, tensor in saved.tensors.items() if name.startswith(PREFIX)}
            tensors = {tensor_name(name): tensor for name, tensor in parameters.items()}
            self.trained_readout = readout_tensors(saved)
            self.blocks = saved.method.get("blocks")
            shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
            self.hparams.update(path=None, shapes=shapes, blocks=self.blocks)  # checkpoints need no file
        parts = {parameter_name(name).removeprefix(PREFIX): nn.Parameter(tensor) for name, tensor in tensors.items()}
        self.parts = nn.ParameterDict(parts)

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the same prompt for every row."""
        parts = {tensor_name(name): part for name, part in self.parts.items()}
        return tensors_to_prompt(parts, None if self.blocks is None else tuple(self.blocks))
