"""The ways in which a decoder-only model can run a batch, all to the same logits, the fastest first.

Which of them a model allows is tried out, not looked up: on two rows of the first batch, in float32.
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

from lightning_softprompt.backbones.base import BackboneSpec
from lightning_softprompt.backbones.contexts import ContextCache, Contexts, keys_and_values
from lightning_softprompt.backbones.head import Head, States
from lightning_softprompt.backbones.injection import NAME, Sites, at, injected, sites_of
from lightning_softprompt.backbones.linear import plain_products
from lightning_softprompt.backbones.packing import pack
from lightning_softprompt.backbones.quantized import in_float32
from lightning_softprompt.backbones.rows import Rows

log = logging.getLogger(__name__)
Offer = Callable[[PreTrainedModel, Head], "Path"]
LIMIT = 1e-4  # relative error of logits in float32
BY_TOKEN = ("mlp", "self_attn.q_proj", "self_attn.o_proj")  # of a layer


class Path(ABC):
    """A way to run a batch.

    Args:
        model: The transformers model.
        head: Its last layer.
        attention: Transformers' attention where the path has none of its own.
    """

    told: ClassVar[str]

    def __init__(self, model: PreTrainedModel, head: Head, attention: str) -> None:
        self.model, self.head, self.attention = model, head, attention

    def enter(self) -> None:
        """Prepares the model."""
        self.model.set_attn_implementation(self.attention)

    @contextmanager
    def injected(self, rows: Rows) -> Iterator[None]:
        """Gives the model's attentions what the rows bring for them, while it runs as transformers has it."""
        if not rows.kv:
            yield
            return
        sites = self.sites
        self.model.set_attn_implementation(NAME)
        with injected(at(sites, rows.injection.kv, rows.injection.kv_inside)):
            yield

    @cached_property
    def sites(self) -> dict[str, Sites]:
        """The model's attentions."""
        return sites_of(self.model)

    @abstractmethod
    def __call__(self, rows: Rows, columns: Tensor, first: Tensor) -> States:
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
        cache: Keeps keys and values of what is frozen.
    """

    told = "rows run packed, and what they share runs once"

    def __init__(self, model: PreTrainedModel, head: Head, attention: str, cache: ContextCache | None = None) -> None:
        super().__init__(model, head, NAME)
        kept = ContextCache(0) if cache is None else cache
        self.contexts = Contexts(lambda embeds: keys_and_values(model, embeds), kept)
        self.last = last_by_token(model)

    def __call__(self, rows: Rows, columns: Tensor, first: Tensor) -> States:
        """See `Path`."""
        past, begin = self.contexts.of(rows, first)
        rest = rows if past is None else rows.after(begin)
        packing = pack(rest.mask, rest.head if past is None or past.shared else 0, past)
        columns = (columns - begin[:, None]).clamp(min=0)

        def run() -> Any:
            return self.model(
                inputs_embeds=packing.packed(rest.embeds),
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

    told = "what rows share runs once, in a pass of its own"

    def __call__(self, rows: Rows, columns: Tensor, first: Tensor) -> States:
        """See `Path`."""
        head, batch = min(rows.head, int(first.min())), len(rows.mask)
        if not head:
            return Padded(self.model, self.head, self.attention)(rows, columns, first)
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
        return self.model(
            inputs_embeds=embeds, position_ids=positions.to(embeds.device)[None], use_cache=True, **options
        )


@final
class Padded(Path):
    """Rows are padded at the end, where a causal model never looks: no mask is needed, and fast kernels run."""

    told = "rows run padded, each with all it has"

    def __call__(self, rows: Rows, columns: Tensor, first: Tensor) -> States:
        """See `Path`."""
        positions = rows.first_position[:, None] + torch.arange(rows.mask.shape[1], device=rows.mask.device)
        run = lambda: self.model(inputs_embeds=rows.embeds, position_ids=positions, use_cache=False)  # noqa: E731
        with self.injected(rows):
            return self.head.states(run, columns)


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


def offers(spec: BackboneSpec, attention: str, cache: ContextCache) -> list[Offer]:
    """The paths that a specification allows, the fastest first."""
    padded: list[Offer] = [partial(Padded, attention=attention)]
    if not spec.packed:
        return padded
    two_pass: list[Offer] = [partial(TwoPass, attention=attention)]
    if spec.checkpointing:
        two_pass = []  # recomputed, it would fill its cache twice
    return [partial(Packed, attention=attention, cache=cache), *two_pass, *padded]


def choose(
    model: PreTrainedModel, offers: Sequence[Offer], rows: Rows, columns: Tensor, first: Tensor
) -> tuple[int, list[str]]:
    """The number of the first path that agrees with the last, and why those before it do not.

    Args:
        model: One in half precision is tried out as a float32 copy, since its own rounding would hide a fault.
        offers: Make the paths; the last is taken as right.
        rows: Two rows.
        columns: [2, U] where the targets' states are.
        first: [2] the first of them in each row.
    """
    if len(offers) == 1:
        return 0, []
    with plain_products(), torch.inference_mode(False), torch.autocast(rows.embeds.device.type, enabled=False):
        tried = model if model.dtype in (torch.float32, torch.float64) else in_float32(model)
        paths = [offer(tried, Head(tried)) for offer in offers]
        batch = rows.copied(tried.dtype), columns.clone(), first.clone()
        right = _results(paths[-1], *batch)
        reasons: list[str] = []
        for number, path in enumerate(paths[:-1]):
            try:
                error = max(_off(a, b) for a, b in zip(_results(path, *batch), right, strict=True))
            except (NotImplementedError, TypeError, ValueError, RuntimeError, AttributeError) as reason:
                reasons.append(str(reason).splitlines()[0])
                continue
            if error <= LIMIT:
                return number, reasons
            reasons.append(f"results would be off by {error:.1e}")
    return len(offers) - 1, reasons


def _results(path: Path, rows: Rows, columns: Tensor, first: Tensor) -> list[Tensor]:
    """Logits as in evaluation, where more of a prompt is kept, and as in training, with the prompt's gradient."""
    path.enter()
    with torch.no_grad():
        kept = path.head.logits(path(rows, columns, first))
    with torch.enable_grad():
        embeds = rows.embeds.clone().requires_grad_()
        kv = {n: (k.clone().requires_grad_(), v.clone().requires_grad_()) for n, (k, v) in rows.kv.items()}
        logits = path.head.logits(path(replace(rows, embeds=embeds, kv=kv), columns, first))
        leaves = [embeds, *(t for pair in kv.values() for t in pair)]
        of_embeds, *given = torch.autograd.grad(logits.logsumexp(-1).sum(), leaves)
    where = rows.soft if rows.soft.any() or kv else rows.mask
    # What rows share has its gradient in one of them.
    return [kept, logits.detach(), (of_embeds * where[..., None]).sum(0), *given]


def _off(ours: Tensor, right: Tensor) -> float:
    """Relative error; without bound where a number is none."""
    error = float((ours - right).abs().max() / right.abs().max().clamp(min=1e-30))
    return error if error >= 0 else float("inf")
