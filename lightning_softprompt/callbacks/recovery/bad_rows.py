"""Identifies the rows of a batch that cause a non-finite loss or gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_softprompt.core.types import Batch
from lightning_softprompt.methods.optimizers import trainable_parameters
from lightning_softprompt.methods.trainer_hooks import TrainerHooks


def find_nonfinite_rows(module: LightningModule, *batches: Batch) -> list[dict[str, Any]]:
    """Find the rows whose loss or gradient is non-finite if they run alone; if there are none, return all rows.

    Rows that answer the same question run together, since their loss compares them. They have one record.

    The state of the random number generators does not change. Each record has the row's number, text, target and loss,
    whether its gradient is finite, and `whole_batch`: whether the failure occurs only in the full batch.

    Args:
        module: The module.
        batches: The rows of each of its methods, or the same rows for all of them.
    """
    methods = cast(TrainerHooks, module).methods
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        rows = batches if len(batches) == len(methods) else batches * len(methods)
        records = [_run_unit(methods, rows, unit) for unit in rows[0].units()]
    bad = [record for record in records if record["loss"] is None or not record["gradient_is_finite"]]
    return [{**record, "whole_batch": not bad} for record in bad or records]


def _run_unit(methods: Any, batches: Sequence[Batch], unit: list[int]) -> dict[str, Any]:
    parts = [batch.only(unit) for batch in batches]
    losses = [method.step(rows)["loss"] for method, rows in zip(methods, parts, strict=True)]
    loss = torch.stack(losses).sum()
    parameters = [parameter for method in methods for parameter in trainable_parameters(method).values()]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients if gradient is not None)
    value = float(loss.detach())
    result = {"loss": value if math.isfinite(value) else None, "gradient_is_finite": finite}
    return {"row": parts[0].global_row_ids[0], **_describe(methods[0], parts[0]), **result}


def _describe(method: nn.Module, rows: Batch) -> dict[str, str]:
    """The text and target of the first row, or its decoded input tokens."""
    if rows.examples is not None:
        example = rows.examples[0]
        return {"text": " | ".join(example.fields.values()), "target": example.target}
    ids = rows.input_ids[0][rows.mask[0]].tolist()
    return {"text": method.loaded.codec.tokenizer.decode(ids), "target": ""}  # type: ignore[union-attr,operator]
