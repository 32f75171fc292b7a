"""The rows of a test with the best and the worst scores, as an HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_softprompt.callbacks.reporting.predictions import describe_with_target
from lightning_softprompt.callbacks.reporting.record_lines import gather_rows
from lightning_softprompt.callbacks.reporting.run_files import stage_metrics
from lightning_softprompt.core.types import Batch
from lightning_softprompt.reports.html import Case, cases_page
from lightning_softprompt.runs.loggers import rank_zero_info
from lightning_softprompt.system.atomic_files import write_file


class CaseReport(Callback):
    """Writes the best and the worst rows of `test` as one HTML page; rows without a finite score are left out.

    Args:
        path: The page.
        score: Name of the score that ranks the rows; a higher score is better.
        rows: Number of the best rows, and of the worst.
    """

    def __init__(self, path: Path, score: str, rows: int = 10) -> None:
        self.path, self.score, self.rows = Path(path), score, rows
        self._cases: dict[int, Case] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the rows of the previous test."""
        self._cases = {}

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Store the rows that may be on the page."""
        self._cases |= {record["row"]: record for record in outputs if record["scores"]}
        best, worst = self._select(self._cases)
        self._cases = {record["row"]: record for record in (*best, *worst)}

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page."""
        cases = gather_rows(self._cases)
        if not cases or not trainer.is_global_zero:
            return
        best, worst = self._select(cases)
        sections = {
            "Best": [describe_with_target(trainer, "test", record) for record in best],
            "Worst": [describe_with_target(trainer, "test", record) for record in worst],
        }
        page = cases_page(self.score, stage_metrics(trainer, "test"), sections)
        write_file(self.path, page.encode())
        rank_zero_info(f"the best and worst cases: {self.path}")

    def _select(self, cases: Mapping[int, Case]) -> tuple[list[Case], list[Case]]:
        """Returns the best rows, best first, and the worst of the other rows, worst first."""
        ranks = {}
        for row, record in cases.items():
            score = record["scores"].get(self.score, math.nan)
            if math.isfinite(score):
                ranks[row] = (-score, row)
        order = [cases[row] for row in sorted(ranks, key=lambda row: ranks[row])]
        best, others = order[: self.rows], order[self.rows :]
        return best, others[::-1][: self.rows]
