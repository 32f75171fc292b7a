"""`TrainingSample`: the metrics of a sample of the training rows, beside those of the validation rows."""

from __future__ import annotations

from itertools import islice
from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_softprompt.data.splits.loader_hooks import LoaderHooks
from lightning_softprompt.methods.stage_metrics import TRAIN_SAMPLE
from lightning_softprompt.methods.trainer_hooks import TrainerHooks, rows_of_limited_pass


class TrainingSample(Callback):
    """Scores a sample of the training rows at each validation, so that overfitting is visible.

    The metrics are those of the validation, without dropout, logged as `train_sample/<metric>`. The sample is spread
    evenly over the lengths of the rows and is the same at each validation. The training itself is not affected.

    Args:
        rows: Number of rows, rounded up to batches of the validation.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the rows and log the metrics, before the validation draws random numbers and sets its metrics."""
        if trainer.sanity_checking:
            return
        module, data = cast(TrainerHooks, pl_module), cast(LoaderHooks, trainer.datamodule)  # type: ignore[attr-defined]
        loader, batches = data.training_sample(self.rows)
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        with torch.random.fork_rng(devices), trainer.precision_plugin.val_step_context():
            module.reset_metrics(TRAIN_SAMPLE, trainer.current_epoch, rows_of_limited_pass(loader))
            for batch in islice(loader, batches):
                module.score(TRAIN_SAMPLE, trainer.strategy.batch_to_device(batch))
        pl_module.log_dict(module.compute_metrics(TRAIN_SAMPLE), rank_zero_only=False)
