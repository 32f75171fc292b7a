"""Fits the reward head of a run before its first step."""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_softprompt.core.answer_pairs import pairs_of
from lightning_softprompt.distributed.collectives import gather_objects
from lightning_softprompt.methods.trainer_hooks import TrainerHooks

log = logging.getLogger(__name__)


class HeadFit(Callback):
    """Fits reward heads with `fit_first` to the training pairs at the initial prompt. A resumed run does not repeat it.

    It takes one pass over the training rows without gradients. Heads without the option are unchanged.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit the head of each method, unless the run was resumed."""
        if trainer.ckpt_path is not None:
            return
        for method in cast(TrainerHooks, pl_module).methods:
            if getattr(cast(Any, method).readout, "fit_first", False):
                self._fit(trainer, method)

    @torch.no_grad()
    def _fit(self, trainer: Trainer, method: Any) -> None:
        training = method.training
        method.eval()
        parts = []
        for batch in trainer.datamodule.build_loader("train", "longest_first"):  # type: ignore[attr-defined]
            rows = batch.to(method.device)
            features = method.readout.features(method.lm(), rows)
            pairs = pairs_of(rows)
            parts.append(torch.stack([features[pairs.better], features[pairs.worse]]).float().cpu())
        method.train(training)
        gathered: list[Tensor] = gather_objects(torch.cat(parts, dim=1))  # [2, N, H] of each process
        better, worse = torch.cat(gathered, dim=1).to(method.device)
        margins = method.readout.fit(better, worse)
        if trainer.is_global_zero:
            accuracy = float((margins > 0).double().mean())
            log.info(
                "Fitted the reward head to %d pairs of training answers; it is right on %.3f", len(margins), accuracy
            )
