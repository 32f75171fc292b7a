"""The fingerprint of a backbone: a digest of all weights, the configuration and the tokenizer.

Weights that come from files are hashed as the files hold them, so that the digest does not depend on the precision or
the quantization that they are loaded with. It is computed once and kept in the user's cache, by path, size, times and
inode of each file. Models that were made in memory are hashed directly, to the same digest as the files that
`save_pretrained` writes.
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
SCHEME = "2"  # the first part of a fingerprint; another way of hashing is another scheme
SAMPLED = re.compile(r"[0-9a-f]{16}")  # fingerprints of the first scheme, which sampled the weights
CHUNK = 1 << 22  # numbers that are converted at once
THREADS = 4

# What a configuration says of loading and saving, and not of what the model computes.
IRRELEVANT = {
    "_attn_implementation_autoset", "_name_or_path", "architectures", "attn_implementation", "dtype",
    "gradient_checkpointing", "quantization_config", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip

FileIdentity = list[list[Any]]  # path, size, times and inode of each file


class WeightFiles:
    """The safetensors files in a folder that a model was loaded from, as they are at this moment.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.identity = self._stat()

    def _stat(self) -> FileIdentity:
        files = [path.resolve() for path in [*weight_files(self.folder), self.folder / "config.json"]]
        stats = [(str(path), path.stat()) for path in files if path.is_file()]
        return [[path, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev] for path, s in stats]

    @property
    def unchanged(self) -> bool:
        """Whether the files are still those that were loaded."""
        return self.identity == self._stat()

    def digest(self) -> str:
        """The digest of all weights and the configuration: the one in the user's cache, or a new one."""
        key = sha256(json.dumps([SCHEME, self.identity]).encode()).hexdigest()[:32]
        path = cache_folder("fingerprints") / f"{key}.json"
        kept = _read_kept(path, key)
        if kept is not None:
            return kept
        digest = combine_digests(self._tensor_digests(), json.loads((self.folder / "config.json").read_bytes()))
        _keep(path, key, digest)
        return digest

    def _tensor_digests(self) -> dict[str, str]:
        digests: dict[str, str] = {}
        for path in weight_files(self.folder):
            digests |= _file_digests(path)
        return digests


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads from a folder; none where weights come from elsewhere, as with an adapter."""
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
    """The digest of each name; hashing releases the interpreter's lock."""
    with ThreadPoolExecutor(min(THREADS, cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def tensor_digest(tensor: Tensor) -> str:
    """A digest of shape and values. Floating-point values count as float32, whichever precision holds them."""
    converted = tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if tensor.numel() > 1 and not any(tensor.stride()):  # one number that is repeated, as where memory is estimated
        return tensor_digest(tensor[(0,) * tensor.dim()])
    flat = tensor.detach().flatten()
    digest = sha256(f"{'float' if converted else tensor.dtype} {list(tensor.shape)}".encode())
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK].cpu()
        part = part.float() if converted else part
        digest.update(part.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def combine_digests(tensors: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """One digest of the digests of all tensors by name, and of what the configuration says of the computation."""
    digest = sha256(_canonical(relevant(config)))
    for name, one in sorted(tensors.items()):
        digest.update(f"\0{name}\0{one}".encode())
    return digest.hexdigest()[:24]


def relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that decides what a model computes."""
    kept = {name: value for name, value in config.items() if name not in IRRELEVANT}
    return {name: relevant(value) if isinstance(value, Mapping) else value for name, value in kept.items()}


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def model_digest(model: Any, read: Callable[[str, Tensor], Tensor] | None = None) -> str:
    """The digest of a model in memory, over parameters and persistent buffers; tied ones count once.

    Args:
        model: A model of transformers.
        read: Gives the values of a weight by its name, where it is held in another form.

    Raises:
        ValueError: If weights have no values, as on the meta device.
    """
    tensors = distinct_tensors(model)
    if empty := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(f"weights without values have no fingerprint: {', '.join(empty[:3])} are on the meta device")
    values = read or (lambda _, tensor: tensor)
    digests = _in_threads(lambda name: tensor_digest(values(name, tensors[name])), list(tensors))
    return combine_digests(digests, json.loads(model.config.to_json_string()))


def distinct_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, those that share their memory under the first name alone."""
    saved = model.state_dict(keep_vars=True)
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if name in saved}


def versions(model: nn.Module) -> tuple[int, ...]:
    """How often each weight was changed in place; equal as long as none of them was."""
    tensors = [*model.parameters(), *model.buffers()]
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)


def sampled_digest(named: Iterable[tuple[str, Tensor, int]], config: Any, hidden_size: int) -> str:
    """The fingerprint of the first scheme, by which older prompts are known: a sample of every seventh weight.

    Args:
        named: Name, values and held numbers of each seventh parameter.
        config: The model's.
        hidden_size: H.
    """
    digest = sha256(f"{config.model_type}|{config.vocab_size}|{hidden_size}".encode())
    for name, weight, held in named:
        sample = weight.detach().flatten()[:: max(1, held // 256)].to("cpu", torch.bfloat16)
        digest.update(name.encode() + sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of what decides how text becomes tokens: vocabulary, merges, added tokens and the steps around them."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    settings = {name: value for name, value in rules.items() if name not in ("version", "truncation", "padding")}
    model = settings.get("model", {})
    if model.get("merges"):
        model["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return sha256(_canonical([_without_defaults(settings), special])).hexdigest()[:12]


def _without_defaults(value: Any) -> Any:
    """A JSON value without fields that are unset, since versions of the library write more or fewer of them."""
    if isinstance(value, dict):
        return {name: _without_defaults(v) for name, v in value.items() if v is not None and v is not False}
    return [_without_defaults(v) for v in value] if isinstance(value, list) else value


def fingerprint(weights: str, tokenizer: str, quantization: str | None) -> str:
    """The parts of a fingerprint as one text."""
    return "-".join([SCHEME, weights, tokenizer, *([] if quantization is None else [quantization])])


def differing_part(one: str, other: str) -> str:
    """Which part of two fingerprints of the present scheme differs."""
    a, b = one.split("-", 3), other.split("-", 3)
    if len(a) < 3 or len(b) < 3 or a[0] != b[0]:
        return "the fingerprints are of different schemes"
    pairs = {"set of weights or configuration": (a[1], b[1]), "tokenizer": (a[2], b[2])}
    parts = [name for name, (x, y) in pairs.items() if x != y]
    return f"another {' and another '.join(parts)}" if parts else "the same weights, quantized in another way"


def _read_kept(path: Path, key: str) -> str | None:
    try:
        kept = json.loads(path.read_bytes())
        digest = str(kept["digest"])
        return digest if kept["check"] == _check(key, digest) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(path: Path, key: str, digest: str) -> None:
    content = json.dumps({"digest": digest, "check": _check(key, digest)})
    write_if_possible(path, lambda draft: draft.write_text(content))


def _check(key: str, digest: str) -> str:
    return sha256(f"{key} {digest}".encode()).hexdigest()[:16]
