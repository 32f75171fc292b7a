"""Adds keys and values to the attentions of a frozen model of any family.

They reach an attention through the attention function rather than through a cache. So they work with gradient
checkpointing, with any cache, and in encoders, which have none. A run of the model determines which attentions it has.
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

from lightning_softprompt.backbones.insertion.attention_probe import PROBE
from lightning_softprompt.backbones.insertion.layer_stacks import stacks_of
from lightning_softprompt.core.refusals import UnsupportedBackboneError
from lightning_softprompt.core.types import KeysValues

NAME = "softprompt"  # of the attention function in transformers
CHANGES_SCORES = ("softcap", "s_aux")  # options that PyTorch's attention does not support: caps and sinks
ALTERNATIVE = "use a method with soft tokens, such as PromptTuning, or another backbone"


class InjectionUnsupportedError(UnsupportedBackboneError):
    """A model whose attentions do not accept additional keys and values."""


@dataclass(frozen=True)
class Sites:
    """The attentions of one kind, one in each layer.

    Args:
        modules: The attention modules, in order.
        heads: N, the number of key/value heads.
        size: D, the size of a head.
    """

    modules: Sequence[nn.Module]
    heads: int
    size: int

    def __len__(self) -> int:
        return len(self.modules)


@dataclass(frozen=True)
class AttentionInputs:
    """The keys and values that one attention received in a run."""

    module: nn.Module
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class ExtraKeysValues:
    """Additional keys and values of one attention.

    Args:
        key: [B|1, N, P, D].
        value: [B|1, N, P, D].
        mask: [B, P] bool, False on keys that a row does not attend to; None means that each row attends to all.
    """

    key: Tensor
    value: Tensor
    mask: Tensor | None = None

    def expand_rows(self, count: int) -> ExtraKeysValues:
        """The keys and values of `count` rows. In beam search, several sequences belong to each row of the batch."""
        mask = None if self.mask is None else _expand_rows(self.mask, count)
        return ExtraKeysValues(_expand_rows(self.key, count), _expand_rows(self.value, count), mask)


INJECTED: ContextVar[Mapping[nn.Module, ExtraKeysValues]] = ContextVar("injected", default={})  # noqa: B039
RECORDED: ContextVar[list[AttentionInputs] | None] = ContextVar("recorded", default=None)


@contextmanager
def inject(extra: Mapping[nn.Module, ExtraKeysValues]) -> Iterator[None]:
    """Adds keys and values to attentions within the context."""
    token = INJECTED.set(extra)
    try:
        yield
    finally:
        INJECTED.reset(token)


def kv_by_module(
    sites: Mapping[str, Sites], kv: KeysValues, masks: Mapping[str, Tensor]
) -> dict[nn.Module, ExtraKeysValues]:
    """The prompt's keys and values by attention module.

    Raises:
        ValueError: If the prompt has keys and values for a kind of attention that the backbone does not have.
    """
    refuse_unknown(kv, sites)
    return {
        sites[kind].modules[layer]: ExtraKeysValues(*pair, masks.get(kind))
        for kind, layers in kv.items()
        for layer, pair in layers.items()
    }


def refuse_unknown(kv: KeysValues, kinds: Collection[str]) -> None:
    """Refuses keys and values for kinds of attention that a backbone does not have.

    Raises:
        ValueError: Naming the kinds.
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
    """Attention that includes the injected keys and values. These have no relative position.

    Raises:
        InjectionUnsupportedError: If the model changes the scores in a way that PyTorch's attention does not support.
    """
    if (recorded := RECORDED.get()) is not None:
        recorded.append(AttentionInputs(module, key, value))
    extra = INJECTED.get().get(module)
    attend = _attention_of(module, options)
    if extra is not None:
        extra = extra.expand_rows(len(query))
        mask = _extend_mask(mask, query, key, module, extra)
        dtype = value.dtype
        query = query.to(dtype)
        key = torch.cat([extra.key.to(dtype), key.to(dtype)], dim=2)
        value = torch.cat([extra.value.to(dtype), value], dim=2)
        if position_bias is not None:
            position_bias = torch.nn.functional.pad(position_bias, (extra.key.shape[2], 0))
        options["is_causal"] = False  # the mask is causal where necessary

    def attend_to(values: Tensor) -> tuple[Tensor, Tensor | None]:
        return attend(module, query, key, values, mask, position_bias=position_bias, **options)

    if (probe := PROBE.get()) is not None:
        probe.add(module, value, None, lambda values, _: attend_to(values)[0])
    return attend_to(value)


Attention = Callable[..., tuple[Tensor, Tensor | None]]


def _attention_of(module: nn.Module, options: Mapping[str, Any]) -> Attention:
    """PyTorch's attention, or the model's eager attention if scores are capped or have sinks.

    Raises:
        InjectionUnsupportedError: If the model has no eager attention.
    """
    unsupported = [name for name in CHANGES_SCORES if options.get(name) is not None]
    if not unsupported:
        return sdpa_attention_forward
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise InjectionUnsupportedError(
            f"{type(module).__name__} implements {', '.join(unsupported)} in its own attention; {ALTERNATIVE}"
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
            mask = _default_mask(query, key, getattr(module, "is_causal", True))
        return eager(module, query, key, value, _additive(mask, query.dtype), **options)  # type: ignore[no-any-return]

    return attend


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A boolean mask as an additive one: 0 where a query attends to a key, and the smallest number elsewhere."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _expand_rows(rows: Tensor, count: int) -> Tensor:
    if len(rows) == 1:
        return rows.expand(count, *rows.shape[1:])
    return rows.repeat_interleave(count // len(rows), dim=0)


def _extend_mask(
    mask: Tensor | None, query: Tensor, key: Tensor, module: nn.Module, extra: ExtraKeysValues
) -> Tensor | None:
    """The mask [B|1, 1, Q, P + K], which includes the additional keys."""
    if mask is None:
        mask = _default_mask(query, key, getattr(module, "is_causal", True))
        if mask is None and extra.mask is None:
            return None
        if mask is None:
            mask = query.new_ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool)
    if extra.mask is None:
        extra_mask = mask.new_ones(*mask.shape[:3], extra.key.shape[2], dtype=torch.bool)
    else:
        extra_mask = extra.mask[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
        mask = mask.expand(len(extra_mask), -1, -1, -1)
    if mask.dtype != torch.bool:
        minimum = torch.finfo(mask.dtype).min
        extra_mask = torch.zeros_like(extra_mask, dtype=mask.dtype).masked_fill_(~extra_mask, minimum)
    return torch.cat([extra_mask, mask], dim=3)


def _default_mask(query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
    """The mask that kernels apply if transformers passes none; None if each query attends to all keys."""
    size, keys = query.shape[2], key.shape[2]
    if size == 1 or not causal:
        return None
    return torch.ones(size, keys, dtype=torch.bool, device=key.device).tril(keys - size)[None, None]


@contextmanager
def injectable_attention(model: PreTrainedModel) -> Iterator[None]:
    """Sets the attention function that accepts additional keys and values within the context."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    previous = [config._attn_implementation for config in configs]
    try:
        model.set_attn_implementation(NAME)
        yield
    finally:
        for config, name in zip(configs, previous, strict=True):  # the whole model first, since it also sets its parts
            config._attn_implementation = name


def record_attentions(model: PreTrainedModel, **inputs: Tensor) -> list[AttentionInputs]:
    """Runs a model and returns the keys and values of each attention, in order."""
    recorded: list[AttentionInputs] = []
    token = RECORDED.set(recorded)
    try:
        with injectable_attention(model):
            model(**inputs, use_cache=False)
    finally:
        RECORDED.reset(token)
    return recorded


def sites_of(model: PreTrainedModel) -> dict[str, Sites]:
    """The attentions of a model by kind: `self` if it has one stack, else `encoder`, `decoder` and `cross`.

    Raises:
        InjectionUnsupportedError: If a kind does not have one attention in each layer, or their shapes differ.
    """
    three_tokens = torch.zeros(1, 3, dtype=torch.long, device=model.device)
    if not model.config.is_encoder_decoder:
        return {"self": _one_per_layer(model, record_attentions(model, input_ids=three_tokens), "self")}
    recorded = record_attentions(model, input_ids=three_tokens, decoder_input_ids=three_tokens[:, :2])
    encoder_modules = set(model.get_encoder().modules())
    encoder = [inputs for inputs in recorded if inputs.module in encoder_modules]
    decoder = [inputs for inputs in recorded if inputs.module not in encoder_modules]
    # Attentions of the decoder to itself have two keys in this run, and attentions to the encoder have three.
    decoder_self = [inputs for inputs in decoder if inputs.key.shape[2] == 2]
    cross = [inputs for inputs in decoder if inputs.key.shape[2] == 3]
    return {
        "encoder": _one_per_layer(model, encoder, "encoder"),
        "decoder": _one_per_layer(model, decoder_self, "decoder"),
        "cross": _one_per_layer(model, cross, "cross"),
    }


def _one_per_layer(model: PreTrainedModel, recorded: Sequence[AttentionInputs], kind: str) -> Sites:
    """The attentions of one kind.

    Raises:
        InjectionUnsupportedError: If there is not exactly one in each layer, or their shapes differ.
    """
    modules = list(dict.fromkeys(inputs.module for inputs in recorded))
    tensors = [tensor for inputs in recorded for tensor in (inputs.key, inputs.value)]
    shapes = {(tensor.shape[1], tensor.shape[3]) for tensor in tensors}
    layers = _layers_with(model, modules)
    refused = f"{type(model).__name__} does not accept additional keys and values"
    if not modules:
        raise InjectionUnsupportedError(
            f"{refused}: its {kind} attention does not use the attention interface of transformers, through which keys "
            f"and values are inserted; {ALTERNATIVE}"
        )
    if len(modules) != layers:
        raise InjectionUnsupportedError(
            f"{refused}: the number of {kind} attentions that use the attention interface of transformers is "
            f"{len(modules)}, and the number of layers is {layers}; {ALTERNATIVE}"
        )
    if len(recorded) != len(modules):
        raise InjectionUnsupportedError(
            f"{refused}: layers share weights, so that the number of {kind} attentions is {len(modules)}, and the "
            f"number of their calls for one input is {len(recorded)}; {ALTERNATIVE}"
        )
    if len(shapes) != 1:
        raise InjectionUnsupportedError(
            f"{refused}: heads and sizes of its keys and values differ, {sorted(shapes)}; {ALTERNATIVE}"
        )
    return Sites(modules, *next(iter(shapes)))


def _layers_with(model: PreTrainedModel, modules: Sequence[nn.Module]) -> int:
    """The number of layers of the stacks that contain some of the modules."""
    total = 0
    for stack in stacks_of(model):
        stack_modules = {module for layer in stack.layers(model) for module in layer.modules()}
        if not stack_modules.isdisjoint(modules):
            total += len(stack)
    return total


@torch.no_grad()
def check_like_text(model: PreTrainedModel, stack: nn.Module, sites: Mapping[str, Sites], tolerance: float) -> None:
    """Checks that the keys and values of a text have the same effect on later tokens as the text itself.

    Args:
        model: The model.
        stack: The part of it that reads the text.
        sites: Its attentions.
        tolerance: Relative error up to which results count as equal.

    Raises:
        InjectionUnsupportedError: If the results differ, for example since a row also depends on recurrent states.
    """
    ids = torch.arange(1, 8, device=model.device)[None]
    kv: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for kind, layers in keys_and_values_of(model, sites, ids[0, :3]).items():
        kv[kind] = {number: (layer[:1], layer[1:]) for number, layer in enumerate(layers)}
    expected = stack(input_ids=ids, use_cache=False)[0][:, 3:]
    positions = torch.arange(3, 7, device=ids.device)[None]
    with injectable_attention(model), inject(kv_by_module(sites, kv, {})):
        results = stack(input_ids=ids[:, 3:], position_ids=positions, use_cache=False)[0]
    error = float((results - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    if error > tolerance:
        raise InjectionUnsupportedError(
            f"{type(model).__name__} does not accept additional keys and values: if a text is replaced by its keys "
            f"and values, the results for the tokens that follow it change by {error:.1e}; {ALTERNATIVE}"
        )


@torch.no_grad()
def keys_and_values_of(model: PreTrainedModel, sites: Mapping[str, Sites], ids: Tensor) -> dict[str, Tensor]:
    """Keys and values [L, 2, N, P, D] of a text [P], by kind of attention. Encoder and decoder both read the text."""
    inputs = {"input_ids": ids[None]}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[None]
    recorded = record_attentions(model, **inputs)
    by_module = {inputs.module: torch.cat([inputs.key, inputs.value]) for inputs in recorded}
    return {kind: torch.stack([by_module[module] for module in site.modules]) for kind, site in sites.items()}
