"""A validation after the last step of a training that would end before its first one."""

from __future__ import annotations

import math
from typing import final

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_softprompt.methods.optimizers import count_training_steps


@final
class FinalValidation(Callback):
    """Validates after the last step if the training is too short for any validation.

    Lightning validates at the end of an epoch by default. Without this callback, a training of fewer steps would save a
    prompt that has not been evaluated.
    """

    def __init__(self) -> None:
        self._replaced: tuple[int | float | None, int | None] | None = None  # the Trainer's own intervals

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the interval of validation."""
        batches = count_training_batches(trainer)
        if batches is None or not trainer.enable_validation or batches >= first_validation(trainer):
            return
        self._replaced = (trainer.val_check_batch, trainer.check_val_every_n_epoch)
        trainer.val_check_batch = batches
        trainer.check_val_every_n_epoch = None  # count batches over all epochs

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the intervals for the next training of this Trainer."""
        if self._replaced is not None:
            trainer.val_check_batch, trainer.check_val_every_n_epoch = self._replaced
            self._replaced = None


def count_training_batches(trainer: Trainer) -> int | None:
    """Returns the number of batches of the whole training; None if it is unlimited or unknown."""
    steps = count_training_steps(trainer)
    if steps is None or math.isinf(steps):
        return None
    accumulated = trainer.accumulate_grad_batches
    batches = trainer.num_training_batches
    if math.isinf(batches):
        return int(steps) * accumulated
    steps_per_epoch = math.ceil(batches / accumulated)  # the last batch of an epoch always completes a step
    epochs, more_steps = divmod(int(steps), steps_per_epoch)
    return int(epochs * batches + more_steps * accumulated)


def first_validation(trainer: Trainer) -> float:
    """Returns the number of batches before the first validation; infinite if there is none.

    It is 0 if the interval is a time, which may pass at any batch.
    """
    interval, every = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if interval is None:
        return 0
    if every is None or every == 1:
        return interval
    return (every - 1) * trainer.num_training_batches + interval


def count_validations(trainer: Trainer, batches: int) -> int:
    """Returns the number of validations during the first batches of a training.

    It is 0 if the interval of validations is a time, or an epoch of unknown length.
    """
    interval, every = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if interval is None or math.isinf(interval) or not trainer.enable_validation:
        return 0
    if every is None:
        return int(batches // interval)
    epochs, batches_of_epoch = divmod(batches, trainer.num_training_batches)
    validations_per_epoch = trainer.num_training_batches // interval
    is_validated = (epochs + 1) % every == 0  # the epoch that has begun
    return int(epochs // every * validations_per_epoch + (batches_of_epoch // interval if is_validated else 0))
