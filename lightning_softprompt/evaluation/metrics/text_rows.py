"""The rows of a pass with their texts and numbers, the same in every process."""

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
class Gathered:
    """All rows of a pass, by their numbers in the split. No dataclass: torchmetrics would go through all its texts.

    Args:
        columns: Measures by name, each [R].
        texts: For each row, by name.
    """

    def __init__(self, columns: dict[str, Numbers], texts: list[dict[str, Any]]) -> None:
        self.columns = columns
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)


@final
class TextRows(Metric):
    """Keeps rows, and gathers those of all processes, of which any may have none.

    Its states are tensors, one of numbers and one of the texts' bytes. So metrics that want to see all texts at once,
    such as those of a whole split, are exact, and the order of batches and processes makes no difference.

    Args:
        columns: The measures of a row.
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
        """Forgets all rows. No rows are put in their place: a state without tensors would not be gathered as one."""
        super().reset()
        self.update([], [], [])

    def update(self, rows: Sequence[int], measures: Sequence[Sequence[float]], texts: Sequence[dict[str, Any]]) -> None:
        """Takes rows.

        Args:
            rows: Their numbers in the split.
            measures: [B, columns].
            texts: What goes into JSON, by name.
        """
        coded = [json.dumps(text).encode() for text in texts]
        table = [[row, len(code), *of] for row, code, of in zip(rows, coded, measures, strict=True)]
        shape = (len(table), 2 + len(self.columns))
        self.numbers.append(torch.tensor(table, dtype=torch.float32, device=self.device).reshape(shape))
        self.coded.append(torch.from_numpy(np.frombuffer(b"".join(coded), np.uint8).copy()).to(self.device))

    def compute(self) -> Gathered:
        """The rows of all processes."""
        table = dim_zero_cat(self.numbers).cpu().double().numpy()  # [R, 2 + columns]
        coded = dim_zero_cat(self.coded).cpu().numpy().tobytes()
        lengths = table[:, 1].astype(int)
        ends = lengths.cumsum()
        texts = [json.loads(coded[a:b]) for a, b in zip(ends - lengths, ends, strict=True)]
        order = table[:, 0].argsort(kind="stable")
        columns = {name: table[order, 2 + i] for i, name in enumerate(self.columns)}
        return Gathered(columns, [texts[i] for i in order])
