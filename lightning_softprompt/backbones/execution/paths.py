"""The paths by which a decoder-only model runs a batch. All of them give the same logits; the fastest comes first.

A trial run determines which paths are correct for a model; see `path_trial`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_softprompt.backbones.execution.context_cache import ContextCache, ContextReader, keys_and_values
from lightning_softprompt.backbones.execution.lm_head import Head, States
from lightning_softprompt.backbones.execution.packing import Packing, pack
from lightning_softprompt.backbones.execution.row_batch import RowBatch
from lightning_softprompt.backbones.insertion.attention_probe import PROBE, AttentionProbe, groups_of
from lightning_softprompt.backbones.insertion.embeddings import Entry
from lightning_softprompt.backbones.insertion.key_values import NAME, Sites, inject, kv_by_module, sites_of
from lightning_softprompt.core.backbone_spec import BackboneSpec

log = logging.getLogger(__name__)
PathFactory = Callable[..., "Path"]  # takes a model and its head
TOKENWISE = ("mlp", "self_attn.q_proj", "self_attn.o_proj")  # modules of a layer that process each token separately


class Path(ABC):
    """A path by which a batch runs.

    Args:
        model: The transformers model.
        head: The model's language-modeling head.
        attention: The attention implementation of transformers, for paths that use it.
        entry: How embeddings enter the model.
        cache: Caches keys and values of frozen tokens, for paths that use them.
    """

    description: ClassVar[str]

    def __init__(
        self,
        model: PreTrainedModel,
        head: Head,
        attention: str,
        entry: Entry | None = None,
        cache: ContextCache | None = None,
    ) -> None:
        self.model, self.head, self.attention = model, head, attention
        self.entry = entry or Entry()

    def enter(self) -> None:
        """Prepares the model."""
        self.model.set_attn_implementation(self.attention)

    @contextmanager
    def inject(self, rows: RowBatch) -> Iterator[None]:
        """Adds the prompt's keys and values to the model's attentions within the context."""
        if not rows.kv and PROBE.get() is None:
            yield
            return
        sites = self.sites
        self.model.set_attn_implementation(NAME)
        with inject(kv_by_module(sites, rows.kv_prompt.kv, rows.kv_prompt.kv_mask)):
            yield

    @cached_property
    def sites(self) -> dict[str, Sites]:
        """The model's attentions."""
        return sites_of(self.model)

    @abstractmethod
    def __call__(self, rows: RowBatch, columns: Tensor, first: Tensor) -> States:
        """The hidden states from which the head predicts the targets.

        Args:
            rows: The batch.
            columns: [B, U] their positions.
            first: [B] the first position in each row.
        """


@final
class Packed(Path):
    """Runs one sequence `[shared prefix | row 1 | row 2 | ...]` without padding, after cached keys and values.

    Args:
        model: The transformers model.
        head: The model's language-modeling head.
        attention: Not used.
        entry: How embeddings enter the model.
        cache: Caches keys and values of frozen tokens.
    """

    description = "packed batches; the shared prefix is computed once per step"

    def __init__(
        self,
        model: PreTrainedModel,
        head: Head,
        attention: str,
        entry: Entry | None = None,
        cache: ContextCache | None = None,
    ) -> None:
        super().__init__(model, head, NAME, entry)
        cache = ContextCache(0) if cache is None else cache
        self.contexts = ContextReader(lambda embeds: keys_and_values(model, embeds, self.entry), cache)
        self.last_modules = last_tokenwise_modules(model)

    def __call__(self, rows: RowBatch, columns: Tensor, first: Tensor) -> States:
        """See `Path`."""
        past, covered = self.contexts.past_of(rows, first)
        rest = rows if past is None else rows.drop_first(covered)
        prefix = rest.shared_prefix if past is None or past.is_shared else 0
        packing = pack(rest.mask, prefix, past)
        columns = (columns - covered[:, None]).clamp(min=0)
        if (probe := PROBE.get()) is not None:
            place_packed(probe, rows, rest, packing, columns)

        def run() -> Any:
            return self.entry.run(
                self.model,
                packing.pack(rest.embeds),
                position_ids=packing.positions,
                attention_mask=rest.embeds.new_zeros(1, 1, 1, 1),  # prevents transformers from creating a mask
                use_cache=False,
                packing=packing,
            )

        packed_columns = packing.columns(columns)
        with restrict_to_positions(self.last_modules, packed_columns.unique(), packing.length):
            return self.head.states(run, columns, packed_columns)


@final
class TwoPass(Path):
    """Runs the shared prefix first, and then the padded rows with its keys and values as their cache."""

    description = "padded batches; the shared prefix is computed once per step, in a separate pass"

    def __call__(self, rows: RowBatch, columns: Tensor, first: Tensor) -> States:
        """See `Path`."""
        prefix, batch = min(rows.shared_prefix, int(first.min())), len(rows.mask)
        if not prefix:
            return Padded(self.model, self.head, self.attention, self.entry)(rows, columns, first)
        cache = DynamicCache(config=self.model.config)
        begin = int(rows.first_position)  # equal for all rows that share a prefix
        with self.inject(rows):
            self._run(rows.embeds[:1, :prefix], begin + torch.arange(prefix), past_key_values=cache)
        layers: list[Any] = cache.layers
        for layer in layers:
            layer.keys = layer.keys.expand(batch, -1, -1, -1)
            layer.values = layer.values.expand(batch, -1, -1, -1)
        positions = begin + torch.arange(prefix, rows.mask.shape[1])
        embeds = rows.embeds[:, prefix:]
        options = {"past_key_values": cache, "attention_mask": rows.mask.long()}
        with self.inject(rows):
            return self.head.states(lambda: self._run(embeds, positions, **options), columns - prefix)

    def _run(self, embeds: Tensor, positions: Tensor, **options: Any) -> Any:
        positions = positions.to(embeds.device)[None]
        return self.entry.run(self.model, embeds, position_ids=positions, use_cache=True, **options)


@final
class Padded(Path):
    """Pads rows at the end, which no token attends to: no mask is required, and fast kernels run."""

    description = "padded batches; each row is computed in full"

    def __call__(self, rows: RowBatch, columns: Tensor, first: Tensor) -> States:
        """See `Path`."""
        with self.inject(rows):
            if (probe := PROBE.get()) is not None:
                place_padded(probe, rows, columns)
            run = partial(self.entry.run, self.model, rows.embeds, **positions_of(rows), use_cache=False)
            return self.head.states(run, columns)


@final
class Alone(Path):
    """Runs each row separately, without padding, by the model's forward pass."""

    description = "rows run one by one, since every batched path changes their results"

    def __call__(self, rows: RowBatch, columns: Tensor, first: Tensor) -> States:
        """See `Path`."""
        lengths = rows.mask.sum(1).tolist()
        states = [self._row(rows[[b]], columns[[b]], length) for b, length in enumerate(lengths)]
        return States.join(states)

    def _row(self, row: RowBatch, columns: Tensor, length: int) -> States:
        with self.inject(row):
            positions = positions_of(replace(row, mask=row.mask[:, :length]))
            run = partial(self.entry.run, self.model, row.embeds[:, :length], **positions, use_cache=False)
            return self.head.states(run, columns)


def positions_of(rows: RowBatch) -> dict[str, Tensor]:
    """Position ids of rows after the prompt's keys and values; without them, the model counts from 0 itself."""
    if not rows.kv:
        return {}
    columns = torch.arange(rows.mask.shape[1], device=rows.mask.device)
    return {"position_ids": rows.first_position[:, None] + columns}


def place_packed(probe: AttentionProbe, rows: RowBatch, rest: RowBatch, packing: Packing, columns: Tensor) -> None:
    """Sets the layout of a packed sequence in a probe; the groups are stored in the keys of the rows."""
    tokens = packing.pack(groups_of(rest.keys)[..., None])[..., 0]  # [1, prefix + R]
    past = packing.past
    if past is None:
        past_groups = None
    elif rows.kv:
        past_groups = torch.full_like(past.mask, probe.prompt_group, dtype=torch.long)
    else:
        past_groups = groups_of(rows.keys)[: len(past.mask), : past.size]
    positions = packing.columns(columns)[0]
    probe.place(tokens, lambda out: out[0, positions].unflatten(0, columns.shape), past_groups)


def place_padded(probe: AttentionProbe, rows: RowBatch, columns: Tensor) -> None:
    """Sets the layout of padded rows in a probe."""
    row = torch.arange(len(columns), device=columns.device)[:, None]
    probe.place(groups_of(rows.keys), lambda out: out[row, columns])


def last_tokenwise_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Modules of the last layer that process each token separately, by their usual names."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or "forward" in vars(layers[-1]):  # recomputed, or compiled
        return []
    by_name = dict(layers[-1].named_modules())
    return [by_name[name] for name in TOKENWISE if name in by_name]


@contextmanager
def restrict_to_positions(modules: Sequence[nn.Module], positions: Tensor, length: int) -> Iterator[None]:
    """Runs token-wise modules at some positions [U] of a packed sequence only; their output is zero elsewhere."""

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args[0][:, positions], *args[1:]

    def restore(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out.new_zeros(1, length, out.shape[2]).index_copy(1, positions, out)

    handles = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(select))
        handles.append(module.register_forward_hook(restore))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def candidate_paths(spec: BackboneSpec, attention: str, cache: ContextCache, entry: Entry) -> list[PathFactory]:
    """The paths that a specification allows: the fastest first, and the one that is always correct last."""
    options: Any = {"attention": attention, "entry": entry}
    plain: list[PathFactory] = [partial(Padded, **options), partial(Alone, **options)]
    if not spec.packed:
        return plain
    # With checkpointing, the backward pass would append to the cache of the prefix again.
    two_pass: list[PathFactory] = [] if spec.checkpointing else [partial(TwoPass, **options)]
    return [partial(Packed, **options, cache=cache), *two_pass, *plain]
