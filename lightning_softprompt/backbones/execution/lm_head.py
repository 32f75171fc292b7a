"""The language-modeling head, applied to target positions only, and to selected words if requested."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lightning_softprompt.backbones.insertion.token_rows import Rows, TokenSlots
from lightning_softprompt.core.refusals import UnsupportedBackboneError
from lightning_softprompt.core.types import IGNORE

CHUNK = 128  # targets whose logits over the whole vocabulary are in memory at once


@dataclass(frozen=True)
class States:
    """The input of the head, as a run of the model leaves it.

    Args:
        hidden: [B, U, H], the head's input at the targets.
        logits: [B, U, V] if the model changes the output of its head; else None.
    """

    hidden: Tensor
    logits: Tensor | None

    @classmethod
    def join(cls, parts: Sequence[States]) -> States:
        """Joins the states of rows that ran in parts."""
        logits = [part.logits for part in parts if part.logits is not None]
        return cls(torch.cat([part.hidden for part in parts]), torch.cat(logits) if logits else None)


class TargetScores(NamedTuple):
    """What a distribution over the next token says about targets; 0 where a target is ignored. All in float32.

    Args:
        logprobs: Log-probabilities [B, U] of the targets.
        entropies: Entropies [B, U] of the distributions in nats, without gradient.
    """

    logprobs: Tensor
    entropies: Tensor


class Head:
    """The language-modeling head of a model.

    Some models cap, scale or shift the output of their head. The first run determines whether a model does; if so, the
    logits of the model itself are used.

    Args:
        model: The transformers model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.layer = cast(nn.Linear, model.get_output_embeddings())
        self.headless = getattr(model, "headless", False)
        self.is_plain: bool | None = None  # whether the model leaves the output of its head unchanged
        self.replaced: list[tuple[TokenSlots, Rows]] = []  # tokens with trainable rows in place of the head's

    def replace_rows(self, slots: TokenSlots, rows: Rows) -> None:
        """Computes the logits of some tokens from trainable rows in place of the head's; the bias is unchanged.

        Args:
            slots: The tokens.
            rows: Returns their rows.
        """
        self.replaced.append((slots, rows))

        def replace(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            bias = getattr(self.layer, "bias", None)
            logits = linear(args[0], rows().to(args[0]), None if bias is None else bias[slots.ids])
            return out.index_copy(-1, slots.ids, logits.to(out.dtype))

        self.layer.register_forward_hook(replace)

    def states(self, run: Callable[[], Any], columns: Tensor, packed: Tensor | None = None) -> States:
        """Runs the model, with its head at the target positions only.

        Args:
            run: Calls the model.
            columns: [B, U] positions of the targets' states in each row.
            packed: [1, B * U] their positions in the packed sequence, if the model runs one.

        Raises:
            ValueError: If the model has no head, or its input is not one state for each token.
        """
        if self.headless:
            raise ValueError(
                "the checkpoint of the backbone has no language-modeling head, so it cannot predict words; set "
                "--model.readout to ClassHead or TokenHead, or use another backbone"
            )
        selected: list[Tensor] = []

        def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if args[0].dim() != 3:
                raise UnsupportedBackboneError(
                    f"the input of its head has {args[0].dim()} dimensions, as if it made several predictions for each "
                    f"token, and one state for each token is required."
                )
            positions = columns if packed is None else packed
            index = positions[..., None].expand(-1, -1, args[0].shape[2])
            hidden = args[0].gather(1, index)
            selected.append(hidden)
            # The logits of a plain head are computed later, where they are needed.
            return (selected[0][:, :0] if self.is_plain else selected[0], *args[1:])

        handle = self.layer.register_forward_pre_hook(select)
        try:
            logits = run().logits
        finally:
            handle.remove()
        if not selected:
            raise UnsupportedBackboneError("the model computes its logits without calling its head.")
        hidden = selected[0].view(*columns.shape, -1)
        if self.is_plain is None:
            self.is_plain = _is_close(logits, self._project(selected[0]))
        return States(hidden, None if self.is_plain else logits.view(*columns.shape, -1))

    def logits(self, states: States, words: Tensor | None = None) -> Tensor:
        """[B, U, V], or [B, U, W] of the token ids `words` [W]."""
        if states.logits is not None:
            return states.logits if words is None else states.logits[..., words]
        return self._project(states.hidden, words)

    def _project(self, hidden: Tensor, words: Tensor | None = None) -> Tensor:
        if words is None:
            return self.layer(hidden)  # type: ignore[no-any-return]
        bias = getattr(self.layer, "bias", None)
        weight = self.layer.weight[words]
        for slots, rows in self.replaced:
            weight = slots.replace(rows(), words, weight)
        return linear(hidden, weight, None if bias is None else bias[words])

    def cross_entropy(self, states: States, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy [B, U] of the targets [B, U], in float32; 0 where a target is ignored."""
        loss = partial(cross_entropy, ignore_index=IGNORE, reduction="none", label_smoothing=label_smoothing)
        return self._by_chunk(loss, states, targets).view(targets.shape)

    def target_scores(self, states: States, targets: Tensor, temperature: float = 1.0) -> TargetScores:
        """Scores of the targets [B, U] under the distribution of logits divided by a temperature."""

        def score(logits: Tensor, chunk: Tensor) -> Tensor:
            scaled = logits if temperature == 1 else logits / temperature
            losses = cross_entropy(scaled, chunk, ignore_index=IGNORE, reduction="none")
            with torch.no_grad():
                log_p = scaled.log_softmax(-1)
                entropies = -(log_p.exp() * log_p).sum(-1).where(chunk != IGNORE, 0)
            return torch.stack([-losses, entropies], -1)

        logprobs, entropies = self._by_chunk(score, states, targets).view(*targets.shape, 2).unbind(-1)
        return TargetScores(logprobs, entropies.detach())

    def _by_chunk(self, function: Callable[[Tensor, Tensor], Tensor], states: States, targets: Tensor) -> Tensor:
        """Applies a function of logits [N, V] in float32 and targets [N] to all B * U targets and joins its results.

        Many targets are processed in chunks, whose logits the backward pass recomputes.
        """
        flat_targets = targets.flatten()
        if states.logits is not None:
            return function(states.logits.flatten(0, 1).float(), flat_targets)

        def apply(hidden: Tensor, chunk: Tensor) -> Tensor:
            return function(self._project(hidden).float(), chunk)

        chunks = zip(states.hidden.flatten(0, 1).split(CHUNK), flat_targets.split(CHUNK), strict=True)
        if len(flat_targets) <= CHUNK or not torch.is_grad_enabled():
            results = [apply(*chunk) for chunk in chunks]
        else:
            results = [checkpoint(apply, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.cat(results)


def _is_close(logits: Tensor, others: Tensor) -> bool:
    return logits.shape == others.shape and torch.allclose(logits.float(), others.float(), rtol=1e-5)
