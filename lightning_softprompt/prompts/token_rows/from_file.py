"""Rows of new tokens from a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.tokenization.added_rows import AddedRow
from lightning_softprompt.prompts.token_rows.base import TokenRowsInit


@dataclass(frozen=True)
class FromRows(TokenRowsInit):
    """Rows from a safetensors file, such as those of WECHSEL, OFA or ZeTT, which other packages compute.

    Args:
        path: A file with the tensors `inputs` [N, H] and, unless `NewTokens` is `tied`, `outputs` [N, H]; the rows
            are in the order of `vocabulary.json`.
    """

    path: str

    def __call__(self, backbone: Backbone, tables: Sequence[Tensor], tokens: Sequence[AddedRow]) -> list[Tensor]:
        """See `TokenRowsInit`."""
        try:
            tensors = load_file(Path(self.path).expanduser())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"FromRows cannot read {self.path}: {error}") from error
        found = {key: list(tensor.shape) for key, tensor in tensors.items()}
        rows = []
        for name, table in zip(("inputs", "outputs"), tables, strict=False):
            expected = [len(tokens), table.shape[1]]
            if found.get(name) != expected:
                raise ValueError(f"{self.path} requires a tensor {name!r} of shape {expected}, and has {found}")
            rows.append(tensors[name].float().to(table.device))
        return rows
