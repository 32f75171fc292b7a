"""Which rows of a batch make a loss or a gradient that is not finite."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_softprompt.callbacks.reporting.prompt_watch import trainable
from lightning_softprompt.core.types import Batch


def blamed(module: LightningModule, batch: Batch) -> list[dict[str, Any]]:
    """Those of the rows whose loss or gradient is not finite where they run alone; all of them where none is so.

    Random numbers go on as if nothing had been run. Each row is told by number, text, target, loss, whether its
    gradient is finite, and `whole_batch`: that it is named for the company it was in.
    """
    methods = getattr(module, "replicas", [module])
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        tried = [_tried(methods, batch, b) for b in range(len(batch))]
    bad = [record for record in tried if record["loss"] is None or not record["gradient_is_finite"]]
    return [{**record, "whole_batch": not bad} for record in bad or tried]


def _tried(methods: Any, batch: Batch, b: int) -> dict[str, Any]:
    row = batch.only([b])
    loss = torch.stack([method.step(row)["loss"] for method in methods]).sum()
    parameters = [parameter for method in methods for parameter in trainable(method)]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients if gradient is not None)
    value = float(loss.detach())
    told = {"loss": value if math.isfinite(value) else None, "gradient_is_finite": finite}
    return {"row": batch.global_row_ids[b], **_said(methods[0], row), **told}


def _said(method: nn.Module, row: Batch) -> dict[str, str]:
    """The row as people know it, or as the backbone read it."""
    if row.examples is not None:
        (example,) = row.examples
        return {"text": " | ".join(example.fields.values()), "target": example.target}
    ids = row.input_ids[0][row.mask[0]].tolist()
    return {"text": method.loaded.codec.tokenizer.decode(ids), "target": ""}  # type: ignore[union-attr,operator]
