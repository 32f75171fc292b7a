"""The fingerprint covers every weight, the configuration and the tokenizer, and costs little."""

import json
import logging
import os
import shutil

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_softprompt.backbones import fingerprint as module
from lightning_softprompt.backbones import location
from lightning_softprompt.backbones.causal import CausalBackbone
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.checkpoints.backbone_identity import backbone_identity, check_backbone
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.system.cache_dirs import cache_folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    return tiny.save("llama", tmp_path / "backbone")


def load(folder, **options):
    return load_backbone(BackboneSpec(name=str(folder), **options))


def tensors_of(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write(folder, tensors):
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_each_single_weight_changes_the_fingerprint(folder):
    before = load(folder).fingerprint()
    tensors = tensors_of(folder)
    seen = {before}
    for name, tensor in tensors.items():
        changed = tensor.clone()
        changed.flatten()[-1] += 1e-6
        write(folder, {**tensors, name: changed})
        seen.add(load(folder).fingerprint())
    assert len(seen) == len(tensors) + 1
    write(folder, tensors)
    assert load(folder).fingerprint() == before


def test_swapped_tensors_change_the_fingerprint(folder):
    before, tensors = load(folder).fingerprint(), tensors_of(folder)
    query, output = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qo")
    write(folder, {**tensors, query: tensors[output], output: tensors[query]})
    assert load(folder).fingerprint() != before


def swap_words(rules):
    vocabulary = rules["model"]["vocab"]
    vocabulary["good"], vocabulary["bad"] = vocabulary["bad"], vocabulary["good"]


def add_normalizer(rules):
    rules["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize("change", [swap_words, add_normalizer])
def test_another_tokenizer_is_rejected(folder, change):
    before = backbone_identity(load(folder))
    path = folder / "tokenizer.json"
    rules = json.loads(path.read_text())
    change(rules)
    path.write_text(json.dumps(rules))
    with pytest.raises(ValueError, match="another tokenizer"):
        check_backbone(before, load(folder), "p.safetensors")


def test_the_fingerprint_covers_the_configuration_without_options_of_loading(folder):
    before, path = load(folder).fingerprint(), folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "transformers_version": "0", "use_cache": False}))
    assert load(folder).fingerprint() == before
    path.write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert load(folder).fingerprint() != before


def test_precision_sharding_and_path_do_not_change_the_fingerprint(folder, tmp_path):
    before = load(folder)
    for dtype in ("bfloat16", "float16"):
        assert load(folder, dtype=dtype).fingerprint() == before.fingerprint()
    sharded = tmp_path / "sharded"
    shutil.copytree(folder, sharded)
    (sharded / "model.safetensors").unlink()
    before.model.save_pretrained(sharded, max_shard_size="10KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert load(sharded).fingerprint() == before.fingerprint()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_model_in_memory_has_the_fingerprint_of_its_files(family, tmp_path):
    loaded = load(tiny.save(family, tmp_path / family))
    in_memory = type(loaded)(loaded.model, loaded.codec, loaded.spec)
    assert in_memory.files is None
    assert in_memory.fingerprint() == loaded.fingerprint()


def test_weights_changed_in_place_change_the_fingerprint(folder):
    backbone = load(folder)
    before = backbone.fingerprint()
    with torch.no_grad():
        backbone.model.lm_head.weight[0, 0] += 1
    assert backbone.fingerprint() != before


def test_weights_without_values_have_no_fingerprint(folder):
    backbone = load(folder)
    with pytest.raises(ValueError, match="meta device"):
        CausalBackbone(backbone.model.to("meta"), backbone.codec, backbone.spec).fingerprint()


def test_files_are_hashed_once(folder, monkeypatch):
    before = load(folder).fingerprint()
    monkeypatch.setattr(module, "tensor_digest", None)
    assert load(folder).fingerprint() == before


def test_a_file_that_changed_with_the_same_size_and_time_is_hashed_again(folder):
    path = folder / "model.safetensors"
    before, stat = load(folder).fingerprint(), path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load(folder).fingerprint() != before


def test_a_damaged_digest_in_the_cache_is_ignored(folder):
    before = load(folder).fingerprint()
    (cached,) = cache_folder("fingerprints").iterdir()
    digest = json.loads(cached.read_text())["digest"]
    cached.write_text(cached.read_text().replace(digest, f"0{digest[1:]}"))
    assert load(folder).fingerprint() == before


def test_a_cache_that_cannot_be_written_is_not_used(folder, tmp_path, monkeypatch):
    before = load(folder).fingerprint()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load(folder).fingerprint() == before


def test_prompts_of_earlier_versions_are_compared_by_the_old_fingerprint_with_a_warning(folder, caplog):
    backbone = load(folder)
    old = {"name": "x", "fingerprint": backbone.sampled_fingerprint()}
    with caplog.at_level(logging.WARNING):
        check_backbone(old, backbone, "old.safetensors")
    assert "old.safetensors was written by an earlier version" in caplog.text
    with pytest.raises(ValueError, match="was trained on x"):
        check_backbone({**old, "fingerprint": "0" * 16}, backbone, "old.safetensors")


def test_the_fingerprint_of_earlier_versions_does_not_change():
    """The expected value is that of the first version, for weights that form a pattern."""
    model = torch.nn.ModuleDict({f"layer{n}": torch.nn.Linear(40, 30) for n in range(8)})
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight.copy_(torch.arange(weight.numel()).view_as(weight) / 64 + number)
    config = type("Config", (), {"model_type": "llama", "vocab_size": 46})
    sample = [(name, weight, weight.numel()) for name, weight in sorted(model.named_parameters())[::7]]
    assert module.digest_sample(sample, config, 32) == "b9da300adb745438"


@pytest.fixture
def gguf_spec(tmp_path, monkeypatch):
    """A folder with a GGUF file, whose conversion writes a tiny backbone."""
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(location, "_convert_weights", lambda file, folder: tiny.save("llama", folder))
    return BackboneSpec(name=str(tmp_path / "gguf"), gguf_file="tiny.gguf")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_conversion_is_converted_again(gguf_spec, name, caplog):
    before = load_backbone(gguf_spec).fingerprint()
    (cached,) = cache_folder("backbones").iterdir()
    content = (cached / name).read_bytes()
    (cached / name).write_bytes(content[:-9])
    with caplog.at_level(logging.WARNING):
        assert load_backbone(gguf_spec).fingerprint() == before
    assert "is damaged and is converted again" in caplog.text
    assert (cached / name).read_bytes() == content


def test_a_conversion_that_cannot_be_cached_is_used_for_the_process(gguf_spec, tmp_path, monkeypatch, caplog):
    before = load_backbone(gguf_spec).fingerprint()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load_backbone(gguf_spec).fingerprint() == before
    assert "for this process" in caplog.text
