"""Pruning of soft tokens and of their pieces, with rewinding (Ma et al. 2022, XPrompt, arXiv 2210.04457)."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.optim import Optimizer

log = logging.getLogger(__name__)


class Pruning(Callback):
    """Prunes soft tokens, then pieces of the remaining ones, then rewinds the rest and continues training.

    The importance of a token or piece is the gradient of the loss with respect to a gate of one on it,
    `|<dL/dP, P>|`, summed over the last steps. Tokens are pruned at step `after`, pieces `measured` steps later. Then
    the remaining values return to those of step `after`, and the state of the optimizer is reset.

    Args:
        after: Training steps before the first pruning.
        tokens: Share of the soft tokens that remain.
        pieces: Share of the pieces of the remaining tokens that remain.
        measured: Steps over which importance is summed.
        rewind: Whether the remaining values return to those of step `after`.
        keep: Which ones remain: the most important (`best`), or as controls the `worst` or `random` ones.
    """

    def __init__(
        self,
        after: int = 100,
        tokens: float = 0.5,
        pieces: float = 0.5,
        measured: int = 20,
        rewind: bool = True,
        keep: Literal["best", "worst", "random"] = "best",
    ) -> None:
        if not (0 < tokens <= 1 and 0 < pieces <= 1):
            raise ValueError(f"tokens and pieces must be shares above 0 and up to 1, got {tokens}, {pieces}")
        if not 0 < measured <= after:
            raise ValueError(f"measured must be from 1 to after={after}, got {measured}")
        self.after, self.tokens, self.pieces = after, tokens, pieces
        self.measured, self.rewind, self.keep = measured, rewind, keep
        self.importance: Tensor | None = None  # [2, P, pieces] of pieces, and of the tokens they belong to
        self.before: Tensor | None = None  # [P, H], the soft tokens of step `after`

    def state_dict(self) -> dict[str, Any]:
        """The importance so far, so that a resumed run prunes the same tokens and pieces."""
        return {"importance": self.importance, "before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the importance so far."""
        self.importance, self.before = state_dict["importance"], state_dict["before"]

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse methods that cannot be pruned."""
        if not hasattr(pl_module, "kept_pieces"):
            raise ValueError(f"the callback Pruning is for the method XPrompt, not for {type(pl_module).__name__}")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Add the importance of a step, unless its gradient is not finite."""
        step, gradient = trainer.global_step + 1, pl_module.tokens.grad
        is_measured = any(end - self.measured < step <= end for end in (self.after, self.after + self.measured))
        if not is_measured or not gradient.isfinite().all():
            return
        products = (gradient * pl_module.tokens).detach()  # [P, H]
        of_pieces = pl_module.in_pieces(products).sum(-1)  # [P, pieces], gradients of the gates
        of_tokens = of_pieces.sum(1, keepdim=True).expand_as(of_pieces)
        importance = torch.stack([of_pieces, of_tokens]).abs()
        self.importance = importance if self.importance is None else self.importance.to(importance) + importance

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Prune at the two steps; a batch that is only accumulated takes no step."""
        if self.importance is None:
            return
        if trainer.global_step == self.after and self.before is None:
            self.before = pl_module.tokens.detach().clone()
            self._prune_tokens(pl_module, self.importance[1][:, 0])
            self.importance = None
        elif trainer.global_step == self.after + self.measured:
            self._prune_pieces(pl_module, self.importance[0])
            self.importance = None
            self._rewind(trainer, pl_module)

    def _prune_tokens(self, method: Any, importance: Tensor) -> None:
        remaining = self._select(importance, method.kept_tokens, self.tokens)
        method.kept_tokens.copy_(remaining)
        log.info("pruned to %d of %d soft tokens", int(remaining.sum()), len(remaining))

    def _prune_pieces(self, method: Any, importance: Tensor) -> None:
        candidates = method.kept_pieces & method.kept_tokens[:, None]
        remaining = self._select(importance, candidates, self.pieces)
        method.kept_pieces.copy_(remaining | ~method.kept_tokens[:, None])
        log.info("pruned to %d of %d pieces", int(remaining.sum()), int(candidates.sum()))

    def _select(self, importance: Tensor, candidates: Tensor, share: float) -> Tensor:
        """Returns the mask of the share of the candidates that remain, at least one."""
        scores = {"best": importance, "worst": -importance, "random": torch.rand_like(importance)}[self.keep]
        scores = scores.masked_fill(~candidates, float("-inf")).flatten()
        count = max(1, round(share * int(candidates.sum())))
        remaining = torch.zeros_like(candidates).flatten()
        remaining[scores.topk(count).indices] = True
        return remaining.view_as(candidates)

    def _rewind(self, trainer: Trainer, method: Any) -> None:
        if not self.rewind or self.before is None:
            return
        with torch.no_grad():
            method.tokens.copy_(self.before)
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
