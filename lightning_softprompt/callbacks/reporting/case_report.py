"""Selected rows of a test as an HTML page, such as those with the best and the worst scores."""

from __future__ import annotations

from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_softprompt.callbacks.reporting.predictions import describe_with_target
from lightning_softprompt.callbacks.reporting.record_lines import gather_rows
from lightning_softprompt.callbacks.reporting.run_files import stage_metrics
from lightning_softprompt.core.types import Batch
from lightning_softprompt.evaluation.case_ranking import Case, CaseRanking
from lightning_softprompt.reports.html import cases_page
from lightning_softprompt.reports.prediction_file import PREDICTIONS
from lightning_softprompt.runs.loggers import rank_zero_info
from lightning_softprompt.system.atomic_files import write_file


class CaseReport(Callback):
    """Writes selected rows of `test` as one HTML page.

    Args:
        path: The page.
        ranking: Selects the rows.
        description: What is tested.
        rows: Maximum number of rows in each part of the page.
    """

    def __init__(self, path: Path, ranking: CaseRanking, description: str = "", rows: int = 10) -> None:
        self.path, self.ranking, self.description, self.rows = Path(path), ranking, description, rows
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
        parts = self.ranking.select(self._cases, self.rows)
        self._cases = {record["row"]: record for record in chain(*parts.values())}

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page."""
        cases = gather_rows(self._cases)
        if not cases or not trainer.is_global_zero:
            return
        parts = {}
        for heading, records in self.ranking.select(cases, self.rows).items():
            parts[heading] = [describe_with_target(trainer, "test", record) for record in records]
        note = f"{self.description}. {datetime.now():%F %H:%M}. Rows are numbered as in {PREDICTIONS}."
        page = cases_page(self.ranking.title, note.removeprefix(". "), stage_metrics(trainer, "test"), parts)
        write_file(self.path, page.encode())
        rank_zero_info(f"{self.ranking.title}: {self.path}")
