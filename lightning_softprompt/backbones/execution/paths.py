"""The ways in which a decoder-only model can run a batch, all to the same logits, the fastest first.

Which of them a model allows is tried out, not looked up; see `path_trial`.
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

from lightning_softprompt.backbones.execution.context_cache import ContextCache, Contexts, keys_and_values
from lightning_softprompt.backbones.execution.lm_head import Head, States
from lightning_softprompt.backbones.execution.packing import pack
from lightning_softprompt.backbones.execution.row_batch import RowBatch
from lightning_softprompt.backbones.insertion.embeddings import Entry
from lightning_softprompt.backbones.insertion.key_values import NAME, Sites, at, injected, sites_of
from lightning_softprompt.core.backbone_spec import BackboneSpec

log = logging.getLogger(__name__)
PathFactory = Callable[..., "Path"]  # of a model and its head
BY_TOKEN = ("mlp", "self_attn.q_proj", "self_attn.o_proj")  # of a layer


class Path(ABC):
    """A way to run a batch.

    Args:
        model: The transformers model.
        head: Its last layer.
        attention: Transformers' attention where the path has none of its own.
        entry: How embeddings enter the model.
        cache: Keeps keys and values of what is frozen, where the path uses them.
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
    def injected(self, rows: RowBatch) -> Iterator[None]:
        """Gives the model's attentions what the rows bring for them, while it runs as transformers has it."""
        if not rows.kv:
            yield
            return
        sites = self.sites
        self.model.set_attn_implementation(NAME)
        with injected(at(sites, rows.injection.kv, rows.injection.kv_mask)):
            yield

    @cached_property
    def sites(self) -> dict[str, Sites]:
        """The model's attentions."""
        return sites_of(self.model)

    @abstractmethod
    def __call__(self, rows: RowBatch, columns: Tensor, first: Tensor) -> States:
        """The states of the targets.

        Args:
            rows: The batch.
            columns: [B, U] where they are.
            first: [B] the first of them in each row.
        """


@final
class Packed(Path):
    """One row `[shared head | row 1 | row 2 | ...]` without padding, behind what is kept of earlier batches.

    Args:
        model: The transformers model.
        head: Its last layer.
        attention: Not used.
        entry: How embeddings enter the model.
        cache: Keeps keys and values of what is frozen.
    """

    description = "rows run packed, and what they share runs once"

    def __init__(
        self,
        model: PreTrainedModel,
        head: Head,
        attention: str,
        entry: Entry | None = None,
        cache: ContextCache | None = None,
    ) -> None:
        super().__init__(model, head, NAME, entry)
        kept = ContextCache(0) if cache is None else cache
        self.contexts = Contexts(lambda embeds: keys_and_values(model, embeds, self.entry), kept)
        self.last = last_by_token(model)

    def __call__(self, rows: RowBatch, columns: Tensor, first: Tensor) -> States:
        """See `Path`."""
        past, begin = self.contexts.of(rows, first)
        rest = rows if past is None else rows.after(begin)
        packing = pack(rest.mask, rest.head if past is None or past.shared else 0, past)
        columns = (columns - begin[:, None]).clamp(min=0)

        def run() -> Any:
            return self.entry.run(
                self.model,
                packing.packed(rest.embeds),
                position_ids=packing.positions,
                attention_mask=rest.embeds.new_zeros(1, 1, 1, 1),  # keeps transformers from making one
                use_cache=False,
                packing=packing,
            )

        places = packing.columns(columns)
        with narrowed(self.last, places.unique(), packing.length):
            return self.head.states(run, columns, places)


@final
class TwoPass(Path):
    """What rows share runs first, alone; then the rows, padded, behind its keys and values."""

    description = "what rows share runs once, in a pass of its own"

    def __call__(self, rows: RowBatch, columns: Tensor, first: Tensor) -> States:
        """See `Path`."""
        head, batch = min(rows.head, int(first.min())), len(rows.mask)
        if not head:
            return Padded(self.model, self.head, self.attention, self.entry)(rows, columns, first)
        cache, begin = DynamicCache(config=self.model.config), int(rows.first_position)  # rows share it
        with self.injected(rows):
            self._run(rows.embeds[:1, :head], begin + torch.arange(head), past_key_values=cache)
        layers: list[Any] = cache.layers
        for layer in layers:
            layer.keys, layer.values = (t.expand(batch, -1, -1, -1) for t in (layer.keys, layer.values))
        positions = begin + torch.arange(head, rows.mask.shape[1])
        own = rows.embeds[:, head:]
        rest = {"past_key_values": cache, "attention_mask": rows.mask.long()}
        with self.injected(rows):
            return self.head.states(lambda: self._run(own, positions, **rest), columns - head)

    def _run(self, embeds: Tensor, positions: Tensor, **options: Any) -> Any:
        positions = positions.to(embeds.device)[None]
        return self.entry.run(self.model, embeds, position_ids=positions, use_cache=True, **options)


@final
class Padded(Path):
    """Rows are padded at the end, where a causal model never looks: no mask is needed, and fast kernels run."""

    description = "rows run padded, each with all it has"

    def __call__(self, rows: RowBatch, columns: Tensor, first: Tensor) -> States:
        """See `Path`."""
        with self.injected(rows):
            run = partial(self.entry.run, self.model, rows.embeds, **positions_of(rows), use_cache=False)
            return self.head.states(run, columns)


@final
class Alone(Path):
    """Each row runs by itself without padding, as the model's own forward pass has it."""

    description = "rows run one by one, since nothing else gives what each row alone gives"

    def __call__(self, rows: RowBatch, columns: Tensor, first: Tensor) -> States:
        """See `Path`."""
        lengths = rows.mask.sum(1).tolist()
        return States.join([self._row(rows[[b]], columns[[b]], length) for b, length in enumerate(lengths)])

    def _row(self, row: RowBatch, columns: Tensor, length: int) -> States:
        with self.injected(row):
            positions = positions_of(replace(row, mask=row.mask[:, :length]))
            run = partial(self.entry.run, self.model, row.embeds[:, :length], **positions, use_cache=False)
            return self.head.states(run, columns)


def positions_of(rows: RowBatch) -> dict[str, Tensor]:
    """Positions for a model, which counts from 0 by itself unless keys and values precede the rows."""
    if not rows.kv:
        return {}
    return {"position_ids": rows.first_position[:, None] + torch.arange(rows.mask.shape[1], device=rows.mask.device)}


def last_by_token(model: PreTrainedModel) -> list[nn.Module]:
    """Parts of the last layer that work token by token, where they go by their usual names and run as they are."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or "forward" in vars(layers[-1]):  # recomputed, or compiled
        return []
    named = dict(layers[-1].named_modules())
    return [named[name] for name in BY_TOKEN if name in named]


@contextmanager
def narrowed(modules: Sequence[nn.Module], places: Tensor, length: int) -> Iterator[None]:
    """Lets modules that work token by token see some places [U] of a packed row only; they give zeros elsewhere."""

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args[0][:, places], *args[1:]

    def restore(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out.new_zeros(1, length, out.shape[2]).index_copy(1, places, out)

    handles = [h for m in modules for h in (m.register_forward_pre_hook(select), m.register_forward_hook(restore))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def candidate_paths(spec: BackboneSpec, attention: str, cache: ContextCache, entry: Entry) -> list[PathFactory]:
    """The paths that a specification allows, the fastest first and the one that is always right last."""
    options: Any = {"attention": attention, "entry": entry}
    plain: list[PathFactory] = [partial(Padded, **options), partial(Alone, **options)]
    if not spec.packed:
        return plain
    # A recomputed layer would fill the cache of two passes twice.
    two_pass: list[PathFactory] = [] if spec.checkpointing else [partial(TwoPass, **options)]
    return [partial(Packed, **options, cache=cache), *two_pass, *plain]
