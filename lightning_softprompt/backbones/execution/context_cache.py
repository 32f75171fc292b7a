"""Caches keys and values of the tokens that precede everything trainable: computed once, without gradient.

In training, these are the text tokens before a row's first soft token, such as retrieved passages in front of a prompt
and a question. In evaluation, the soft prompt does not change either, and is cached with them.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lightning_softprompt.backbones.execution.packing import KeyValueStore, Past, pack
from lightning_softprompt.backbones.execution.row_batch import RowBatch
from lightning_softprompt.backbones.insertion.embeddings import Entry
from lightning_softprompt.backbones.insertion.reading import Reading, replace_embeddings
from lightning_softprompt.core.types import Pairs
from lightning_softprompt.system.atomic_files import write_if_possible
from lightning_softprompt.system.tensor_files import read_tensors, write_tensors

log = logging.getLogger(__name__)
MIN_FROZEN_TOKENS = 64  # mean number of tokens before the first soft token from which a separate pass is faster
KEYS = "keys_and_values"


class ContextCache:
    """A least-recently-used cache of tensors. Entries that do not fit in memory move to disk, and are then deleted.

    Args:
        memory: Maximum number of bytes in memory.
        disk: Maximum number of bytes on disk.
        folder: The folder on disk.
    """

    def __init__(self, memory: int, disk: int = 0, folder: Path | None = None) -> None:
        self.memory, self.disk, self.folder = memory, disk, folder
        self.is_enabled = True  # False if training changes weights, from which all entries are computed
        self.entries: OrderedDict[str, Tensor] = OrderedDict()
        self.bytes = 0
        self.written: int | None = None  # bytes on disk, as far as this process knows
        self.transient: set[str] = set()  # entries that are not worth writing to disk

    def get(self, name: str, compute: Callable[[], Tensor], persistent: bool = True) -> Tensor:
        """The cached tensor, or the result of `compute`, which is then cached.

        Args:
            name: The name of the entry.
            compute: Computes the tensor.
            persistent: Whether the entry may be written to disk.
        """
        if not self.is_enabled:
            return compute()
        tensor = self.entries.pop(name, None)
        if tensor is not None:
            self.bytes -= tensor.nbytes
        elif persistent:
            tensor = self._read(name)
        if tensor is None:
            tensor = compute()
        self._insert(name, tensor, persistent)
        return tensor

    def _insert(self, name: str, tensor: Tensor, persistent: bool) -> None:
        if not persistent:
            self.transient.add(name)
        self.entries[name] = tensor
        self.bytes += tensor.nbytes
        while self.bytes > self.memory:
            oldest, dropped = self.entries.popitem(last=False)
            self.bytes -= dropped.nbytes
            if oldest not in self.transient:
                self._write(oldest, dropped)
            self.transient.discard(oldest)

    def _file(self, name: str) -> Path | None:
        return None if self.folder is None or not self.disk else self.folder / f"{name}.safetensors"

    def _read(self, name: str) -> Tensor | None:
        file = self._file(name)
        if file is None or not file.is_file():
            return None
        try:
            tensor = read_tensors(file)[KEYS]
            os.utime(file)  # marks the file as recently used
        except (ValueError, KeyError) as error:  # damaged, or written by an earlier version without a checksum
            log.warning("recomputing %s: %s", file, error)
            file.unlink(missing_ok=True)
            return None
        except OSError:  # deleted by another process
            return None
        return tensor

    def _write(self, name: str, tensor: Tensor) -> None:
        file = self._file(name)
        if file is None or file.is_file() or tensor.nbytes > self.disk:
            return
        write_if_possible(file, lambda draft: write_tensors(draft, {KEYS: tensor}))
        if file.is_file():
            self._trim(file.parent, file.stat().st_size)
        else:
            self.disk = 0  # one warning is enough

    def _trim(self, folder: Path, added: int) -> None:
        """Deletes the least recently used files until the rest fits."""
        if self.written is not None and self.written + added <= self.disk:
            self.written += added  # avoids listing the folder for each new file
            return
        stats = ((file.stat(), file) for file in folder.glob("*.safetensors"))
        newest_first = sorted(((stat.st_mtime, stat.st_size, file) for stat, file in stats), reverse=True)
        used = 0
        for _, size, file in newest_first:
            used += size
            if used > self.disk:
                file.unlink(missing_ok=True)
        self.written = min(used, self.disk)


class ContextReader:
    """Decides which tokens of a batch are cached, and computes their keys and values.

    Args:
        run: Computes keys and values [L, 2, N, C, D] of one row [1, C, H].
        cache: The cache.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], cache: ContextCache) -> None:
        self.run = run
        self.cache = cache

    def past_of(self, rows: RowBatch, limit: Tensor) -> tuple[Past | None, Tensor]:
        """The keys and values that precede a batch, and the number of tokens of each row that they cover [B].

        Args:
            rows: The batch.
            limit: [B] maximum number of tokens to cover.
        """
        if rows.kv or not self.cache.is_enabled:
            return rows.past, torch.zeros_like(limit)
        lengths = torch.minimum(rows.frozen_lengths, limit)
        if lengths.float().mean() >= MIN_FROZEN_TOKENS:
            return self._texts(rows, lengths), lengths
        end = 0 if torch.is_grad_enabled() else min(rows.prompt_end, int(limit.min()))
        if not end:
            return None, torch.zeros_like(lengths)
        keys_and_values = self._row(rows, 0, end, persistent=False)
        mask = rows.mask.new_ones(1, end)
        return Past(_by_layer(keys_and_values[None]), mask), lengths.new_full(lengths.shape, end)

    def _texts(self, rows: RowBatch, begin: Tensor) -> Past:
        """The past of rows that begin with text; one copy for all rows if their texts are equal."""
        lengths = begin.tolist()
        first = rows.keys[:, : lengths[0]]
        is_same = len(set(lengths)) == 1 and bool((first == first[:1]).all())
        if is_same:
            lengths = lengths[:1]
        by_row = {b: self._row(rows, b, length) for b, length in enumerate(lengths) if length}
        longest, example = max(lengths), next(iter(by_row.values()))
        shape = example.shape
        stacked = example.new_zeros(len(lengths), *shape[:3], longest, shape[4])
        for b, tensor in by_row.items():
            stacked[b, ..., : tensor.shape[3], :] = tensor
        mask = torch.arange(longest, device=begin.device) < begin[: len(lengths), None]
        return Past(_by_layer(stacked), mask)

    def _row(self, rows: RowBatch, b: int, length: int, persistent: bool = True) -> Tensor:
        keys, embeds = rows.keys[b, :length], rows.embeds[b : b + 1, :length]
        return get_or_compute(self.cache, self.run, keys, embeds, persistent)


class PrefilledCache:
    """The model's cache, filled with the keys and values of the prompt that generation starts from.

    Args:
        model: The transformers model.
        cache: Caches keys and values between calls.
    """

    def __init__(self, model: Any, cache: ContextCache) -> None:
        self.model = model
        self.cache = cache
        self.shapes: list[torch.Size] = []  # of the keys and values of each layer for one token

    def cache_for(self, rows: RowBatch, end: int, padding: Tensor, copies: int = 1) -> DynamicCache:
        """The model's cache of the first `end` columns of left-padded rows.

        Args:
            rows: Rows that share their first `end` tokens.
            end: Number of columns.
            padding: [B] columns of padding before each row; tokens that they move beyond `end` are left out.
            copies: Sequences of each row.

        Raises:
            PrefillUnsupportedError: If the model caches something other than the keys and values of its tokens.
        """
        cache = self.new_cache()
        keys, embeds = rows.keys[0, :end], rows.embeds[:1, :end]
        flat = get_or_compute(self.cache, self._run, keys, embeds, persistent=False, kind="own")
        columns = torch.arange(end, device=flat.device) - padding[:, None]
        columns = columns.clamp(min=0).repeat_interleave(copies, dim=0)  # [B * copies, end]
        parts = flat.split([end * shape.numel() for shape in self.shapes])
        states = [part.view(shape[0], end, shape[1]) for part, shape in zip(parts, self.shapes, strict=True)]
        states = [state[:, columns].transpose(0, 1) for state in states]
        for layer, pair in enumerate(zip(states[::2], states[1::2], strict=True)):
            cache.update(*pair, layer)
        return cache

    def new_cache(self) -> DynamicCache:
        """An empty cache with the layer types that the model uses.

        Raises:
            PrefillUnsupportedError: As in `cache_for`.
        """
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        _refuse_other_layers(cache, (DynamicLayer, DynamicSlidingWindowLayer))
        return cache

    @cached_property
    def is_supported(self) -> bool:
        """Whether the model caches only keys and values of its tokens, which a run of one token determines."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
        embeds = self.model.get_input_embeddings()(token)
        try:
            self.new_cache()
            self._run(embeds)
        except (NotImplementedError, TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            return False
        return True

    def _run(self, embeds: Tensor) -> Tensor:
        cache = DynamicCache()  # holds the whole prompt even if it is longer than a sliding window
        placeholders = torch.zeros(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        with replace_embeddings(self.model, Reading(placeholders, embeds, {})):
            self.model.base_model(input_ids=placeholders, past_key_values=cache, use_cache=True)
        _refuse_other_layers(cache, (DynamicLayer,))
        layers: list[Any] = cache.layers
        if not layers or not all(layer.is_initialized for layer in layers):
            raise PrefillUnsupportedError("some layers of the model cache no keys and values")
        states = [state for layer in layers for state in (layer.keys, layer.values)]
        self.shapes = [torch.Size((state.shape[1], state.shape[3])) for state in states]
        return torch.cat([state.flatten() for state in states])


class PrefillUnsupportedError(NotImplementedError):
    """A model that caches something other than the keys and values of its tokens."""


def _refuse_other_layers(cache: DynamicCache, known: tuple[type, ...]) -> None:
    names = {type(layer).__name__ for layer in cache.layers}
    unknown = sorted(names - {layer.__name__ for layer in known})
    if unknown:
        raise PrefillUnsupportedError(f"the model caches more than keys and values of tokens: {', '.join(unknown)}")


def get_or_compute(
    cache: ContextCache,
    run: Callable[[Tensor], Tensor],
    keys: Tensor,
    embeds: Tensor,
    persistent: bool = True,
    kind: str = "packed",
) -> Tensor:
    """Keys and values [L, 2, N, C, D] of one row. The row runs alone, so that the result does not depend on other rows.

    Args:
        cache: The cache.
        run: Computes them from [1, C, H].
        keys: [C] identifies the tokens.
        embeds: [1, C, H].
        persistent: Whether the row consists of text only, which later epochs read again.
        kind: Distinguishes results that are computed differently.
    """

    def compute() -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # training cannot use inference tensors
            return run(embeds)

    name = _entry_name(f"{kind} {embeds.dtype}", [keys] if persistent else [keys, embeds])
    return cache.get(name, compute, persistent).to(embeds.device)


def _by_layer(stacked: Tensor) -> Pairs:
    """[B, L, 2, N, C, D] by layer."""
    return {layer: (pair[:, 0], pair[:, 1]) for layer, pair in enumerate(stacked.unbind(1))}


def _entry_name(kind: str, tensors: list[Tensor]) -> str:
    """A digest of the contents of an entry."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        kind += f" {torch.get_autocast_dtype(device)}"
    digest = blake2b(kind.encode(), digest_size=16)
    for tensor in tensors:
        values = tensor.detach().contiguous().view(torch.uint8)
        digest.update(values.cpu().numpy().tobytes())
    return digest.hexdigest()


def keys_and_values(model: Any, embeds: Tensor, entry: Entry) -> Tensor:
    """Keys and values [L, 2, N, C, D] of one row [1, C, H], collected by the packed attention."""
    collected: KeyValueStore = {}
    mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    packing = pack(mask, 0, collected=collected)
    entry.run(
        model.base_model,
        embeds,
        position_ids=packing.positions,
        attention_mask=embeds.new_zeros(1, 1, 1, 1),
        use_cache=False,
        packing=packing,
    )
    return torch.stack([torch.cat(collected[layer]) for layer in sorted(collected)])
