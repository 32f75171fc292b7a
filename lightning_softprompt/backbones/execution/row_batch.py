"""The rows of a batch as a decoder-only backbone runs them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_softprompt.backbones.execution.packing import Past, shared_head
from lightning_softprompt.backbones.insertion.key_values import refuse_unknown
from lightning_softprompt.backbones.insertion.splice import Spliced
from lightning_softprompt.core.types import Batch, Pairs, SoftPrompt

SOFT = 2**31  # above every token id


@dataclass(frozen=True)
class RowBatch:
    """Rows with their soft blocks in place, padded at the end.

    Args:
        embeds: [B, M, H].
        mask: [B, M] bool.
        keys: [B, M] numbers that are equal only where rows have the same token; those of text are its ids.
        soft: [B, M] bool, True on soft tokens.
        kv: Keys and values that all tokens see, by layer.
        kv_inside: [B, P] bool, which of them each row has; None is all.
    """

    embeds: Tensor
    mask: Tensor
    keys: Tensor
    soft: Tensor
    kv: Pairs = field(default_factory=dict)
    kv_mask: Tensor | None = None

    @classmethod
    def of(cls, spliced: Spliced, batch: Batch, prompt: SoftPrompt | None) -> RowBatch:
        """The rows of a batch.

        Raises:
            ValueError: If the prompt is for attentions that a decoder does not have.
        """
        prompt = prompt or SoftPrompt()
        refuse_unknown(prompt.kv, ["self"])
        tokens, shift = prompt.tokens, prompt.shift
        length = 0 if tokens is None else tokens.shape[1]
        own = -torch.arange(1, len(batch) + 1, device=batch.input_ids.device)[:, None]  # [B, 1] never equal
        same = SOFT + torch.arange(length, device=own.device).expand(len(batch), -1)
        each = same if tokens is None or len(tokens) == 1 else own.expand_as(same)
        text = batch.input_ids if shift is None else own.expand_as(batch.input_ids)
        keys = torch.cat([each, text], dim=1).gather(1, spliced.order)
        soft = (spliced.order < length) & spliced.mask
        return cls(spliced.embeds, spliced.mask, keys, soft, prompt.kv.get("self", {}), prompt.kv_mask.get("self"))

    def __getitem__(self, rows: list[int]) -> RowBatch:
        kv = {n: (k[rows], v[rows]) if len(k) > 1 else (k, v) for n, (k, v) in self.kv.items()}
        inside = None if self.kv_mask is None else self.kv_mask[rows]
        return RowBatch(self.embeds[rows], self.mask[rows], self.keys[rows], self.soft[rows], kv, inside)

    def copied(self, dtype: torch.dtype) -> RowBatch:
        """In another precision, and apart from what it was made of."""
        kv = {n: (k.detach().to(dtype, copy=True), v.detach().to(dtype, copy=True)) for n, (k, v) in self.kv.items()}
        embeds = self.embeds.detach().to(dtype, copy=True)
        inside = None if self.kv_mask is None else self.kv_mask.clone()
        return RowBatch(embeds, self.mask.clone(), self.keys.clone(), self.soft.clone(), kv, inside)

    @cached_property
    def injected(self) -> Past | None:
        """The keys and values that all tokens see."""
        if not self.kv:
            return None
        key, _ = next(iter(self.kv.values()))
        if self.kv_mask is None:
            return Past(self.kv, self.mask.new_ones(len(key), key.shape[2]))
        own = (len(self.kv_mask), -1, -1, -1)
        return Past({n: (k.expand(own), v.expand(own)) for n, (k, v) in self.kv.items()}, self.kv_mask)

    @property
    def injection(self) -> SoftPrompt:
        """What is injected, as a prompt of nothing else."""
        inside = {} if self.kv_mask is None else {"self": self.kv_mask}
        return SoftPrompt(kv={"self": self.kv} if self.kv else {}, kv_mask=inside)

    @property
    def first_position(self) -> Tensor:
        """[B|1] tokens of each row begin to count behind what is injected."""
        return self.mask.new_zeros(1, dtype=torch.long) if self.injected is None else self.injected.lengths

    @property
    def longest(self) -> int:
        """Tokens of the longest row, with what is injected."""
        return int((self.first_position + self.mask.sum(1)).max())

    @cached_property
    def head(self) -> int:
        """Tokens that all rows begin with."""
        same = self.injected is None or self.injected.shared
        return shared_head(self.keys, self.mask) if same else 0

    @cached_property
    def frozen(self) -> Tensor:
        """[B] tokens of each row before its first soft one; 0 where it has none, or text is shifted."""
        return self.soft.int().argmax(1) * (self.keys[:, 0] >= 0)

    @cached_property
    def prompt_end(self) -> int:
        """Tokens up to the last soft one that all rows begin with; 0 where they do not begin alike."""
        most = self.keys.shape[1] - 1 if len(self.keys) == 1 else self.head
        shared = (self.soft[0, :most] & (self.keys[0, :most] >= 0)).nonzero()
        return int(shared[-1]) + 1 if len(shared) else 0

    def words_only_from(self, begin: int) -> bool:
        """Whether all tokens from there on are words as they are, so that their keys are their ids."""
        return not bool((self.soft | (self.keys < 0))[:, begin:].any())

    def after(self, begin: Tensor) -> RowBatch:
        """Without the first `begin` [B] tokens of each row."""
        left = self.mask.sum(1) - begin
        longest = int(left.max())
        step = torch.arange(longest, device=begin.device)
        places = (begin[:, None] + step).clamp(max=self.mask.shape[1] - 1)  # [B, longest]
        return self._gathered(places, step < left[:, None])

    def trimmed(self) -> RowBatch:
        """Without columns that no row has."""
        longest = int(self.mask.sum(1).max())
        keys, soft = self.keys[:, :longest], self.soft[:, :longest]
        return replace(self, embeds=self.embeds[:, :longest], mask=self.mask[:, :longest], keys=keys, soft=soft)

    def with_shorter_copy(self) -> RowBatch:
        """With the longest row once more, without its last token."""
        lengths = self.mask.sum(1)
        longer = self[[*range(len(lengths)), int(lengths.argmax())]]
        mask = longer.mask.clone()
        mask[-1, int(lengths.max()) - 1] = False
        return replace(longer, mask=mask)

    def followed_by(self, ids: Tensor, embeds: Tensor) -> RowBatch:
        """With further text [B, U], embedded [B, U, H], at the end of each row."""
        none = torch.zeros_like(ids, dtype=torch.bool)
        mask = torch.cat([self.mask, ~none], dim=1)
        longer = replace(
            self,
            embeds=torch.cat([self.embeds, embeds.to(self.embeds)], dim=1),
            keys=torch.cat([self.keys, ids], dim=1),
            soft=torch.cat([self.soft, none], dim=1),
        )
        order = (~mask).int().argsort(dim=1, stable=True)
        return longer._gathered(order, mask.gather(1, order)).trimmed()

    def until(self, columns: Tensor) -> RowBatch:
        """Without what comes behind the last of the columns [B, U] of each row: no target looks at it."""
        last = columns.amax(1, keepdim=True)
        end = int(last.max()) + 1
        mask = self.mask[:, :end] & (torch.arange(end, device=last.device) <= last)
        return replace(self, embeds=self.embeds[:, :end], mask=mask, keys=self.keys[:, :end], soft=self.soft[:, :end])

    def padded_left(self) -> RowBatch:
        """With the padding before the rows, as generation wants it."""
        length = self.mask.shape[1]
        places = torch.arange(length, device=self.mask.device) - (length - self.mask.sum(1, keepdim=True))
        return self._gathered(places % length, self.mask.flip(1))

    def _gathered(self, places: Tensor, mask: Tensor) -> RowBatch:
        embeds = self.embeds.gather(1, places[..., None].expand(-1, -1, self.embeds.shape[2]))
        return replace(
            self, embeds=embeds, mask=mask, keys=self.keys.gather(1, places), soft=self.soft.gather(1, places)
        )
