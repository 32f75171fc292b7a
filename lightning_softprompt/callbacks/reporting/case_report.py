"""The rows of a test that came out best and worst, as a page for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_softprompt.callbacks.reporting.predictions import targeted
from lightning_softprompt.callbacks.reporting.record_lines import of_all_processes
from lightning_softprompt.callbacks.reporting.run_files import stage_metrics
from lightning_softprompt.core.types import Batch
from lightning_softprompt.reports.html import Case, cases_page
from lightning_softprompt.runs.loggers import rank_zero_info
from lightning_softprompt.system.atomic_files import write_file


class CaseReport(Callback):
    """Writes the best and the worst rows of `test` as one HTML page; rows without a finite score are left out.

    Args:
        path: The page.
        score: What ranks the rows: the greater, the better.
        rows: How many of the best, and of the worst.
    """

    def __init__(self, path: Path, score: str, rows: int = 10) -> None:
        self.path, self.score, self.rows = Path(path), score, rows
        self._cases: dict[int, Case] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the test before."""
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
        """Keep the rows that may be shown."""
        self._cases |= {record["row"]: record for record in outputs if record["scores"]}
        best, worst = self._ranked(self._cases)
        self._cases = {record["row"]: record for record in (*best, *worst)}

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page."""
        cases = of_all_processes(self._cases)
        if not cases or not trainer.is_global_zero:
            return
        best, worst = ([targeted(trainer, "test", record) for record in part] for part in self._ranked(cases))
        page = cases_page(self.score, stage_metrics(trainer, "test"), {"Best": best, "Worst": worst})
        write_file(self.path, page.encode())
        rank_zero_info(f"the best and worst cases: {self.path}")

    def _ranked(self, cases: Mapping[int, Case]) -> tuple[list[Case], list[Case]]:
        """The best rows, best first, and of the others the worst, worst first."""
        finite = [record for record in cases.values() if math.isfinite(record["scores"].get(self.score, math.nan))]
        order = sorted(finite, key=lambda record: (-record["scores"][self.score], record["row"]))
        return order[: self.rows], order[self.rows :][: -self.rows - 1 : -1]
