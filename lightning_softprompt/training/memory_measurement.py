"""What a step keeps for its backward pass, measured on narrow, shallow copies of a backbone and extrapolated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.insertion.layer_stacks import Stack, matrix_widths, stacks_of
from lightning_softprompt.backbones.loading import try_out
from lightning_softprompt.backbones.skeleton import build_small_copy, random_batch
from lightning_softprompt.backbones.small_copy import divisors, max_shrink_factor
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.refusals import FAILURES, UnsupportedBackboneError, reason_of
from lightning_softprompt.methods.base import SoftPromptModule

SHORT, LONG, LONGEST = 24, 48, 72  # tokens of the rows that a copy runs
NONLINEAR = 0.05  # by how much a further token keeps more than an earlier one, if scores of pairs are kept
WIDTHS_TRIED = 4
SMALL_PARTS = 0.05  # share of a layer's width, such as a router's, that may keep its size and still count as narrowed


@dataclass(frozen=True)
class Load:
    """What a run asks of each device.

    Args:
        rows: B, of a training batch.
        tokens: T of a row, without soft ones.
        targets: U of a row, where the loss looks at the whole vocabulary; 0 where it looks at words of classes.
        devices: How many there are.
        sharded: Whether each holds a share of the frozen layers (FSDP) instead of all (DDP).
        per_copy: How many devices share one copy of the layers; 0 has all share one.
        autocast: Precision of products under mixed precision, or None.
        replicas: Prompts that are trained at once.
        answers: Rows that are answered at once in validation, where text is generated; else 0.
        new_tokens: Most tokens of an answer.
    """

    rows: int
    tokens: int
    targets: int = 0
    devices: int = 1
    sharded: bool = False
    per_copy: int = 0
    autocast: torch.dtype | None = None
    replicas: int = 1
    answers: int = 0
    new_tokens: int = 0

    @property
    def shares(self) -> int:
        """How many devices hold the layers together."""
        return (self.per_copy or self.devices) if self.sharded else 1


def attached(module: SoftPromptModule, backbone: Backbone) -> SoftPromptModule:
    """A copy of the method on a backbone; without a readout where a tokenizer of bytes has none of its words."""
    method = deepcopy(module)
    try:
        method.attach(backbone)
    except ValueError:
        method = deepcopy(module)
        method.classes = method.classes_by_task = None
        method.attach(backbone)
    return method


@dataclass(frozen=True)
class Kept:
    """What a step and the rows of an answer keep, in bytes of the full size.

    Args:
        step: For the backward pass of a step.
        layer: In one layer of each stack.
        token: Of the keys and values of a token.
        row: Of other states that a row has while it is answered, whatever its length.
        depth: Layers of the deepest stack that runs.
    """

    step: float
    layer: float
    token: float
    row: float
    depth: int

    def plus(self, other: Kept, times: float) -> Kept:
        """With further layers, or a negative number of them."""
        return replace(
            self,
            step=self.step + times * other.step,
            layer=self.layer + times * other.layer,
            token=self.token + times * other.token,
            row=self.row + times * other.row,
        )


NOTHING = Kept(0.0, 0.0, 0.0, 0.0, 0)


def measure(module: SoftPromptModule, full: Backbone, config: Any, spec: BackboneSpec, load: Load) -> Kept:
    """What a step keeps, measured on the narrowest and shallowest copy of the backbone that runs.

    Raises:
        ValueError: If none does.
    """
    reasons: list[str] = []
    for by in divisors(max_shrink_factor(config))[:WIDTHS_TRIED]:
        for shallow in (True, False):
            try:
                return Measurement(module, full, config, spec, load, by).taken(shallow)
            except FAILURES as error:
                reasons.append(reason_of(error))
        if reasons[-1] in reasons[-3:-2]:
            break  # whole copies of two widths fail for one reason, which is not the width
    raise UnsupportedBackboneError(
        f"the memory of {spec.name} cannot be estimated: no small copy of a {type(full.model).__name__} runs. "
        f"{reasons[0]} Train for a few steps and read the device's own figures"
    )


@dataclass(frozen=True)
class Measurement:
    """How narrow copies of a backbone are measured.

    Args:
        module: The method.
        full: The backbone of the full size, without weights.
        config: Its configuration.
        spec: The backbone.
        load: What a device is given.
        by: How many times narrower the copies are.
    """

    module: SoftPromptModule
    full: Backbone
    config: Any
    spec: BackboneSpec
    load: Load
    by: int

    def taken(self, shallow: bool) -> Kept:
        """The measurement: of few layers, and then of further ones of each stack, or of all layers at once."""
        stacks = stacks_of(self.full.model)
        counts = {stack.name: stack.fewest if shallow else len(stack) for stack in stacks}
        small = self._copy(counts)
        calls = self._calls(small, stacks)
        running = [stack for stack in stacks if calls[stack.name]]
        first = self._kept(small, running)
        total, layers = first, NOTHING
        for stack in running:
            missing = len(stack) - counts[stack.name]
            if not missing:
                layers = layers.plus(first, 1 / sum(calls.values()))
                continue
            deeper = self._kept(self._copy({**counts, stack.name: counts[stack.name] + stack.period}), running)
            one = NOTHING.plus(deeper.plus(first, -1), 1 / stack.period)
            total, layers = total.plus(one, missing), layers.plus(one, 1)
        depth = max((calls[stack.name] + len(stack) - counts[stack.name] for stack in running), default=1)
        return Kept(total.step, layers.step, total.token, total.row, depth)

    def _copy(self, counts: dict[str, int]) -> Backbone:
        copy = build_small_copy(self.config, self.spec, self.by, counts)
        try_out(copy)
        return copy

    def _calls(self, small: Backbone, stacks: Sequence[Stack]) -> dict[str, int]:
        """How many layers of each stack a step of the method runs; layers that share weights count each time."""
        calls = dict.fromkeys((stack.name for stack in stacks), 0)

        def count(name: str) -> Callable[..., None]:
            def add(*_: Any) -> None:
                calls[name] += 1

            return add

        method, batch = attached(self.module, small), random_batch(small, 2, SHORT)
        with torch.no_grad():
            prompt = method.prompt(batch)
            small.states(batch, prompt)  # the first use finds out how rows run
            handles = [
                layer.register_forward_hook(count(stack.name))
                for stack in stacks
                for layer in islice(stack.layers(small.model), 0, None, len(stack.names))
            ]
            small.states(batch, prompt)
        for handle in handles:
            handle.remove()
        return calls

    def _kept(self, small: Backbone, running: Sequence[Stack]) -> Kept:
        """What a copy would keep if it were as wide as the backbone."""
        lengths = {stack.name: len(stack) for stack in stacks_of(small.model)}
        wide, narrow = (
            sum(matrix_widths(model, stack, lengths[stack.name]) for stack in running)
            for model in (self.full.model, small.model)
        )
        exact = wide / narrow if narrow else float(self.by)
        times = self.by if abs(exact / self.by - 1) < SMALL_PARTS else exact
        token, row = cached_bytes(small) if self.load.answers else (0.0, 0.0)
        return Kept(times * _grown(self.module, small, self.load), 0, self.by * token, self.by * row, 0)


def cached_bytes(backbone: Backbone) -> tuple[float, float]:
    """Bytes that a model keeps of one row while it answers: for each token, and for any number of them."""
    short, long = (_cache_size(backbone, tokens) for tokens in (SHORT, LONG))
    token = (long - short) / (LONG - SHORT)
    decoded = 1 if backbone.model.config.is_encoder_decoder else 0  # tokens of the decoder, in addition
    return token, short - token * (SHORT + decoded)


def _cache_size(backbone: Backbone, tokens: int) -> int:
    model, first = backbone.model, torch.zeros(1, tokens, dtype=torch.long)
    inputs = {"input_ids": first, "attention_mask": torch.ones_like(first)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = first[:, :1]
    if not model.can_generate():
        return 0
    with torch.no_grad():
        found = model(**inputs, use_cache=True)
    cached = [getattr(found, name, None) for name in ("past_key_values", "cache_params", "state")]
    return sum(t.numel() * t.element_size() for t in _tensors(cached, set()) if t.is_floating_point())


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors in an object, each once."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    for each in inner or vars(value).values() if hasattr(value, "__dict__") else inner:
        yield from _tensors(each, seen)


def _grown(module: SoftPromptModule, backbone: Backbone, load: Load) -> float:
    """What the step of a copy would keep if it had all rows, and their lengths: a + B (c + b T + d T^2).

    The square is there where scores of all pairs of tokens are kept, as by attention that is written out.
    """
    method = attached(module, backbone)
    few, more, longer, longest = (
        _kept(method, backbone, load, *of) for of in ((2, SHORT), (4, SHORT), (2, LONG), (2, LONGEST))
    )
    of_token = (longer[1] - few[1]) / (2 * (longer[0] - few[0]))
    of_row = (more[1] - few[1]) / 2
    fixed = few[1] - 2 * of_row
    later = (longest[1] - longer[1]) / (2 * (longest[0] - longer[0]))
    square = (later - of_token) / (longest[0] - few[0]) if later > of_token * (1 + NONLINEAR) else 0.0
    own = load.tokens - few[0]
    of_length = of_token * own + square * own * (load.tokens - longer[0])
    return fixed + load.rows * (of_row + of_length)


def _kept(method: SoftPromptModule, backbone: Backbone, load: Load, rows: int, tokens: int) -> tuple[float, int]:
    """T of a row, and the bytes that a step keeps."""
    batch = random_batch(backbone, rows, tokens)

    def step() -> Tensor:
        return backbone.states(batch, method.prompt(batch)).hidden.float().sum()

    mixed = torch.autocast("cpu", load.autocast) if load.autocast else nullcontext()
    with torch.no_grad():
        step()  # the first use finds out in which way rows run
    with mixed:
        return float(batch.mask.sum()) / rows, saved_bytes(step, {tuple(p.shape) for p in backbone.parameters()})


def saved_bytes(step: Callable[[], Any], weights: set[tuple[int, ...]]) -> int:
    """Bytes of distinct storages that a step keeps for its backward pass, weights and casts of them left out."""
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        weight = tuple(tensor.shape) in weights or tuple(tensor.shape)[::-1] in weights
        if (not tensor.is_leaf or tensor.requires_grad) and not (weight and tensor.dim() > 1):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(size for size, _ in kept.values())
