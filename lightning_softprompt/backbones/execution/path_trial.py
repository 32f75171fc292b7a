"""Selects the path of a batch by trial runs on some of its rows, including the longest and the shortest.

The reference is the result of each row alone. A batch that exceeds all earlier trials repeats the trial, since some
models compute long rows differently: with windows, chunks, or other position encodings. Such a difference appears in
the logits of the longest row, so a batch that only has longer rows repeats that part alone: 4 rows run forward, instead
of 32 in a first trial with a batch of 16.
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
SAMPLE_SIZE = 4  # rows whose logits in the whole batch are compared
FAILURES = (NotImplementedError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError)


@dataclass(frozen=True)
class Extent:
    """The size of a batch in tokens, or the maximum over several batches.

    Args:
        row: The longest row.
        total: All rows together.
        prefix: The shared prefix.
        past: Keys and values before the rows.
    """

    row: int = 0
    total: int = 0
    prefix: int = 0
    past: int = 0

    @classmethod
    def of(cls, rows: RowBatch) -> Extent:
        """The extent of a batch."""
        longest, total = int(rows.mask.sum(1).max()), int(rows.mask.sum())
        return cls(longest, total, rows.shared_prefix, past=int(rows.first_position.max()))

    def covers(self, other: Extent) -> bool:
        """Whether a trial of this extent is sufficient for the other one.

        No length of the other extent may be larger. Its total may be up to twice as large, since only the number of
        independent rows differs.
        """
        allowed = replace(self, total=2 * self.total)
        return all(ours >= theirs for ours, theirs in zip(astuple(allowed), astuple(other), strict=True))

    def covers_except_rows(self, other: Extent) -> bool:
        """Whether a trial of this extent is sufficient but for the length of the longest row."""
        return self.covers(replace(other, row=0))

    def join(self, other: Extent) -> Extent:
        """The larger value in each respect."""
        return Extent(*map(max, astuple(self), astuple(other)))


def select_path(
    model: PreTrainedModel,
    factories: Sequence[PathFactory],
    rows: RowBatch,
    columns: Tensor,
    first: Tensor,
    only_longer_rows: bool = False,
) -> tuple[int, list[str]]:
    """The index of the first path that agrees with the last one, and the reasons against the paths before it.

    Args:
        model: The model. In half precision it computes in float32 here, since rounding would hide errors.
        factories: Create the paths; the last one is the reference. A trial does not touch the cache of a run.
        rows: The batch.
        columns: [B, U] positions of the states that predict the targets.
        first: [B] the first position in each row.
        only_longer_rows: Whether an earlier trial covers the batch but for its longest row: only the logits of the
            longest and the shortest row are compared.
    """
    if len(factories) == 1:
        return 0, []
    device = rows.embeds.device.type
    dtype = torch.promote_types(rows.embeds.dtype, torch.float32)
    with plain_products(), torch.inference_mode(False), torch.autocast(device, enabled=False), in_float32(model):
        trial = _Trial(rows.copy_detached(dtype), columns.clone(), first.clone(), only_longer_rows)
        expected = trial.expected(factories[-1](model, Head(model)))
        reasons: list[str] = []
        for index, factory in enumerate(factories[:-1]):
            try:
                path = factory(model, Head(model), cache=ContextCache(0))
                error = trial.error(path, expected)
            except FAILURES as failure:
                reasons.append((str(failure).splitlines() or [type(failure).__name__])[0])
                continue
            if error <= TOLERANCE:
                return index, reasons
            reasons.append(f"results would differ by {error:.1e}")
    if not all(bool(result.isfinite().all()) for result in expected):
        return len(factories) - 2, reasons  # the results cannot be compared, and single rows give no better ones
    return len(factories) - 1, reasons


@dataclass(frozen=True)
class _Trial:
    """A batch on which paths are compared.

    Args:
        rows: The batch.
        columns: As in `select_path`.
        first: As in `select_path`.
        only_longer_rows: As in `select_path`.
    """

    rows: RowBatch
    columns: Tensor
    first: Tensor
    only_longer_rows: bool

    @property
    def pair(self) -> list[int]:
        """The longest and the shortest row; a single row is paired with itself."""
        lengths = self.rows.mask.sum(1)
        longest, shortest = int(lengths.argmax()), int(lengths.argmin())
        if shortest == longest:
            return [longest, (longest + 1) % len(lengths)]
        return [longest, shortest]

    @property
    def sample(self) -> list[int]:
        """Rows from the shortest to the longest, evenly spaced by rank."""
        order = self.rows.mask.sum(1).argsort(stable=True)
        ranks = torch.linspace(0, len(order) - 1, min(SAMPLE_SIZE, len(order))).round().long()
        return order[ranks.to(order.device)].tolist()  # type: ignore[no-any-return]

    @property
    def compares_sample(self) -> bool:
        """Whether the sample in the whole batch is compared; one or two rows are the pair already."""
        return len(self.rows.mask) > 2 and not self.only_longer_rows

    @torch.no_grad()
    def logits(self, path: Path, rows: list[int]) -> Tensor:
        """Logits of some rows that run together."""
        path.enter()
        states = path(self.rows[rows], self.columns[rows], self.first[rows])
        return path.head.logits(states)

    @torch.no_grad()
    def logits_in_batch(self, path: Path) -> Tensor:
        """Logits of the sample when all rows of the batch run together."""
        states = path(self.rows, self.columns, self.first)
        logits = None if states.logits is None else states.logits[self.sample]
        return path.head.logits(replace(states, hidden=states.hidden[self.sample], logits=logits))

    def expected(self, reference: Path) -> list[Tensor]:
        """The results of the reference, the logits of the sample last."""
        results = self.results(reference)
        return [*results, self.logits(reference, self.sample)] if self.compares_sample else results

    def results(self, path: Path) -> list[Tensor]:
        """Logits as in evaluation, which caches the prompt, and as in training, with the prompt's gradients."""
        evaluation_logits = self.logits(path, self.pair)
        if self.only_longer_rows:
            return [evaluation_logits]
        rows, columns, first = self.rows[self.pair], self.columns[self.pair], self.first[self.pair]
        with torch.enable_grad():
            embeds = rows.embeds.clone().requires_grad_()
            kv = {}
            for layer, (key, value) in rows.kv.items():
                kv[layer] = key.clone().requires_grad_(), value.clone().requires_grad_()
            trainable_rows = replace(rows, embeds=embeds, kv=kv)
            logits = path.head.logits(path(trainable_rows, columns, first))
            leaves = [embeds, *(tensor for pair in kv.values() for tensor in pair)]
            embeds_grad, *kv_grads = torch.autograd.grad(logits.logsumexp(-1).sum(), leaves)
        mask = rows.soft if rows.soft.any() or kv else rows.mask
        # The gradient of a shared prefix is in one of the rows, so the sum over rows is compared.
        return [evaluation_logits, logits.detach(), (embeds_grad * mask[..., None]).sum(0), *kv_grads]

    def error(self, path: Path, expected: list[Tensor]) -> float:
        """The largest error of a path, on two rows and on a sample within the whole batch."""
        results = self.results(path)
        if self.compares_sample:
            results.append(self.logits_in_batch(path))
        pairs = zip(results, expected, strict=True)
        return max(_relative_error(result, expected_result) for result, expected_result in pairs)


def _relative_error(result: Tensor, expected: Tensor) -> float:
    """The relative error; infinite if a number is not finite."""
    largest = expected.abs().max().clamp(min=1e-30)
    error = float((result - expected).abs().max() / largest)
    return error if error >= 0 else float("inf")
