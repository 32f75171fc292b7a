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
        after: Steps of training before anything is dropped.
        tokens: Share of the soft tokens that is kept.
        pieces: Share of the pieces of those that is kept.
        measured: Steps over which importance is summed.
        rewind: Whether what is left goes back to its values of step `after`.
        keep: What is kept: the most important, or as controls the `worst` or `random` ones.
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
            raise ValueError(f"tokens and pieces are shares that are kept, above 0 and up to 1, got {tokens}, {pieces}")
        if not 0 < measured <= after:
            raise ValueError(f"measured must be from 1 to after={after}, got {measured}")
        self.after, self.tokens, self.pieces = after, tokens, pieces
        self.measured, self.rewind, self.keep = measured, rewind, keep
        self.importance: Tensor | None = None  # [2, P, pieces] of pieces, and of the tokens they belong to
        self.before: Tensor | None = None  # [P, H], the soft tokens of step `after`

    def state_dict(self) -> dict[str, Any]:
        """What has been measured, so that a resumed run prunes alike."""
        return {"importance": self.importance, "before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on measuring."""
        self.importance, self.before = state_dict["importance"], state_dict["before"]

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuses methods that it cannot prune."""
        if not hasattr(pl_module, "kept_pieces"):
            raise ValueError(f"the callback Pruning is for the method XPrompt, not for {type(pl_module).__name__}")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Measures; a gradient that is not finite says nothing."""
        step, grad = trainer.global_step + 1, pl_module.tokens.grad
        measured = any(end - self.measured < step <= end for end in (self.after, self.after + self.measured))
        if measured and grad.isfinite().all():
            gates = pl_module.in_pieces((grad * pl_module.tokens).detach()).sum(-1)  # [P, pieces] of this step
            now = torch.stack([gates.abs(), gates.sum(1, keepdim=True).abs().expand_as(gates)])
            self.importance = now if self.importance is None else self.importance.to(now) + now

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Prunes at the two steps; a batch that was only accumulated is no step."""
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
        kept = self._chosen(importance, method.kept_tokens, self.tokens)
        method.kept_tokens.copy_(kept)
        log.info("pruned to %d of %d soft tokens", int(kept.sum()), len(kept))

    def _prune_pieces(self, method: Any, importance: Tensor) -> None:
        alive = method.kept_pieces & method.kept_tokens[:, None]
        kept = self._chosen(importance, alive, self.pieces)
        method.kept_pieces.copy_(kept | ~method.kept_tokens[:, None])
        log.info("pruned to %d of %d pieces", int(kept.sum()), int(alive.sum()))

    def _chosen(self, importance: Tensor, alive: Tensor, share: float) -> Tensor:
        """Of those alive, the share that is kept; at least one."""
        score = {"best": importance, "worst": -importance, "random": torch.rand_like(importance)}[self.keep]
        count = max(1, round(share * int(alive.sum())))
        kept = torch.zeros_like(alive).flatten()
        kept[score.masked_fill(~alive, float("-inf")).flatten().topk(count).indices] = True
        return kept.view_as(alive)

    def _rewind(self, trainer: Trainer, method: Any) -> None:
        if not self.rewind or self.before is None:
            return
        with torch.no_grad():
            method.tokens.copy_(self.before)
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
