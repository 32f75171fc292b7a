"""The rows of a batch in the form that a decoder-only backbone runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_softprompt.backbones.execution.packing import Past, shared_prefix_length
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
        keys: [B, M] numbers that are equal only where rows have the same token; the keys of text are its token ids.
        soft: [B, M] bool, True on soft tokens.
        kv: Keys and values that all tokens attend to, by layer.
        kv_mask: [B, P] bool, False on keys that a row does not have; None means that each row has all.
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
            ValueError: If the prompt has keys and values for attentions that a decoder does not have.
        """
        prompt = prompt or SoftPrompt()
        refuse_unknown(prompt.kv, ["self"])
        tokens, shift = prompt.tokens, prompt.shift
        length = 0 if tokens is None else tokens.shape[1]
        numbers = torch.arange(1, len(batch) + 1, device=batch.input_ids.device)
        unique = -numbers[:, None]  # [B, 1], differs by row
        soft_positions = torch.arange(length, device=unique.device)
        common = SOFT + soft_positions.expand(len(batch), -1)
        is_shared = tokens is None or len(tokens) == 1
        soft_keys = common if is_shared else unique.expand_as(common)
        text_keys = batch.input_ids if shift is None else unique.expand_as(batch.input_ids)
        keys = torch.cat([soft_keys, text_keys], dim=1).gather(1, spliced.order)
        soft = (spliced.order < length) & spliced.mask
        kv = prompt.kv.get("self", {})
        kv_mask = prompt.kv_mask.get("self")
        return cls(spliced.embeds, spliced.mask, keys, soft, kv, kv_mask)

    def __getitem__(self, rows: list[int]) -> RowBatch:
        kv = {}
        for layer, (key, value) in self.kv.items():
            is_shared = len(key) == 1
            kv[layer] = (key, value)
            if not is_shared:
                kv[layer] = (key[rows], value[rows])
        kv_mask = None if self.kv_mask is None else self.kv_mask[rows]
        keys = self.keys[rows]
        soft = self.soft[rows]
        return RowBatch(self.embeds[rows], self.mask[rows], keys, soft, kv, kv_mask)

    def copy_detached(self, dtype: torch.dtype) -> RowBatch:
        """A copy in another precision that shares neither memory nor gradients."""

        def copy(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype, copy=True)

        kv = {}
        for layer, (key, value) in self.kv.items():
            kv[layer] = copy(key), copy(value)
        kv_mask = None if self.kv_mask is None else self.kv_mask.clone()
        keys, soft = self.keys.clone(), self.soft.clone()
        return RowBatch(copy(self.embeds), self.mask.clone(), keys, soft, kv, kv_mask)

    @cached_property
    def past(self) -> Past | None:
        """The prompt's keys and values, which all tokens attend to."""
        if not self.kv:
            return None
        key, _ = next(iter(self.kv.values()))
        if self.kv_mask is None:
            mask = self.mask.new_ones(len(key), key.shape[2])
            return Past(self.kv, mask)
        shape = (len(self.kv_mask), -1, -1, -1)
        layers = {}
        for layer, (key, value) in self.kv.items():
            layers[layer] = key.expand(shape), value.expand(shape)
        return Past(layers, self.kv_mask)

    @property
    def kv_prompt(self) -> SoftPrompt:
        """A prompt that consists of the keys and values only."""
        kv_mask = {} if self.kv_mask is None else {"self": self.kv_mask}
        return SoftPrompt(kv={"self": self.kv} if self.kv else {}, kv_mask=kv_mask)

    @property
    def first_position(self) -> Tensor:
        """[B|1] position of the first token of each row, after the prompt's keys and values."""
        if self.past is None:
            return self.mask.new_zeros(1, dtype=torch.long)
        return self.past.lengths

    @property
    def longest(self) -> int:
        """Positions of the longest row, including the prompt's keys and values."""
        return int((self.first_position + self.mask.sum(1)).max())

    @cached_property
    def shared_prefix(self) -> int:
        """Number of tokens that all rows begin with."""
        is_shared = self.past is None or self.past.is_shared
        return shared_prefix_length(self.keys, self.mask) if is_shared else 0

    @cached_property
    def frozen_lengths(self) -> Tensor:
        """[B] tokens of each row before its first soft token; 0 if there is none, or if text embeddings are shifted."""
        first_soft = self.soft.int().argmax(1)
        is_unshifted = self.keys[:, 0] >= 0
        return first_soft * is_unshifted

    @cached_property
    def prompt_end(self) -> int:
        """Tokens up to the last soft token in the beginning that all rows share; 0 if there is none."""
        is_single = len(self.keys) == 1
        length = self.keys.shape[1] - 1 if is_single else self.shared_prefix
        is_shared = self.keys[0, :length] >= 0
        shared_soft = (self.soft[0, :length] & is_shared).nonzero()
        return int(shared_soft[-1]) + 1 if len(shared_soft) else 0

    def drop_first(self, count: Tensor) -> RowBatch:
        """Removes the first `count` [B] tokens of each row."""
        lengths = self.mask.sum(1) - count
        longest = int(lengths.max())
        step = torch.arange(longest, device=count.device)
        last = self.mask.shape[1] - 1
        columns = (count[:, None] + step).clamp(max=last)  # [B, longest]
        return self._gather(columns, step < lengths[:, None])

    def trim(self) -> RowBatch:
        """Removes columns that are padding in every row."""
        longest = int(self.mask.sum(1).max())
        embeds = self.embeds[:, :longest]
        mask = self.mask[:, :longest]
        keys = self.keys[:, :longest]
        soft = self.soft[:, :longest]
        return replace(self, embeds=embeds, mask=mask, keys=keys, soft=soft)

    def append_shorter_copy(self) -> RowBatch:
        """Adds a copy of the longest row without its last token."""
        lengths = self.mask.sum(1)
        longest_row = int(lengths.argmax())
        longer = self[[*range(len(lengths)), longest_row]]
        mask = longer.mask.clone()
        mask[-1, int(lengths.max()) - 1] = False
        return replace(longer, mask=mask)

    def append_text(self, ids: Tensor, embeds: Tensor) -> RowBatch:
        """Adds text [B, U] with embeddings [B, U, H] at the end of each row."""
        not_soft = torch.zeros_like(ids, dtype=torch.bool)
        mask = torch.cat([self.mask, ~not_soft], dim=1)
        longer = replace(
            self,
            embeds=torch.cat([self.embeds, embeds.to(self.embeds)], dim=1),
            keys=torch.cat([self.keys, ids], dim=1),
            soft=torch.cat([self.soft, not_soft], dim=1),
        )
        order = (~mask).int().argsort(dim=1, stable=True)
        return longer._gather(order, mask.gather(1, order)).trim()

    def drop_after_targets(self, columns: Tensor) -> RowBatch:
        """Removes the tokens after the last of the columns [B, U] of each row: no target attends to them."""
        last = columns.amax(1, keepdim=True)
        end = int(last.max()) + 1
        is_needed = torch.arange(end, device=last.device) <= last
        mask = self.mask[:, :end] & is_needed
        embeds = self.embeds[:, :end]
        keys = self.keys[:, :end]
        soft = self.soft[:, :end]
        return replace(self, embeds=embeds, mask=mask, keys=keys, soft=soft)

    def pad_left(self) -> RowBatch:
        """Moves the padding before the rows, as generation requires it."""
        length = self.mask.shape[1]
        padding = length - self.mask.sum(1, keepdim=True)
        columns = torch.arange(length, device=self.mask.device) - padding
        return self._gather(columns % length, self.mask.flip(1))

    def _gather(self, columns: Tensor, mask: Tensor) -> RowBatch:
        width = self.embeds.shape[2]
        index = columns[..., None].expand(-1, -1, width)
        embeds = self.embeds.gather(1, index)
        keys = self.keys.gather(1, columns)
        soft = self.soft.gather(1, columns)
        return replace(self, embeds=embeds, mask=mask, keys=keys, soft=soft)
