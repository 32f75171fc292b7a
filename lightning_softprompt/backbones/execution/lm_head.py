"""The vocabulary projection: it runs for target positions only, and for the words that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lightning_softprompt.core.refusals import UnsupportedBackboneError
from lightning_softprompt.core.types import IGNORE

CHUNK = 128  # targets whose logits over the whole vocabulary are held at once


@dataclass(frozen=True)
class States:
    """What a run of the model leaves for its head.

    Args:
        hidden: [B, U, H], the head's input at the targets.
        logits: [B, U, V] where the model does more to them than its head does; else None.
    """

    hidden: Tensor
    logits: Tensor | None

    @classmethod
    def join(cls, parts: Sequence[States]) -> States:
        """Of rows that ran in parts."""
        logits = [part.logits for part in parts if part.logits is not None]
        return cls(torch.cat([part.hidden for part in parts]), torch.cat(logits) if logits else None)


class Head:
    """The last layer of a model.

    Some models cap, scale or shift what their head gives. The first run finds out; where it is so, the logits are the
    model's own.

    Args:
        model: The transformers model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.layer = cast(nn.Linear, model.get_output_embeddings())
        self.headless = getattr(model, "headless", False)
        self.plain: bool | None = None

    def states(self, run: Callable[[], Any], columns: Tensor, packed: Tensor | None = None) -> States:
        """Runs the model, its head on target positions at most.

        Args:
            run: Calls the model.
            columns: [B, U] where the targets' states are in each row.
            packed: [1, B * U] where they are in a packed row, if the model sees one.

        Raises:
            ValueError: If the model has no head, or one that does not take one state for each token.
        """
        if self.headless:
            raise ValueError(
                "the backbone came without a language-modelling head and can say no words; set --model.readout to "
                "ClassHead or TokenHead, or take another backbone"
            )
        seen: list[Tensor] = []

        def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if args[0].dim() != 3:
                raise UnsupportedBackboneError(
                    f"its head takes states with {args[0].dim()} dimensions, such as those of several predictions for "
                    f"each token, and one state for each token is required."
                )
            places = columns if packed is None else packed
            seen.append(args[0].gather(1, places[..., None].expand(-1, -1, args[0].shape[2])))
            return (seen[0][:, :0] if self.plain else seen[0], *args[1:])

        handle = self.layer.register_forward_pre_hook(select)
        try:
            logits = run().logits
        finally:
            handle.remove()
        if not seen:
            raise UnsupportedBackboneError("the model computes its logits without calling its head.")
        hidden = seen[0].view(*columns.shape, -1)
        if self.plain is None:
            self.plain = _same(logits, self._project(seen[0]))
        return States(hidden, None if self.plain else logits.view(*columns.shape, -1))

    def logits(self, states: States, words: Tensor | None = None) -> Tensor:
        """[B, U, V], or [B, U, W] of W words."""
        if states.logits is not None:
            return states.logits if words is None else states.logits[..., words]
        return self._project(states.hidden, words)

    def _project(self, hidden: Tensor, words: Tensor | None = None) -> Tensor:
        if words is None:
            return self.layer(hidden)  # type: ignore[no-any-return]
        bias = getattr(self.layer, "bias", None)
        return linear(hidden, self.layer.weight[words], None if bias is None else bias[words])

    def cross_entropy(self, states: States, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """[B, U] of the targets [B, U], in float32; 0 where there is none.

        Many targets are taken in pieces whose logits are made again in the backward pass.
        """
        loss = partial(cross_entropy, ignore_index=IGNORE, reduction="none", label_smoothing=label_smoothing)
        flat = targets.flatten()
        if states.logits is not None:
            return loss(states.logits.flatten(0, 1).float(), flat).view(targets.shape)

        def piece(hidden: Tensor, said: Tensor) -> Tensor:
            return loss(self._project(hidden).float(), said)

        pairs = zip(states.hidden.flatten(0, 1).split(CHUNK), flat.split(CHUNK), strict=True)
        if len(flat) <= CHUNK or not torch.is_grad_enabled():
            return torch.cat([piece(*pair) for pair in pairs]).view(targets.shape)
        return torch.cat([checkpoint(piece, *pair, use_reentrant=False) for pair in pairs]).view(targets.shape)


def _same(logits: Tensor, ours: Tensor) -> bool:
    return logits.shape == ours.shape and torch.allclose(logits.float(), ours.float(), rtol=1e-5)
