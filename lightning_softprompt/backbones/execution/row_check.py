"""Rows of an encoder in one padded batch where that gives what each row alone gives, and row by row otherwise.

Some models let padding change their results: they mix all positions, or divide rows into blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

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
    """Tries padding out on the longest and the shortest row of a batch, again when a row is longer than any tried.

    Args:
        model: The transformers model.
        name: Of the backbone, for the log.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name
        self.longest = 0
        self.is_alone = False

    def run(
        self,
        run: Run[Result],
        batch: Batch,
        prompt: SoftPrompt | None,
        numbers: Callable[[Result, Batch], Tensor],
        join: Callable[[Sequence[Result]], Result],
    ) -> Result:
        """What a function gives for a batch.

        Args:
            run: Runs rows.
            batch: The rows.
            prompt: Their prompt.
            numbers: From a result to what of it means something.
            join: Joins the results of single rows.
        """
        lengths = batch.mask.sum(1)
        if not self.is_alone and int(lengths.max()) > self.longest and int(lengths.min()) < int(lengths.max()):
            self.longest = int(lengths.max())
            self.is_alone = self._depends_on_padding(run, batch, prompt, numbers)
        return join(_each(run, batch, prompt)) if self.is_alone else run(batch, prompt)

    def _depends_on_padding(
        self, run: Run[Result], batch: Batch, prompt: SoftPrompt | None, numbers: Callable[[Result, Batch], Tensor]
    ) -> bool:
        lengths = batch.mask.sum(1)
        rows = [int(lengths.argmax()), int(lengths.argmin())]
        two, prompt = batch.only(rows), prompt and prompt.only(rows)
        device = batch.input_ids.device.type
        with torch.no_grad(), plain_products(), in_float32(self.model), torch.autocast(device, enabled=False):
            right = torch.cat([numbers(run(*part), part[0]) for part in _parts(two, prompt)])
            try:
                ours = numbers(run(two, prompt), two)
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
                ours = right.new_full(right.shape, float("nan"))
        error = float((ours - right).abs().max() / right.abs().max().clamp(min=1e-30))
        if error <= TOLERANCE or not bool(right.isfinite().all()):
            return False
        log.warning("%s runs row by row, which is slow: padding changes its results by %.1e", self.name, error)
        return True


def _parts(batch: Batch, prompt: SoftPrompt | None) -> list[tuple[Batch, SoftPrompt | None]]:
    return [(batch.only([b]), prompt and prompt.only([b])) for b in range(len(batch))]


def _each(run: Run[Any], batch: Batch, prompt: SoftPrompt | None) -> list[Any]:
    return [run(*part) for part in _parts(batch, prompt)]
