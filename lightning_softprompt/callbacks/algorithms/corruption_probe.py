"""Reports which soft tokens improve accuracy when scaled down (Fu et al. 2024, Nemesis, arXiv 2408.13979, sec. 3)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lightning_softprompt.core.types import Batch
from lightning_softprompt.distributed.collectives import gather_objects
from lightning_softprompt.objectives.penalties import (
    count_correct,
    count_labelled,
    replace_with_noise,
    scale_tokens,
    soft_tokens,
)
from lightning_softprompt.runs.run_spec import last_folder
from lightning_softprompt.system.atomic_files import write_file


class CorruptionProbe(Callback):
    """Measures, in `softprompt test`, the accuracy with each soft token corrupted, one at a time.

    A position shows the low-norm effect if accuracy is higher with its norm reduced than with the intact prompt. Writes
    `low_norm.json` and `plots/low_norm.png` to the run's folder. Each position and strength costs a pass over the test
    rows.

    Args:
        corruption: `rescale` multiplies a token by each of the strengths, `replace` replaces it with noise of that
            standard deviation; with 0 both give a zero token.
        strengths: The strengths.
    """

    def __init__(
        self, corruption: Literal["rescale", "replace"] = "rescale", strengths: Sequence[float] = (0.0, 0.1, 0.5)
    ) -> None:
        self.corruption, self.strengths = corruption, list(strengths)
        self._reset()

    def _reset(self) -> None:
        self.correct: Tensor | None = None  # [strengths, P] number of correct rows, or words
        self.correct_intact = 0  # number of those that are correct with the intact prompt
        self.rows = 0  # number of all

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Reset the counts."""
        self._reset()

    @torch.no_grad()
    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, *_: Any) -> None:
        """Count the batch with each corruption."""
        lm = pl_module.lm()
        corrupt = {"rescale": scale_tokens, "replace": replace_with_noise}[self.corruption]
        positions = range(soft_tokens(lm, batch).shape[1])
        counts = torch.zeros(len(self.strengths), len(positions), dtype=torch.int64)
        for number, strength in enumerate(self.strengths):
            for position in positions:
                corrupted = corrupt(lm, batch, [position], strength)
                counts[number, position] = count_correct(corrupted, batch)
        self.correct = counts if self.correct is None else self.correct + counts
        self.correct_intact += count_correct(lm, batch)
        self.rows += count_labelled(batch)

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the report for the rows of all processes."""
        of_processes = gather_objects((self.correct, self.correct_intact, self.rows))
        with_rows = [counts for counts in of_processes if counts[0] is not None]  # a process may have no rows
        if not with_rows or not trainer.is_global_zero:
            return
        correct, correct_intact, rows = (sum(counts) for counts in zip(*with_rows, strict=True))
        intact = correct_intact / rows
        is_low_norm = (correct > correct_intact).any(0)  # [P]
        by_strength = (correct / rows).tolist()  # [strengths, P]
        report = {
            "corruption": self.corruption,
            "accuracy": intact,
            "rows": rows,
            "positions": len(is_low_norm),
            "low_norm_positions": int(is_low_norm.sum()),
            "by_strength": dict(zip(map(str, self.strengths), by_strength, strict=True)),
        }
        write_file(last_folder() / "low_norm.json", f"{json.dumps(report, indent=1)}\n".encode())
        names = [f"{self.corruption} {strength}" for strength in self.strengths]
        write_file(last_folder() / "plots" / "low_norm.png", draw_accuracies(by_strength, intact, names))


def draw_accuracies(by_strength: Sequence[Sequence[float]], intact: float, names: Sequence[str]) -> bytes:
    """Draws one line over the positions per strength, and returns a PNG image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for accuracies, name in zip(by_strength, names, strict=True):
        axes.plot(range(len(accuracies)), accuracies, "o-", markersize=3, label=name)
    axes.axhline(intact, color="#d1495b", label="intact prompt")
    axes.set_xlabel("position of the corrupted soft token")
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()
