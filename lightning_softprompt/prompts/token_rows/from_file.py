"""Rows of new tokens from a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.prompts.token_rows.base import Subwords, TokenRowsInit


@dataclass(frozen=True)
class FromRows(TokenRowsInit):
    """Rows from a safetensors file, such as those of WECHSEL, OFA or ZeTT, which other packages compute.

    Args:
        path: A file with the tensors `inputs` [N, H] and `outputs` [N, H].
    """

    path: str

    def __call__(self, backbone: Backbone, table: Tensor, subwords: Subwords, is_output: bool) -> Tensor:
        """See `TokenRowsInit`."""
        name = "outputs" if is_output else "inputs"
        try:
            tensors = load_file(Path(self.path).expanduser())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"FromRows cannot read {self.path}: {error}") from error
        expected = [len(subwords), table.shape[1]]
        found = {key: list(tensor.shape) for key, tensor in tensors.items()}
        if found.get(name) != expected:
            raise ValueError(f"{self.path} requires a tensor {name!r} of shape {expected}, and has {found}")
        return tensors[name].float().to(table.device)
