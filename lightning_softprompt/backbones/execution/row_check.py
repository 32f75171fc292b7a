"""Runs the rows of an encoder in one padded batch, or one by one if padding changes the results.

Padding changes the results of some models, such as those that mix all positions or divide rows into blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_softprompt.backbones.execution.float32_reference import in_float32
from lightning_softprompt.backbones.kernels.prepacked_linear import plain_products
from lightning_softprompt.core.types import Batch, SoftPrompt

log = logging.getLogger(__name__)
TOLERANCE = 1e-4  # relative error in float32
Result = TypeVar("Result")
Run = Callable[[Batch, SoftPrompt | None], Result]


class RowCheck:
    """Checks on the longest and the shortest row of a batch whether padding changes the results.

    A batch with a longer row than all earlier ones repeats the check.

    Args:
        model: The transformers model.
        name: The name of the backbone, for the log.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name
        self.longest = 0
        self.runs_row_by_row = False

    def run(
        self,
        run: Run[Result],
        batch: Batch,
        prompt: SoftPrompt | None,
        valid_values: Callable[[Result, Batch], Tensor],
        join: Callable[[Sequence[Result]], Result],
    ) -> Result:
        """The result of a function for a batch.

        Args:
            run: Runs rows.
            batch: The rows.
            prompt: Their prompt.
            valid_values: Extracts the values of a result that do not belong to padding.
            join: Joins the results of single rows.
        """
        lengths = batch.mask.sum(1)
        shortest, longest = int(lengths.min()), int(lengths.max())
        if not self.runs_row_by_row and longest > self.longest and shortest < longest:
            self.longest = longest
            self.runs_row_by_row = self._depends_on_padding(run, batch, prompt, valid_values)
        if self.runs_row_by_row:
            return join([run(*row) for row in _single_rows(batch, prompt)])
        return run(batch, prompt)

    def _depends_on_padding(
        self,
        run: Run[Result],
        batch: Batch,
        prompt: SoftPrompt | None,
        valid_values: Callable[[Result, Batch], Tensor],
    ) -> bool:
        lengths = batch.mask.sum(1)
        rows = [int(lengths.argmax()), int(lengths.argmin())]
        pair, prompt = batch.only(rows), prompt and prompt.only(rows)
        device = batch.input_ids.device.type
        with torch.no_grad(), plain_products(), in_float32(self.model), torch.autocast(device, enabled=False):
            expected = torch.cat([valid_values(run(*row), row[0]) for row in _single_rows(pair, prompt)])
            try:
                padded = valid_values(run(pair, prompt), pair)
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
                padded = expected.new_full(expected.shape, float("nan"))
        error = float((padded - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        if error <= TOLERANCE or not bool(expected.isfinite().all()):
            return False
        log.warning("%s runs row by row, which is slow: padding changes its results by %.1e", self.name, error)
        return True


def _single_rows(batch: Batch, prompt: SoftPrompt | None) -> list[tuple[Batch, SoftPrompt | None]]:
    return [(batch.only([b]), prompt and prompt.only([b])) for b in range(len(batch))]
