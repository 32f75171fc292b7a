"""Keys and values of what comes before anything trainable: computed once, without gradient, and kept.

In training that is the text before a row's first soft token, as where soft tokens stand behind the passages that a
question is about. In evaluation the soft prompt itself does not change either.
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

from lightning_softprompt.backbones.execution.packing import Kept, Past, pack
from lightning_softprompt.backbones.execution.row_batch import RowBatch
from lightning_softprompt.backbones.insertion.embeddings import Entry
from lightning_softprompt.backbones.insertion.reading import Reading, embedded_as
from lightning_softprompt.core.types import Pairs
from lightning_softprompt.system.atomic_files import write_if_possible
from lightning_softprompt.system.tensor_files import read_tensors, write_tensors

log = logging.getLogger(__name__)
WORTH = 64  # tokens before the first soft one, on average over a batch, from which a pass of their own pays
KEYS = "keys_and_values"


class ContextCache:
    """Tensors by name, the least recently used first to go: from memory to disk, and from there for good.

    Args:
        memory: Most bytes in memory.
        disk: Most bytes on disk.
        folder: Where on disk.
    """

    def __init__(self, memory: int, disk: int = 0, folder: Path | None = None) -> None:
        self.memory, self.disk, self.folder = memory, disk, folder
        self.held: OrderedDict[str, Tensor] = OrderedDict()
        self.bytes = 0
        self.written: int | None = None  # bytes on disk, as far as this process knows
        self.passing: set[str] = set()  # not worth the disk

    def get(self, name: str, make: Callable[[], Tensor], lasting: bool = True) -> Tensor:
        """What is kept under a name, made where it is not."""
        found = self.held.pop(name, None)
        if found is not None:
            self.bytes -= found.nbytes
        else:
            found = self._read(name) if lasting else None
        found = make() if found is None else found
        self._hold(name, found, lasting)
        return found

    def _hold(self, name: str, tensor: Tensor, lasting: bool) -> None:
        if not lasting:
            self.passing.add(name)
        self.held[name] = tensor
        self.bytes += tensor.nbytes
        while self.bytes > self.memory:
            oldest, dropped = self.held.popitem(last=False)
            self.bytes -= dropped.nbytes
            if oldest not in self.passing:
                self._write(oldest, dropped)
            self.passing.discard(oldest)

    def _file(self, name: str) -> Path | None:
        return None if self.folder is None or not self.disk else self.folder / f"{name}.safetensors"

    def _read(self, name: str) -> Tensor | None:
        file = self._file(name)
        if file is None or not file.is_file():
            return None
        try:
            tensor = read_tensors(file)[KEYS]
            os.utime(file)  # used just now
        except (ValueError, KeyError) as error:  # written without a checksum by an earlier version, or changed since
            log.warning("%s is computed again: %s", file, error)
            file.unlink(missing_ok=True)
            return None
        except OSError:  # another process dropped it
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
        if self.written is not None and self.written + added <= self.disk:
            self.written += added  # without looking at all files for each of them
            return
        files = sorted(((f.stat().st_mtime, f.stat().st_size, f) for f in folder.glob("*.safetensors")), reverse=True)
        used = 0
        for _, size, file in files:
            used += size
            if used > self.disk:
                file.unlink(missing_ok=True)
        self.written = min(used, self.disk)


class Contexts:
    """Finds what of a batch can be kept, and computes what is not.

    Args:
        run: Gives keys and values [L, 2, N, C, D] of one row [1, C, H].
        cache: Keeps them.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], cache: ContextCache) -> None:
        self.run = run
        self.cache = cache

    def of(self, rows: RowBatch, until: Tensor) -> tuple[Past | None, Tensor]:
        """The past of a batch, and how many tokens of each row it covers [B].

        Args:
            rows: The batch.
            until: [B] tokens that may be covered at most.
        """
        if rows.kv:
            return rows.injected, torch.zeros_like(until)
        begin = torch.minimum(rows.frozen, until)
        if begin.float().mean() >= WORTH:
            return self._texts(rows, begin), begin
        end = 0 if torch.is_grad_enabled() else min(rows.prompt_end, int(until.min()))
        if not end:
            return None, torch.zeros_like(begin)
        inside = rows.mask.new_ones(1, end)
        return Past(_layers(self._kept(rows, 0, end, lasting=False)[None]), inside), begin.new_full(begin.shape, end)

    def _texts(self, rows: RowBatch, begin: Tensor) -> Past:
        lengths = begin.tolist()
        same = len(set(lengths)) == 1 and bool((rows.keys[:, : lengths[0]] == rows.keys[:1, : lengths[0]]).all())
        each = {b: self._kept(rows, b, n) for b, n in enumerate(lengths[:1] if same else lengths) if n}
        count, longest, some = 1 if same else len(lengths), max(lengths), next(iter(each.values()))
        stacked = some.new_zeros(count, *some.shape[:3], longest, some.shape[4])
        for b, kept in each.items():
            stacked[b, ..., : kept.shape[3], :] = kept
        inside = torch.arange(longest, device=begin.device) < begin[:count, None]
        return Past(_layers(stacked), inside)

    def _kept(self, rows: RowBatch, b: int, length: int, lasting: bool = True) -> Tensor:
        return kept(self.cache, self.run, rows.keys[b, :length], rows.embeds[b : b + 1, :length], lasting)


class Prefilled:
    """Keys and values of a prompt that generation begins with.

    Args:
        model: The transformers model.
        cache: Keeps them.
    """

    def __init__(self, model: Any, cache: ContextCache) -> None:
        self.model = model
        self.cache = cache
        self.shapes: list[torch.Size] = []  # of the keys and values of each layer for one token

    def cache_for(self, rows: RowBatch, end: int, padding: Tensor, copies: int = 1) -> DynamicCache:
        """The model's cache of the first `end` columns of rows that are padded before them.

        Args:
            rows: Rows that share their first `end` tokens.
            end: Columns.
            padding: [B] columns of padding before each row; what of the prompt they push beyond `end` is left out.
            copies: Sequences of each row.

        Raises:
            PrefillUnsupportedError: If the model keeps something else than the keys and values of its tokens.
        """
        cache = self.new_cache()
        flat = kept(self.cache, self._run, rows.keys[0, :end], rows.embeds[:1, :end], lasting=False, way="own")
        columns = (torch.arange(end, device=flat.device) - padding[:, None]).clamp(min=0)
        columns = columns.repeat_interleave(copies, dim=0)  # [B * copies, end]
        parts = flat.split([end * shape.numel() for shape in self.shapes])
        states = [part.view(shape[0], end, shape[1]) for part, shape in zip(parts, self.shapes, strict=True)]
        states = [state[:, columns].transpose(0, 1) for state in states]
        for number, pair in enumerate(zip(states[::2], states[1::2], strict=True)):
            cache.update(*pair, number)
        return cache

    def new_cache(self) -> DynamicCache:
        """An empty cache of the model's own kinds of layers.

        Raises:
            PrefillUnsupportedError: As in `cache_for`.
        """
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        _refuse_other_layers(cache, (DynamicLayer, DynamicSlidingWindowLayer))
        return cache

    @cached_property
    def is_supported(self) -> bool:
        """Whether the model keeps keys and values of its tokens and nothing else, which one token shows."""
        embeds = self.model.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long, device=self.model.device))
        try:
            self.new_cache()
            self._run(embeds)
        except (NotImplementedError, TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            return False
        return True

    def _run(self, embeds: Tensor) -> Tensor:
        cache = DynamicCache()  # keeps all of a prompt that is longer than a sliding window
        placeholders = torch.zeros(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        with embedded_as(self.model, Reading(placeholders, embeds, {})):
            self.model.base_model(input_ids=placeholders, past_key_values=cache, use_cache=True)
        _refuse_other_layers(cache, (DynamicLayer,))
        layers: list[Any] = cache.layers
        if not layers or not all(layer.is_initialized for layer in layers):
            raise PrefillUnsupportedError("the model keeps no keys and values in some layers")
        states = [state for layer in layers for state in (layer.keys, layer.values)]
        self.shapes = [torch.Size((state.shape[1], state.shape[3])) for state in states]
        return torch.cat([state.flatten() for state in states])


class PrefillUnsupportedError(NotImplementedError):
    """A model that keeps something else than the keys and values of its tokens."""


def _refuse_other_layers(cache: DynamicCache, known: tuple[type, ...]) -> None:
    if unknown := sorted({type(layer).__name__ for layer in cache.layers} - {layer.__name__ for layer in known}):
        raise PrefillUnsupportedError(f"the model keeps more than keys and values of tokens: {', '.join(unknown)}")


def kept(
    cache: ContextCache,
    run: Callable[[Tensor], Tensor],
    keys: Tensor,
    embeds: Tensor,
    lasting: bool = True,
    way: str = "packed",
) -> Tensor:
    """[L, 2, N, C, D] of one row. It is computed alone, so that its numbers depend on no other and runs repeat.

    Args:
        cache: Where they are kept.
        run: Computes them from [1, C, H].
        keys: [C] what the tokens are.
        embeds: [1, C, H].
        lasting: Whether it is text alone, which will come again.
        way: What tells ways to compute them apart.
    """

    def make() -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # evaluation's tensors could not be trained with
            return run(embeds)

    name = _name(f"{way} {embeds.dtype}", [keys] if lasting else [keys, embeds])
    return cache.get(name, make, lasting).to(embeds.device)


def _layers(stacked: Tensor) -> Pairs:
    """[B, L, 2, N, C, D] by layer."""
    return {number: (layer[:, 0], layer[:, 1]) for number, layer in enumerate(stacked.unbind(1))}


def _name(way: str, said: list[Tensor]) -> str:
    device = said[0].device.type
    way += f" {torch.get_autocast_dtype(device)}" if torch.is_autocast_enabled(device) else ""
    digest = blake2b(way.encode(), digest_size=16)
    for tensor in said:
        digest.update(tensor.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def keys_and_values(model: Any, embeds: Tensor, entry: Entry) -> Tensor:
    """[L, 2, N, C, D] of one row [1, C, H], by the packed attention, which hands them out."""
    kept: Kept = {}
    packing = pack(torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device), 0, kept=kept)
    entry.run(
        model.base_model,
        embeds,
        position_ids=packing.positions,
        attention_mask=embeds.new_zeros(1, 1, 1, 1),
        use_cache=False,
        packing=packing,
    )
    return torch.stack([torch.cat(kept[layer]) for layer in sorted(kept)])
