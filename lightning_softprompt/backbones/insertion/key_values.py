"""Keys and values put into a frozen model's attentions from outside, whatever family it is of.

They reach an attention through the attention function, not through a cache: so they survive gradient checkpointing, any
cache, and encoders that have none. Which attentions a model has is found out by running it, not by names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightning_softprompt.backbones.insertion.layer_stacks import stacks_of
from lightning_softprompt.core.refusals import UnsupportedBackboneError
from lightning_softprompt.core.types import KeysValues

NAME = "softprompt"  # of the attention function in transformers
CHANGES_SCORES = ("softcap", "s_aux")  # options of an attention that PyTorch's does not have: caps and sinks
WAY_OUT = "take a method of soft tokens, such as PromptTuning, or another backbone"


class InjectionUnsupportedError(UnsupportedBackboneError):
    """A model whose attentions cannot be given further keys and values."""


@dataclass(frozen=True)
class Sites:
    """The attentions of one kind, one a layer.

    Args:
        modules: In order.
        heads: N, key/value heads.
        size: D, of a head.
    """

    modules: Sequence[nn.Module]
    heads: int
    size: int

    def __len__(self) -> int:
        return len(self.modules)


@dataclass(frozen=True)
class Seen:
    """What one attention was given, as it ran."""

    module: nn.Module
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Given:
    """What an attention is given from outside.

    Args:
        key: [B|1, N, P, D].
        value: [B|1, N, P, D].
        inside: [B, P] bool, what of it each row sees; None is all.
    """

    key: Tensor
    value: Tensor
    inside: Tensor | None = None

    def for_rows(self, batch: int) -> Given:
        """For the rows that run, which are several a row of the batch where beams are searched."""
        inside = None if self.inside is None else _for_rows(self.inside, batch)
        return Given(_for_rows(self.key, batch), _for_rows(self.value, batch), inside)


INJECTED: ContextVar[Mapping[nn.Module, Given]] = ContextVar("injected", default={})  # noqa: B039
WATCHED: ContextVar[list[Seen] | None] = ContextVar("watched", default=None)


@contextmanager
def injected(given: Mapping[nn.Module, Given]) -> Iterator[None]:
    """Gives attentions further keys and values for what runs inside."""
    token = INJECTED.set(given)
    try:
        yield
    finally:
        INJECTED.reset(token)


def at(sites: Mapping[str, Sites], kv: KeysValues, inside: Mapping[str, Tensor]) -> dict[nn.Module, Given]:
    """The prompt's keys and values by the module that takes them.

    Raises:
        ValueError: If the prompt names an attention that the backbone does not have.
    """
    refuse_unknown(kv, sites)
    return {
        sites[name].modules[layer]: Given(*pair, inside.get(name))
        for name, layers in kv.items()
        for layer, pair in layers.items()
    }


def refuse_unknown(kv: KeysValues, kinds: Collection[str]) -> None:
    """Refuses keys and values for other kinds of attention than those that a backbone has.

    Raises:
        ValueError: Naming them.
    """
    if unknown := set(kv) - set(kinds):
        raise ValueError(f"the prompt has keys and values for {sorted(unknown)}; the backbone has {sorted(kinds)}")


def attend_with_injected(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention that also sees what is injected here; relative positions do not reach that far.

    Raises:
        InjectionUnsupportedError: If the model changes its scores in a way that only it knows.
    """
    if (watched := WATCHED.get()) is not None:
        watched.append(Seen(module, key, value))
    found = INJECTED.get().get(module)
    attend = _attention_of(module, options)
    if found is None:
        return attend(module, query, key, value, mask, position_bias=position_bias, **options)
    given = found.for_rows(len(query))
    mask = _seen(mask, query, key, module, given)
    before = (given.key, key), (given.value, value)
    key, value = (torch.cat([p.to(value.dtype), t.to(value.dtype)], dim=2) for p, t in before)
    if position_bias is not None:
        position_bias = torch.nn.functional.pad(position_bias, (given.key.shape[2], 0))
    return attend(
        module, query.to(value.dtype), key, value, mask, position_bias=position_bias, **{**options, "is_causal": False}
    )


Attention = Callable[..., tuple[Tensor, Tensor | None]]


def _attention_of(module: nn.Module, options: Mapping[str, Any]) -> Attention:
    """PyTorch's attention; the model's own, written out, where scores are capped or have sinks.

    Raises:
        InjectionUnsupportedError: If the model has none.
    """
    wishes = [name for name in CHANGES_SCORES if options.get(name) is not None]
    if not wishes:
        return sdpa_attention_forward
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise InjectionUnsupportedError(
            f"{type(module).__name__} has {', '.join(wishes)} in an attention of its own; {WAY_OUT}"
        )

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        position_bias: Tensor | None = None,
        is_causal: bool | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if mask is None and is_causal is not False:
            mask = _plain_mask(query, key, getattr(module, "is_causal", True))
        return eager(module, query, key, value, _additive(mask, query.dtype), **options)  # type: ignore[no-any-return]

    return attend


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """0 on what is seen, and the least number of the precision elsewhere."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _for_rows(rows: Tensor, batch: int) -> Tensor:
    if len(rows) == 1:
        return rows.expand(batch, *rows.shape[1:])
    return rows.repeat_interleave(batch // len(rows), dim=0)


def _seen(mask: Tensor | None, query: Tensor, key: Tensor, module: nn.Module, given: Given) -> Tensor | None:
    """The mask [B|1, 1, Q, P + K] with what is injected in sight of all that have it."""
    if mask is None:
        mask = _plain_mask(query, key, getattr(module, "is_causal", True))
        if mask is None and given.inside is None:
            return None
        mask = query.new_ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool) if mask is None else mask
    if given.inside is None:
        inside = mask.new_ones(*mask.shape[:3], given.key.shape[2], dtype=torch.bool)
    else:
        inside = given.inside[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
        mask = mask.expand(len(inside), -1, -1, -1)
    if mask.dtype != torch.bool:
        inside = torch.zeros_like(inside, dtype=mask.dtype).masked_fill_(~inside, torch.finfo(mask.dtype).min)
    return torch.cat([inside, mask], dim=3)


def _plain_mask(query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
    """What transformers leaves to the kernel; None is all."""
    size, keys = query.shape[2], key.shape[2]
    if size == 1 or not causal:
        return None
    return torch.ones(size, keys, dtype=torch.bool, device=key.device).tril(keys - size)[None, None]


@contextmanager
def injectable(model: PreTrainedModel) -> Iterator[None]:
    """Sets the attention function that takes keys and values, and restores that of each part of the model."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [config._attn_implementation for config in configs]
    try:
        model.set_attn_implementation(NAME)
        yield
    finally:
        for config, name in zip(configs, before, strict=True):  # the whole first: it also sets its parts
            config._attn_implementation = name


def watch(model: PreTrainedModel, **inputs: Tensor) -> list[Seen]:
    """What each attention of a model is given as it runs, in order."""
    seen: list[Seen] = []
    token = WATCHED.set(seen)
    try:
        with injectable(model):
            model(**inputs, use_cache=False)
    finally:
        WATCHED.reset(token)
    return seen


def sites_of(model: PreTrainedModel) -> dict[str, Sites]:
    """The attentions of a model by kind: `self` of a model with one stack, else `encoder`, `decoder` and `cross`.

    Raises:
        InjectionUnsupportedError: If they are not as many as its layers, or differ in shape.
    """
    three = torch.zeros(1, 3, dtype=torch.long, device=model.device)
    if not model.config.is_encoder_decoder:
        return {"self": _alike(model, watch(model, input_ids=three), "self")}
    seen = watch(model, input_ids=three, decoder_input_ids=three[:, :2])
    encoder = set(model.get_encoder().modules())
    decoder = [s for s in seen if s.module not in encoder]
    return {
        "encoder": _alike(model, [s for s in seen if s.module in encoder], "encoder"),
        "decoder": _alike(model, [s for s in decoder if s.key.shape[2] == 2], "decoder"),
        "cross": _alike(model, [s for s in decoder if s.key.shape[2] == 3], "cross"),
    }


def _alike(model: PreTrainedModel, seen: Sequence[Seen], kind: str) -> Sites:
    """One attention in each layer of the stacks that have any.

    Raises:
        InjectionUnsupportedError: If there are more or fewer, or their shapes differ.
    """
    modules = list(dict.fromkeys(s.module for s in seen))
    shapes = {(t.shape[1], t.shape[3]) for s in seen for t in (s.key, s.value)}
    layers = _layers_with(model, modules)
    refused = f"{type(model).__name__} cannot be given keys and values"
    if not modules:
        raise InjectionUnsupportedError(
            f"{refused}: no {kind} attention of it runs through transformers' attention interface; {WAY_OUT}"
        )
    if len(modules) != layers:
        raise InjectionUnsupportedError(
            f"{refused}: {len(modules)} {kind} attentions run through transformers' attention interface, and it has "
            f"{layers} layers; {WAY_OUT}"
        )
    if len(seen) != len(modules):
        raise InjectionUnsupportedError(
            f"{refused}: {len(modules)} {kind} attentions run {len(seen)} times for one input, since layers share "
            f"weights; {WAY_OUT}"
        )
    if len(shapes) != 1:
        raise InjectionUnsupportedError(
            f"{refused}: heads and sizes of its keys and values differ, {sorted(shapes)}; {WAY_OUT}"
        )
    return Sites(modules, *next(iter(shapes)))


def _layers_with(model: PreTrainedModel, modules: Sequence[nn.Module]) -> int:
    """Layers of the stacks that have some of the modules."""
    wanted, total = set(modules), 0
    for stack in stacks_of(model):
        inside = {module for layer in stack.layers(model) for module in layer.modules()}
        total += len(stack) if inside & wanted else 0
    return total


@torch.no_grad()
def check_like_text(model: PreTrainedModel, stack: nn.Module, sites: Mapping[str, Sites], limit: float) -> None:
    """Compares keys and values of a text before a row with the text itself.

    Args:
        model: The model.
        stack: The part of it that reads the text.
        sites: Its attentions.
        limit: Relative error up to which results count as equal.

    Raises:
        InjectionUnsupportedError: If the results differ, as where positions or states reach a row in another way.
    """
    ids = torch.arange(1, 8, device=model.device)[None]
    kept = keys_and_values_of(model, sites, ids[0, :3])
    kv = {kind: {n: (layer[:1], layer[1:]) for n, layer in enumerate(layers)} for kind, layers in kept.items()}
    whole = stack(input_ids=ids, use_cache=False)[0][:, 3:]
    positions = torch.arange(3, 7, device=ids.device)[None]
    with injectable(model), injected(at(sites, kv, {})):
        own = stack(input_ids=ids[:, 3:], position_ids=positions, use_cache=False)[0]
    error = float((own - whole).abs().max() / whole.abs().max().clamp(min=1e-30))
    if error > limit:
        raise InjectionUnsupportedError(
            f"{type(model).__name__} cannot be given keys and values: those of a text do not act like the text, "
            f"results differ by {error:.1e}; {WAY_OUT}"
        )


@torch.no_grad()
def keys_and_values_of(model: PreTrainedModel, sites: Mapping[str, Sites], ids: Tensor) -> dict[str, Tensor]:
    """What the attentions of each kind make of a text [P], read by an encoder and a decoder each: [L, 2, N, P, D]."""
    inputs = {"input_ids": ids[None]}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[None]
    seen = {s.module: torch.cat([s.key, s.value]) for s in watch(model, **inputs)}
    return {kind: torch.stack([seen[module] for module in of.modules]) for kind, of in sites.items()}
