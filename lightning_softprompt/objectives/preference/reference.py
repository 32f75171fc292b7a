"""`ReferencedObjective`: base class of objectives that compare log-probabilities with those of a frozen reference."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_softprompt.backbones.execution.context_cache import ContextCache
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.checkpoints.frozen_role import START, FrozenRole, autocast_dtype, digest, load_role
from lightning_softprompt.core.types import IGNORE, Batch, Encoded
from lightning_softprompt.objectives.base import Objective
from lightning_softprompt.objectives.preference.losses import count_questions
from lightning_softprompt.objectives.reference_checks import check_reference
from lightning_softprompt.system.cache_dirs import cache_folder

log = logging.getLogger(__name__)
MEMORY = 64 * 2**20  # bytes of cached log-probabilities
SMALL_DIFFERENCE = 0.01  # nats per answer


@dataclass(frozen=True)
class ReferencedObjective(Objective):
    """An objective with a frozen reference, which shares the backbone of the run.

    The log-probabilities of the reference are computed once for each question: the answers of a question run by
    themselves, so that the result does not depend on the batch, and are cached.

    Args:
        reference: `start`, the prompt of the run before its first step; `bare`, the backbone without a prompt; or the
            `prompt.safetensors` or checkpoint of a trained prompt.
        disk: Limit of the cache on disk in MiB, which later runs with the same reference use; 0 caches in memory only.
    """

    reference: str = START
    disk: int = 0

    @abstractmethod
    def reward(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Returns the implicit reward [B] of each answer."""

    @property
    def compares_with_start(self) -> bool:
        """Whether the reference is the start of the run."""
        return self.reference == START

    def check_method(self, method: str, changes_backbone: bool, noise: Sequence[str]) -> None:
        """See `Objective.check_method`."""
        check_reference(type(self).__name__, self.reference, method, changes_backbone, noise)

    def with_reward(self, lm: PromptedLM) -> PromptedLM:
        """Returns the language model with the implicit reward."""
        return lm.with_reward(self.reward)

    def count(self, batch: Batch) -> Tensor:
        """Counts the questions."""
        return count_questions(batch)

    def reference_logprobs(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Returns the log-probabilities [B, U] of the targets by the reference, without gradient."""
        rows = batch.require_encoded()
        parts = []
        with torch.no_grad(), self._role(lm).on(lm) as (frozen, identity):
            cache = self._cache(identity, lm)
            for unit in batch.units():
                encoded = [rows[b]._replace(num_truncated=0) for b in unit]
                tasks = None if batch.task_ids is None else batch.task_ids[unit]
                precision = autocast_dtype(batch.targets.device)
                key = digest(encoded, None if tasks is None else tasks.tolist(), precision)
                logprobs = cache.get(key, partial(_compute, frozen, encoded, tasks, batch.targets.device))
                parts.append(pad(logprobs.to(batch.targets.device), (0, batch.targets.shape[1] - logprobs.shape[1])))
        order = [b for unit in batch.units() for b in unit]
        logprobs = torch.cat(parts)
        return logprobs[torch.tensor(order).argsort()]

    def log_ratios(self, lm: PromptedLM, logprobs: Tensor, batch: Batch) -> Tensor:
        """Returns log-probabilities [B, U] minus those of the reference; 0 at positions without a target."""
        has_target = batch.targets != IGNORE
        ratios = (logprobs - self.reference_logprobs(lm, batch)) * has_target
        self._report(ratios)
        return ratios

    def _report(self, ratios: Tensor) -> None:
        """Logs once how much the policy differs from its reference at the first step."""
        if self.reference == START or not ratios.requires_grad or self._state.get("is_reported"):
            return
        self._state["is_reported"] = True
        difference = float(ratios.detach().sum(1).abs().mean())
        if difference > SMALL_DIFFERENCE:
            log.info(
                "The policy differs from its reference (%s) by %.2f nats per answer at the first step; with the "
                "reference start, it would not", self.reference, difference,
            )  # fmt: skip

    def _role(self, lm: PromptedLM) -> FrozenRole:
        if "role" not in self._state:
            self._state["role"] = load_role(self.reference, lm.backbone)
        role: FrozenRole = self._state["role"]
        return role

    def _cache(self, identity: str, lm: PromptedLM) -> ContextCache:
        """Returns the cache of a role, in a folder that depends on role, backbone and precision."""
        caches = self._state.setdefault("caches", {})
        if identity not in caches:
            folder = None
            if self.disk:
                key = digest(identity, lm.backbone.fingerprint(), lm.backbone.spec.dtype)
                folder = cache_folder("references", key)
            # entries move to the disk from memory, so that a disk cache has no memory of its own
            caches[identity] = ContextCache(0 if self.disk else MEMORY, self.disk * 2**20, folder)
        cache: ContextCache = caches[identity]
        return cache

    @cached_property
    def _state(self) -> dict[str, Any]:
        return {}


def _compute(lm: PromptedLM, rows: Sequence[Encoded], tasks: Tensor | None, device: torch.device) -> Tensor:
    """Returns the log-probabilities [rows, U] of the targets of a question, in a batch of their own."""
    batch = lm.backbone.codec.collate(rows, task_ids=None if tasks is None else tasks.cpu())
    return lm.logprobs(batch.to(device))
