"""The learning-rate range test: loss over a learning rate that rises with each step (Smith 2017)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.tuner.tuning import Tuner

from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.system.atomic_files import write_file

STEPS = 100
MIN_LR, MAX_LR = 1e-5, 10.0  # soft prompts train at rates up to 0.3 (Lester et al. 2021)
SKIPPED = 10  # first steps, whose average of losses covers too few of them
HALF_WINDOW = 10  # steps before and after a rate over which the slope is measured
CURVE, VALUES = "lr_find.png", "lr_find.json"


def find_lr(trainer: Trainer, module: Any, data: SoftPromptDataModule, folder: Path) -> float | None:
    """Runs the test with Lightning's `Tuner` and writes its curve and values; the module is restored afterwards.

    The rate rises exponentially from 1e-5 to 10 over 100 steps. The test ends early if the loss exceeds four times
    its minimum.

    Args:
        trainer: A Trainer without loggers and checkpoints.
        module: The method, or several replicas of it.
        data: The data module.
        folder: Where `lr_find.png` and `lr_find.json` are written.

    Returns:
        The suggested rate; None if the test ended after too few steps for a suggestion.
    """
    finder: Any = Tuner(trainer).lr_find(
        module, datamodule=data, min_lr=MIN_LR, max_lr=MAX_LR, num_training=STEPS, update_attr=False
    )
    suggestion = suggest_rate(finder.results["lr"], finder.results["loss"])
    figure = finder.plot()
    if suggestion is not None:
        figure.axes[0].axvline(suggestion, color="0.4", linestyle="--", label=f"suggestion: {suggestion:.2g}")
        figure.axes[0].legend(frameon=False)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=150)
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / CURVE, image.getvalue())
        values = {"suggestion": suggestion, **finder.results}
        write_file(folder / VALUES, f"{json.dumps(values)}\n".encode())
    return suggestion


def suggest_rate(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """Returns the learning rate at which the loss falls fastest per relative change of the rate.

    Lightning's own suggestion takes the slope per absolute change, which prefers the smallest rates.

    Args:
        rates: Learning rates in rising order.
        losses: The loss at each rate, averaged over the preceding steps.

    Returns:
        The rate; None if the loss never falls.
    """
    slopes = []
    for middle in range(SKIPPED + HALF_WINDOW, len(rates) - HALF_WINDOW):
        first, last = middle - HALF_WINDOW, middle + HALF_WINDOW
        slope = (losses[last] - losses[first]) / math.log(rates[last] / rates[first])
        if math.isfinite(slope):
            slopes.append((slope, rates[middle]))
    steepest, rate = min(slopes, default=(0.0, None))
    return rate if steepest < 0 else None
