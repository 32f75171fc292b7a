"""`LoaderHooks`: what Lightning's Trainer calls to prepare the splits of a data module and to load their batches."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from typing import Any, Self, cast, final

from lightning import LightningDataModule

from lightning_softprompt.data.prepared import PreparedRows, Split
from lightning_softprompt.data.sampling.bucketing import Order, ResumableLoader
from lightning_softprompt.data.sampling.limits import LimitableSampler, count_batches, describe_limit

log = logging.getLogger(__name__)


class LoaderHooks(LightningDataModule, ABC):
    """Setup and loaders of a data module, under the limits of the Trainer.

    A data module need not know this class: its contract is `SoftPromptDataModule`.
    """

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Raises an error, since checkpoints of this package do not contain the data module.

        Raises:
            ValueError: Always.
        """
        raise ValueError("checkpoints do not contain the data module; create it from config.yaml in the run folder")

    @abstractmethod
    def split(self, name: Split) -> PreparedRows:
        """Returns a tokenized split, which is prepared on first use."""

    @abstractmethod
    def build_loader(self, name: Split, order: Order) -> ResumableLoader:
        """Returns the loader of a split.

        Args:
            name: The split.
            order: The order of its rows.
        """

    @property
    def ranks(self) -> tuple[int, int]:
        """Rank of this process, and the number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def log_once(self, line: str) -> None:
        """Logs a line on the main process."""
        if self.ranks[0] == 0:
            log.info(line)

    @final
    def setup(self, stage: str) -> None:
        """Prepares all splits of a stage, so that a bad row is reported before training starts."""
        needed: dict[str, tuple[Split, ...]] = {
            "fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",),
        }  # fmt: skip
        for name in needed[stage]:
            self.split(name)

    @final
    def train_dataloader(self) -> ResumableLoader:
        """Batches of rows of similar length; seed and epoch determine their order.

        With `overfit_batches`, every epoch uses the batches of the first epoch. An objective that takes several steps
        for a batch, such as `PPO`, gets it for each of them.
        """
        module = None if self.trainer is None else self.trainer.lightning_module
        loader = self.build_loader("train", "shuffled").repeated(getattr(module, "steps_per_batch", 1))
        loader.batch_sampler.repeats = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        if loader.batch_sampler.repeats:
            self.log_once("overfit_batches: every epoch trains on the batches of the first epoch")
        return loader

    @final
    def val_dataloader(self) -> ResumableLoader:
        """Each validation row once; with `limit_val_batches`, an even sample of them."""
        return self._evaluation_loader("validation", "limit_val_batches")

    @final
    def test_dataloader(self) -> ResumableLoader:
        """Each test row once; with `limit_test_batches`, an even sample of them."""
        return self._evaluation_loader("test", "limit_test_batches")

    def _evaluation_loader(self, name: Split, option: str) -> ResumableLoader:
        """The rows that an evaluation scores, the longest first."""
        loader = self.build_loader(name, "longest_first")
        sampler = cast(LimitableSampler, loader.batch_sampler)
        limit = 1.0 if self.trainer is None else getattr(self.trainer, option)
        batches = count_batches(limit, sampler.most_batches)
        if 0 < batches < sampler.most_batches:
            sampler.draw(batches)
            self.log_once(describe_limit(name, option, limit, sampler.drawn or [], len(self.split(name))))
        return loader

    @final
    def training_sample(self, rows: int) -> tuple[ResumableLoader, int]:
        """Returns a loader whose first batches are an even sample of the training rows, and their number.

        Args:
            rows: Number of rows on all processes, rounded up to batches.
        """
        loader = self.build_loader("train", "longest_first")
        sampler = cast(LimitableSampler, loader.batch_sampler)
        rows_per_batch = len(self.split("train")) / sampler.most_batches
        batches = math.ceil(rows / rows_per_batch)
        if batches < sampler.most_batches:
            sampler.draw(batches)
        return loader, batches

    @final
    def predict_dataloader(self) -> ResumableLoader:
        """Each row once, in the order of the source; with `limit_predict_batches`, only the first rows."""
        loader = self.build_loader("predict", "given")
        limit = 1.0 if self.trainer is None else self.trainer.limit_predict_batches
        if count_batches(limit, len(loader)) < len(loader):
            self.log_once(f"limit_predict_batches={limit}: only the first rows of the source are predicted")
        return loader
