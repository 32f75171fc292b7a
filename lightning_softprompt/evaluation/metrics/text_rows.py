"""Collects texts and numbers of rows over all processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

Numbers = npt.NDArray[np.float64]


@final
class GatheredRows:
    """All rows, sorted by their row ids. Not a dataclass, because torchmetrics would traverse all texts.

    Args:
        columns: Numbers by name, each [R].
        texts: Texts of each row by name.
    """

    def __init__(self, columns: dict[str, Numbers], texts: list[dict[str, Any]]) -> None:
        self.columns = columns
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)


@final
class TextRows(Metric):
    """Collects rows and gathers them from all processes, also from processes without rows.

    Its states are a tensor of numbers and a tensor of the bytes of texts. Corpus metrics, which require all texts, are
    therefore exact, and do not depend on the order of batches and processes.

    Args:
        columns: Names of the numbers of a row.
    """

    full_state_update = False
    numbers: list[Tensor]
    coded: list[Tensor]

    def __init__(self, columns: Sequence[str]) -> None:
        super().__init__()
        self.columns = tuple(columns)
        self.add_state("numbers", default=[], dist_reduce_fx="cat")
        self.add_state("coded", default=[], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Removes all rows and adds an empty batch, because torchmetrics does not gather a state without tensors."""
        super().reset()
        self.update([], [], [])

    def update(self, rows: Sequence[int], measures: Sequence[Sequence[float]], texts: Sequence[dict[str, Any]]) -> None:
        """Adds rows.

        Args:
            rows: Row ids in the split.
            measures: [B, columns].
            texts: Texts of each row by name, JSON serializable.
        """
        coded = [json.dumps(text).encode() for text in texts]
        table = [[row, len(code), *values] for row, code, values in zip(rows, coded, measures, strict=True)]
        shape = (len(table), 2 + len(self.columns))
        self.numbers.append(torch.tensor(table, dtype=torch.float32, device=self.device).reshape(shape))
        content = np.frombuffer(b"".join(coded), np.uint8).copy()
        self.coded.append(torch.from_numpy(content).to(self.device))

    def compute(self) -> GatheredRows:
        """Returns the rows of all processes."""
        table = dim_zero_cat(self.numbers).cpu().double().numpy()  # [R, 2 + columns]
        coded = dim_zero_cat(self.coded).cpu().numpy().tobytes()
        lengths = table[:, 1].astype(int)
        ends = lengths.cumsum()
        texts = [json.loads(coded[a:b]) for a, b in zip(ends - lengths, ends, strict=True)]
        order = table[:, 0].argsort(kind="stable")
        columns = {name: table[order, 2 + i] for i, name in enumerate(self.columns)}
        return GatheredRows(columns, [texts[i] for i in order])
