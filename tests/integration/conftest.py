"""Runs without W&B, and a shallow copy of the packaged backbone for tests that do not depend on what it generates."""

import ctypes
import gc
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lightning_softprompt.backbones.location import resolve_location
from lightning_softprompt.core.backbone_spec import BackboneSpec

DEPTH = 2  # layers of the copy; the packaged backbone has 30


@pytest.fixture(scope="module", autouse=True)
def release_memory():
    """Returns the memory of models to the operating system after each file, which the C library would keep."""
    yield
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)


@pytest.fixture(autouse=True)
def disable_wandb(request, monkeypatch):
    """Disables W&B, which takes a fifth of the time of a short run, except in tests with the mark `wandb`."""
    if request.node.get_closest_marker("wandb") is None:
        monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture(scope="session")
def shallow_cache(tmp_path_factory):
    """A cache whose packaged backbone has the tokenizer, the embeddings and the first layers of the real one."""
    spec = BackboneSpec()
    source = Path(resolve_location(spec).name)
    cache = tmp_path_factory.mktemp("shallow")
    target = cache / "lightning-softprompt" / "backbones" / spec.name
    target.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        shutil.copy(source / name, target)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": DEPTH}))
    deeper = tuple(f"model.layers.{number}." for number in range(DEPTH, config["num_hidden_layers"]))
    weights = load_file(source / "model.safetensors")
    shallow = {name: weight for name, weight in weights.items() if not name.startswith(deeper)}
    save_file(shallow, target / "model.safetensors", metadata={"format": "pt"})
    return cache


@pytest.fixture
def shallow_backbone(shallow_cache, monkeypatch):
    """Uses the shallow copy as the packaged backbone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(shallow_cache))
