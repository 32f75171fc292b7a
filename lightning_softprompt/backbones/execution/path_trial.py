"""Chooses the path of a batch by trying paths out on some of its rows, the longest and the shortest included.

Right is what each row alone gives. A path is tried out again when a batch goes beyond what was tried, since some models
change how they compute with the length of a row: by windows, chunks, or rotations for long texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_softprompt.backbones.execution.context_cache import ContextCache
from lightning_softprompt.backbones.execution.float32_reference import in_float32
from lightning_softprompt.backbones.execution.lm_head import Head
from lightning_softprompt.backbones.execution.paths import Path, PathFactory
from lightning_softprompt.backbones.execution.row_batch import RowBatch
from lightning_softprompt.backbones.kernels.prepacked_linear import plain_products

TOLERANCE = 1e-4  # relative error of logits in float32
SAMPLE = 4  # rows whose logits in the whole batch are compared
FAILURES = (NotImplementedError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError)


@dataclass(frozen=True)
class Extent:
    """How far batches have gone, in tokens.

    Args:
        row: The longest row.
        total: All rows together.
        head: What all rows begin with.
        past: Keys and values before the rows.
    """

    row: int = 0
    total: int = 0
    head: int = 0
    past: int = 0

    @classmethod
    def of(cls, rows: RowBatch) -> Extent:
        """Of a batch."""
        past = int(rows.first_position.max())
        return cls(int(rows.mask.sum(1).max()), int(rows.mask.sum()), rows.head, past)

    def covers(self, other: Extent) -> bool:
        """Whether another goes no further in anything."""
        return all(mine >= its for mine, its in zip(astuple(self), astuple(other), strict=True))

    def join(self, other: Extent) -> Extent:
        """The further of both in each."""
        return Extent(*map(max, astuple(self), astuple(other)))


def select_path(
    model: PreTrainedModel, factories: Sequence[PathFactory], rows: RowBatch, columns: Tensor, first: Tensor
) -> tuple[int, list[str]]:
    """The number of the first path that agrees with the last, and why those before it do not.

    Args:
        model: One in half precision computes in float32 here, since its own rounding would hide a fault.
        factories: Create the paths; the last one is the reference. A trial does not touch the cache of a run.
        rows: The batch.
        columns: [B, U] where the targets' states are.
        first: [B] the first of them in each row.
    """
    if len(factories) == 1:
        return 0, []
    device = rows.embeds.device.type
    dtype = torch.promote_types(rows.embeds.dtype, torch.float32)
    with plain_products(), torch.inference_mode(False), torch.autocast(device, enabled=False), in_float32(model):
        trial = _Trial(rows.copied(dtype), columns.clone(), first.clone())
        alone = factories[-1](model, Head(model))
        right, whole = trial.results(alone), trial.logits(alone, trial.sample)
        reasons: list[str] = []
        for number, factory in enumerate(factories[:-1]):
            try:
                error = trial.error(factory(model, Head(model), cache=ContextCache(0)), right, whole)
            except FAILURES as reason:
                reasons.append((str(reason).splitlines() or [type(reason).__name__])[0])
                continue
            if error <= TOLERANCE:
                return number, reasons
            reasons.append(f"results would be off by {error:.1e}")
    if not all(bool(result.isfinite().all()) for result in right):
        return len(factories) - 2, reasons  # nothing can be compared, and rows one by one would be no better
    return len(factories) - 1, reasons


@dataclass(frozen=True)
class _Trial:
    """A batch that paths are tried out on.

    Args:
        rows: The batch.
        columns: As in `select_path`.
        first: As in `select_path`.
    """

    rows: RowBatch
    columns: Tensor
    first: Tensor

    @property
    def pair(self) -> list[int]:
        """The longest and the shortest row. A row that is alone is tried out next to itself."""
        lengths = self.rows.mask.sum(1)
        longest = int(lengths.argmax())
        shortest = int(lengths.argmin())
        return [longest, shortest if shortest != longest else (longest + 1) % len(lengths)]

    @property
    def sample(self) -> list[int]:
        """Rows from the shortest to the longest, evenly spaced by rank."""
        order = self.rows.mask.sum(1).argsort(stable=True)
        ranks = torch.linspace(0, len(order) - 1, min(SAMPLE, len(order))).round().long()
        return order[ranks.to(order.device)].tolist()  # type: ignore[no-any-return]

    @torch.no_grad()
    def logits(self, path: Path, chosen: list[int]) -> Tensor:
        """Of some rows that run together."""
        path.enter()
        return path.head.logits(path(self.rows[chosen], self.columns[chosen], self.first[chosen]))

    @torch.no_grad()
    def logits_in_batch(self, path: Path) -> Tensor:
        """Of the sample, all rows of the batch running together."""
        states = path(self.rows, self.columns, self.first)
        own = replace(states, hidden=states.hidden[self.sample])
        return path.head.logits(own if states.logits is None else replace(own, logits=states.logits[self.sample]))

    def results(self, path: Path) -> list[Tensor]:
        """Logits as in evaluation, where more of a prompt is kept, and as in training, with the prompt's gradient."""
        kept = self.logits(path, self.pair)
        rows, columns, first = self.rows[self.pair], self.columns[self.pair], self.first[self.pair]
        with torch.enable_grad():
            embeds = rows.embeds.clone().requires_grad_()
            kv = {n: (k.clone().requires_grad_(), v.clone().requires_grad_()) for n, (k, v) in rows.kv.items()}
            logits = path.head.logits(path(replace(rows, embeds=embeds, kv=kv), columns, first))
            leaves = [embeds, *(t for pair in kv.values() for t in pair)]
            of_embeds, *given = torch.autograd.grad(logits.logsumexp(-1).sum(), leaves)
        where = rows.soft if rows.soft.any() or kv else rows.mask
        # What rows share has its gradient in one of them.
        return [kept, logits.detach(), (of_embeds * where[..., None]).sum(0), *given]

    def error(self, path: Path, right: list[Tensor], whole: Tensor) -> float:
        """How far a path is off, on two rows and on a sample within the whole batch."""
        errors = [_relative(ours, theirs) for ours, theirs in zip(self.results(path), right, strict=True)]
        if len(self.rows.mask) > 2:
            errors.append(_relative(self.logits_in_batch(path), whole))
        return max(errors)


def _relative(ours: Tensor, right: Tensor) -> float:
    """Relative error; without bound where a number is not finite."""
    error = float((ours - right).abs().max() / right.abs().max().clamp(min=1e-30))
    return error if error >= 0 else float("inf")
