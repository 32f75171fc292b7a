"""Measures the memory that a step keeps for its backward pass, on small copies of a backbone, and extrapolates it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from lightning_softprompt.backbones.skeleton import Skeleton, random_batch
from lightning_softprompt.checkpoints.initial_values import skip_initial_values
from lightning_softprompt.core.refusals import FAILURES, UnsupportedBackboneError, reason_of
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.objectives.rollout_work import RolloutWork

SHORT, LONG, LONGEST = 24, 48, 72  # row lengths, in tokens, that are measured
NONLINEAR = 0.05  # relative growth of the bytes per token above which a quadratic term is fitted
WIDTHS_TRIED = 4
WIDTH_TOLERANCE = 0.05  # share of a layer's width, such as a router's, that may keep its size in a narrow copy


@dataclass(frozen=True)
class Workload:
    """The work of each device.

    Args:
        rows: Rows of a training batch, B.
        tokens: Tokens of a row, T, excluding soft tokens.
        targets: Targets of a row, U, if the loss covers the whole vocabulary; 0 if it covers only label words.
        devices: Total number of devices.
        sharded: Whether each device holds a shard of the frozen layers (FSDP) instead of all of them (DDP).
        per_copy: Number of devices that share one copy of the layers; 0 for all.
        autocast: Precision of products under mixed precision, or None.
        replicas: Number of prompts trained at once.
        answers: Rows of a validation batch, if text is generated; 0 otherwise.
        new_tokens: Maximum number of generated tokens.
        rollout: The work of a rollout, if training samples answers.
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
    rollout: RolloutWork | None = None

    @property
    def shares(self) -> int:
        """Number of devices that hold one copy of the layers together."""
        return (self.per_copy or self.devices) if self.sharded else 1


def attach_copy(module: SoftPromptModule, backbone: Backbone) -> SoftPromptModule:
    """Copy the method and attach it to a backbone, without label words if the stand-in tokenizer lacks them."""
    method = deepcopy(module)
    with skip_initial_values():
        try:
            method.attach(backbone)
        except ValueError:
            method = deepcopy(module)
            method.classes = method.classes_by_task = None
            method.attach(backbone)
    return method


@dataclass(frozen=True)
class MemoryUse:
    """Memory of a step and of generation, in bytes, at the full size of the backbone.

    Args:
        step: Saved for the backward pass of a step.
        layer: Saved in one layer of each stack.
        token: Keys and values of one token.
        row: Other cached states of a row during generation, independent of its length.
        depth: Number of layers of the deepest stack that runs.
    """

    step: float
    layer: float
    token: float
    row: float
    depth: int

    def plus(self, other: MemoryUse, times: float) -> MemoryUse:
        """Add `times` times another measurement; `times` may be negative."""
        return replace(
            self,
            step=self.step + times * other.step,
            layer=self.layer + times * other.layer,
            token=self.token + times * other.token,
            row=self.row + times * other.row,
        )


ZERO = MemoryUse(0.0, 0.0, 0.0, 0.0, 0)


def measure(module: SoftPromptModule, skeleton: Skeleton, workload: Workload) -> MemoryUse:
    """Measure the memory of a step on the narrowest and shallowest copy of the backbone that runs.

    Raises:
        ValueError: If no copy runs.
    """
    reasons: list[str] = []
    for factor in skeleton.shrink_factors[:WIDTHS_TRIED]:
        for shallow in (True, False):
            try:
                return Measurement(module, skeleton, workload, factor).run(shallow)
            except FAILURES as error:
                reasons.append(reason_of(error))
        if reasons[-1] in reasons[-3:-2]:
            break  # full-depth copies of two widths fail for the same reason, so the width is not the cause
    raise UnsupportedBackboneError(
        f"the memory of {skeleton.spec.name} cannot be estimated: no small copy of a "
        f"{type(skeleton.full_size.model).__name__} runs. "
        f"{reasons[0]} Train for a few steps and measure the memory"
    )


@dataclass(frozen=True)
class Measurement:
    """Measures narrow copies of a backbone.

    Args:
        module: The method.
        skeleton: The backbone, without weights.
        workload: The work of a device.
        factor: By which the copies are narrower.
    """

    module: SoftPromptModule
    skeleton: Skeleton
    workload: Workload
    factor: int

    def run(self, shallow: bool) -> MemoryUse:
        """Measure a copy with few layers and extrapolate to all layers of each stack, or measure all layers at once."""
        stacks = stacks_of(self.skeleton.full_size.model)
        counts = {stack.name: stack.fewest if shallow else len(stack) for stack in stacks}
        small = self._copy(counts)
        calls = self._count_calls(small, stacks)
        running = [stack for stack in stacks if calls[stack.name]]
        base = self._measure_copy(small, running)
        total, layers = base, ZERO
        for stack in running:
            missing = len(stack) - counts[stack.name]
            if not missing:
                layers = layers.plus(base, 1 / sum(calls.values()))
                continue
            deeper = self._copy({**counts, stack.name: counts[stack.name] + stack.period})
            added = self._measure_copy(deeper, running).plus(base, -1)
            one_layer = ZERO.plus(added, 1 / stack.period)
            total, layers = total.plus(one_layer, missing), layers.plus(one_layer, 1)
        depths = [calls[stack.name] + len(stack) - counts[stack.name] for stack in running]
        return MemoryUse(total.step, layers.step, total.token, total.row, max(depths, default=1))

    def _copy(self, counts: dict[str, int]) -> Backbone:
        copy = self.skeleton.small_copy(self.factor, counts)
        try_out(copy)
        return copy

    def _count_calls(self, small: Backbone, stacks: Sequence[Stack]) -> dict[str, int]:
        """Count the layers of each stack that a step runs; layers that share weights count each time."""
        calls = dict.fromkeys((stack.name for stack in stacks), 0)

        def count(name: str) -> Callable[..., None]:
            def add(*_: Any) -> None:
                calls[name] += 1

            return add

        method, batch = attach_copy(self.module, small), random_batch(small, 2, SHORT)
        with torch.no_grad():
            prompt = method.prompt(batch)
            small.states(batch, prompt)  # the first use selects the execution path
            handles = [
                layer.register_forward_hook(count(stack.name))
                for stack in stacks
                for layer in islice(stack.layers(small.model), 0, None, len(stack.names))
            ]
            small.states(batch, prompt)
        for handle in handles:
            handle.remove()
        return calls

    def _measure_copy(self, small: Backbone, running: Sequence[Stack]) -> MemoryUse:
        """Measure a copy and scale the result to the width of the full backbone."""
        lengths = {stack.name: len(stack) for stack in stacks_of(small.model)}
        full = self.skeleton.full_size.model
        wide = sum(matrix_widths(full, stack, lengths[stack.name]) for stack in running)
        narrow = sum(matrix_widths(small.model, stack, lengths[stack.name]) for stack in running)
        exact = wide / narrow if narrow else float(self.factor)
        scale = self.factor if abs(exact / self.factor - 1) < WIDTH_TOLERANCE else exact
        token, row = measure_cache(small) if self.workload.answers else (0.0, 0.0)
        step = extrapolate_step(self.module, small, self.workload)
        return MemoryUse(scale * step, 0, self.factor * token, self.factor * row, 0)


def measure_cache(backbone: Backbone) -> tuple[float, float]:
    """Measure the bytes that a model caches of one row during generation: per token, and independent of its length."""
    short, long = (_cache_size(backbone, tokens) for tokens in (SHORT, LONG))
    token = (long - short) / (LONG - SHORT)
    decoder_tokens = 1 if backbone.model.config.is_encoder_decoder else 0
    return token, short - token * (SHORT + decoder_tokens)


def _cache_size(backbone: Backbone, tokens: int) -> int:
    model, input_ids = backbone.model, torch.zeros(1, tokens, dtype=torch.long)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = input_ids[:, :1]
    if not model.can_generate():
        return 0
    with torch.no_grad():
        outputs = model(**inputs, use_cache=True)
    caches = [getattr(outputs, name, None) for name in ("past_key_values", "cache_params", "state")]
    return sum(t.numel() * t.element_size() for t in _tensors(caches, set()) if t.is_floating_point())


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield all tensors in an object, each once."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    items: Iterable[Any] = ()
    if isinstance(value, dict):
        items = value.values()
    elif isinstance(value, list | tuple):
        items = value
    if not items and hasattr(value, "__dict__"):
        items = vars(value).values()
    for item in items:
        yield from _tensors(item, seen)


def extrapolate_step(module: SoftPromptModule, backbone: Backbone, workload: Workload) -> float:
    """Extrapolate the bytes saved by a step of a copy to all rows at their full length: a + B (c + b T + d T^2).

    The quadratic term covers attention that materializes the scores of all pairs of tokens.
    """
    method = attach_copy(module, backbone)
    base_tokens, base = _measure_step(method, backbone, workload, 2, SHORT)
    _, more_rows = _measure_step(method, backbone, workload, 4, SHORT)
    long_tokens, long = _measure_step(method, backbone, workload, 2, LONG)
    longest_tokens, longest = _measure_step(method, backbone, workload, 2, LONGEST)
    per_token = (long - base) / (2 * (long_tokens - base_tokens))
    later_per_token = (longest - long) / (2 * (longest_tokens - long_tokens))
    quadratic = 0.0
    if later_per_token > per_token * (1 + NONLINEAR):
        quadratic = (later_per_token - per_token) / (longest_tokens - base_tokens)
    per_row = (more_rows - base) / 2
    fixed = base - 2 * per_row
    added = workload.tokens - base_tokens
    of_length = per_token * added + quadratic * added * (workload.tokens - long_tokens)
    return fixed + workload.rows * (per_row + of_length)


def _measure_step(
    method: SoftPromptModule, backbone: Backbone, workload: Workload, rows: int, tokens: int
) -> tuple[float, int]:
    """Measure the mean number of tokens of a row, and the bytes that a step saves."""
    batch = random_batch(backbone, rows, tokens)

    def step() -> Tensor:
        return backbone.states(batch, method.prompt(batch)).hidden.float().sum()

    autocast = torch.autocast("cpu", workload.autocast) if workload.autocast else nullcontext()
    with torch.no_grad():
        step()  # the first use selects the execution path
    weights = {tuple(parameter.shape) for parameter in backbone.parameters()}
    with autocast:
        return float(batch.mask.sum()) / rows, count_saved_bytes(step, weights)


def count_saved_bytes(step: Callable[[], Any], weights: set[tuple[int, ...]]) -> int:
    """Count the bytes of distinct storages that a step saves for its backward pass, except weights and their casts."""
    storages: dict[int, tuple[int, Tensor]] = {}

    def record(tensor: Tensor) -> Tensor:
        shape = tuple(tensor.shape)
        is_weight = tensor.dim() > 1 and (shape in weights or shape[::-1] in weights)
        is_frozen_leaf = tensor.is_leaf and not tensor.requires_grad
        if not is_frozen_leaf and not is_weight:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        step()
    return sum(size for size, _ in storages.values())
