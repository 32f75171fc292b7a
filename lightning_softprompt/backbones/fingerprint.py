"""The fingerprint of a backbone: a digest of all weights, the configuration and the tokenizer.

Weights from files are hashed as they are in the files, so that the digest does not depend on the precision or the
quantization with which they are loaded. The digest is computed once and cached by path, size, times and inode of each
file. Models that were created in memory are hashed directly. Their digest is that of the files that `save_pretrained`
writes.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from os import cpu_count
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lightning_softprompt.system.atomic_files import write_if_possible
from lightning_softprompt.system.cache_dirs import cache_folder

log = logging.getLogger(__name__)
SCHEME = "2"  # the first part of a fingerprint, which changes with the hash function
SAMPLED = re.compile(r"[0-9a-f]{16}")  # fingerprints of the first scheme, which sampled the weights
CHUNK = 1 << 22  # numbers that are converted together
THREADS = 4

# Settings of a configuration that concern loading and saving, and do not change the results of the model.
IRRELEVANT = {
    "_attn_implementation_autoset", "_name_or_path", "architectures", "attn_implementation", "dtype",
    "gradient_checkpointing", "quantization_config", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip

FileIdentity = list[list[Any]]  # path, size, times and inode of each file


class WeightFiles:
    """The safetensors files that a model was loaded from, with their state at that time.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.identity = self._stat()

    def _stat(self) -> FileIdentity:
        paths = [*weight_files(self.folder), self.folder / "config.json"]
        files = [path.resolve() for path in paths]
        stats = [(str(path), path.stat()) for path in files if path.is_file()]
        return [[path, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev] for path, s in stats]

    @property
    def is_unchanged(self) -> bool:
        """Whether the files have not changed since they were loaded."""
        return self.identity == self._stat()

    def digest(self) -> str:
        """Returns the digest of all weights and the configuration, from the cache if possible."""
        content = json.dumps([SCHEME, self.identity])
        key = sha256(content.encode()).hexdigest()[:32]
        path = cache_folder("fingerprints") / f"{key}.json"
        cached = _read_digest(path, key)
        if cached is not None:
            return cached
        config = json.loads((self.folder / "config.json").read_bytes())
        digest = combine_digests(self._tensor_digests(), config)
        _cache_digest(path, key, digest)
        return digest

    def _tensor_digests(self) -> dict[str, str]:
        digests: dict[str, str] = {}
        for path in weight_files(self.folder):
            digests |= _file_digests(path)
        return digests


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that transformers loads from a folder; none if weights are elsewhere, as for an adapter."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if (folder / "adapter_config.json").exists():
        return []
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    shards = json.loads(index.read_bytes())["weight_map"].values()
    return sorted({folder / Path(shard).name for shard in shards})


def _file_digests(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())

    def digest(name: str) -> str:
        with safe_open(path, framework="pt") as file:
            return tensor_digest(file.get_tensor(name))

    return _in_threads(digest, names)


def _in_threads(digest: Callable[[str], str], names: list[str]) -> dict[str, str]:
    """Computes the digest of each name in threads, since hashing releases the interpreter's lock."""
    with ThreadPoolExecutor(min(THREADS, cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def tensor_digest(tensor: Tensor) -> str:
    """Returns a digest of shape and values. Floating-point values are hashed as float32, whatever their precision."""
    is_converted = tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if tensor.numel() > 1 and not any(tensor.stride()):  # one repeated number, as in an estimate of memory
        return tensor_digest(tensor[(0,) * tensor.dim()])
    flat = tensor.detach().flatten()
    kind = "float" if is_converted else tensor.dtype
    digest = sha256(f"{kind} {list(tensor.shape)}".encode())
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK].cpu()
        part = part.float() if is_converted else part
        digest.update(part.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def combine_digests(tensors: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """Returns one digest of the digests of all tensors by name, and of the relevant part of the configuration."""
    digest = sha256(_canonical(relevant(config)))
    for name, of_tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{of_tensor}".encode())
    return digest.hexdigest()[:24]


def relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a configuration that determines the results of a model."""
    values = {name: value for name, value in config.items() if name not in IRRELEVANT}
    return {name: relevant(value) if isinstance(value, Mapping) else value for name, value in values.items()}


def _canonical(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


def model_digest(model: Any, read: Callable[[str, Tensor], Tensor] | None = None) -> str:
    """Returns the digest of a model in memory, over parameters and persistent buffers; tied ones count once.

    Args:
        model: A model of transformers.
        read: Returns the values of a weight by its name, if they are stored in another form.

    Raises:
        ValueError: If weights have no values, as on the meta device.
    """
    tensors = distinct_tensors(model)
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise ValueError(f"weights without values have no fingerprint: {', '.join(empty[:3])} are on the meta device")
    read = read or (lambda _, tensor: tensor)
    digests = _in_threads(lambda name: tensor_digest(read(name, tensors[name])), list(tensors))
    return combine_digests(digests, json.loads(model.config.to_json_string()))


def distinct_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and persistent buffers by name; tensors that share their memory have the first name only."""
    saved = model.state_dict(keep_vars=True)
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if name in saved}


def versions(model: nn.Module) -> tuple[int, ...]:
    """Returns how often each weight was changed in place; equal as long as none was changed."""
    tensors = [*model.parameters(), *model.buffers()]
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)


def digest_sample(named: Iterable[tuple[str, Tensor, int]], config: Any, hidden_size: int) -> str:
    """Returns the fingerprint of the first scheme, which older prompts contain, from a sample of the weights.

    Args:
        named: Name, values and number of values of every seventh parameter.
        config: The configuration of the model.
        hidden_size: H.
    """
    digest = sha256(f"{config.model_type}|{config.vocab_size}|{hidden_size}".encode())
    for name, weight, count in named:
        step = max(1, count // 256)
        sample = weight.detach().flatten()[::step].to("cpu", torch.bfloat16)
        values = sample.view(torch.int16).numpy()
        digest.update(name.encode() + values.tobytes())
    return digest.hexdigest()[:16]


def tokenizer_digest(tokenizer: Any) -> str:
    """Returns a digest of what determines tokenization: vocabulary, merges, added tokens and the steps around them."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    ignored = ("version", "truncation", "padding")
    settings = {name: value for name, value in rules.items() if name not in ignored}
    model = settings.get("model", {})
    if model.get("merges"):
        model["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return sha256(_canonical([_without_defaults(settings), special])).hexdigest()[:12]


def _without_defaults(value: Any) -> Any:
    """Removes unset fields from a JSON value, since versions of the library write more or fewer of them."""
    if isinstance(value, dict):
        fields = {name: field for name, field in value.items() if field is not None and field is not False}
        return {name: _without_defaults(field) for name, field in fields.items()}
    return [_without_defaults(item) for item in value] if isinstance(value, list) else value


def fingerprint(weights: str, tokenizer: str, quantization: str | None) -> str:
    """Joins the parts of a fingerprint."""
    parts = [SCHEME, weights, tokenizer]
    return "-".join(parts if quantization is None else [*parts, quantization])


def differing_part(one: str, other: str) -> str:
    """Describes which parts of two fingerprints of the current scheme differ."""
    a, b = one.split("-", 3), other.split("-", 3)
    if len(a) < 3 or len(b) < 3 or a[0] != b[0]:
        return "the fingerprints are of different schemes"
    pairs = {"set of weights or configuration": (a[1], b[1]), "tokenizer": (a[2], b[2])}
    parts = [name for name, (x, y) in pairs.items() if x != y]
    return f"another {' and another '.join(parts)}" if parts else "the same weights, quantized in another way"


def _read_digest(path: Path, key: str) -> str | None:
    """Reads a cached digest; None if the file is missing or damaged."""
    try:
        cached = json.loads(path.read_bytes())
        digest = str(cached["digest"])
        return digest if cached["check"] == _check(key, digest) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _cache_digest(path: Path, key: str, digest: str) -> None:
    content = json.dumps({"digest": digest, "check": _check(key, digest)})
    write_if_possible(path, lambda draft: draft.write_text(content))


def _check(key: str, digest: str) -> str:
    return sha256(f"{key} {digest}".encode()).hexdigest()[:16]
