"""Which soft tokens do better smaller (Fu et al. 2024, Nemesis, arXiv 2408.13979, section 3)."""

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
    """In `softprompt test`: accuracy with each soft token corrupted, one at a time, beside that of the whole prompt.

    A position shows the low-norm effect where accuracy rises with its norm reduced. Leaves `low_norm.json` and
    `plots/low_norm.png` in the run's folder. Costs a pass over the test rows for each position and strength.

    Args:
        corruption: `rescale` multiplies a token by each of the strengths, `replace` puts noise of that standard
            deviation in its place; 0 is a zero token either way.
        strengths: How much.
    """

    def __init__(
        self, corruption: Literal["rescale", "replace"] = "rescale", strengths: Sequence[float] = (0.0, 0.1, 0.5)
    ) -> None:
        self.corruption, self.strengths = corruption, list(strengths)
        self._reset()

    def _reset(self) -> None:
        self.right: Tensor | None = None  # [strengths, P] rows, or words, that are right
        self.whole = 0  # those that are right with nothing corrupted
        self.rows = 0  # all

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """A test begins."""
        self._reset()

    @torch.no_grad()
    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, *_: Any) -> None:
        """Counts the batch, corrupted in every way."""
        lm = pl_module.lm()
        positions = range(soft_tokens(lm, batch).shape[1])
        corrupt = {"rescale": scale_tokens, "replace": replace_with_noise}[self.corruption]
        counts = [[count_correct(corrupt(lm, batch, [p], s), batch) for p in positions] for s in self.strengths]
        self.right = torch.tensor(counts) + (0 if self.right is None else self.right)
        self.whole += count_correct(lm, batch)
        self.rows += count_labelled(batch)

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Writes the report, of the rows of all processes."""
        of_processes = gather_objects((self.right, self.whole, self.rows))  # also of those without a row
        counts = [of_process for of_process in of_processes if of_process[0] is not None]
        if not counts or not trainer.is_global_zero:
            return
        right, total, rows = (sum(of) for of in zip(*counts, strict=True))
        by_strength, whole = (right / rows).tolist(), total / rows
        low = [any(of[p] > whole for of in by_strength) for p in range(len(by_strength[0]))]
        named = dict(zip(map(str, self.strengths), by_strength, strict=True))
        report = {
            "corruption": self.corruption, "accuracy": whole, "rows": rows, "positions": len(low),
            "low_norm_positions": sum(low), "by_strength": named,
        }  # fmt: skip
        write_file(last_folder() / "low_norm.json", f"{json.dumps(report, indent=1)}\n".encode())
        image = drawn(by_strength, whole, [f"{self.corruption} {strength}" for strength in self.strengths])
        write_file(last_folder() / "plots" / "low_norm.png", image)


def drawn(accuracies: Sequence[Sequence[float]], whole: float, names: Sequence[str]) -> bytes:
    """A line over the positions for each strength, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for of, name in zip(accuracies, names, strict=True):
        axes.plot(range(len(of)), of, "o-", markersize=3, label=name)
    axes.axhline(whole, color="#d1495b", label="whole prompt")
    axes.set_xlabel("position of the soft token corrupted")
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()
