"""Adapter folders from strangers: damaged, contradictory and hostile ones are refused, and nothing is executed."""

import json
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from lightning_softprompt import from_peft
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.interchange.adapter_folder import CONFIG, EMBEDDINGS, PICKLED, WEIGHTS

CONFIG_OF_TOKENS = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3}


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load_backbone(BackboneSpec(name=str(tiny_folder("llama", 0)), start_token="none"))


def write(folder, changes=None, tensors=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({**CONFIG_OF_TOKENS, **(changes or {})}))
    save_file(tensors or {EMBEDDINGS: torch.ones(3, 32)}, folder / WEIGHTS)
    return folder


def refuse(folder, tiny, message, **arguments):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_peft(folder, backbone=tiny, **arguments)


def test_the_smallest_adapter_that_peft_loads_is_imported(tiny, tmp_path):
    prompt = from_peft(write(tmp_path), backbone=tiny)
    assert torch.equal(prompt.method.fold().tokens, torch.ones(1, 3, 32))
    half = from_peft(write(tmp_path, tensors={EMBEDDINGS: torch.ones(3, 32).bfloat16()}), backbone=tiny)
    assert half.method.fold().tokens.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({"peft_type": "LORA"}, None, "train it here with --model LoRA"),
        ({"peft_type": None}, None, "peft_type 'None' is not a prompt"),
        ({"num_virtual_tokens": 0}, None, "num_virtual_tokens must be a positive integer, got 0"),
        ({"num_virtual_tokens": True}, None, "must be a positive integer, got True"),
        ({"num_virtual_tokens": 4}, None, "must have the shape [4, 32]"),
        ({"token_dim": 64}, None, "token_dim is 64, but the backbone has 32"),
        ({}, {EMBEDDINGS: torch.ones(3, 16)}, "must have the shape [3, 32]"),
        ({}, {EMBEDDINGS: torch.ones(96)}, "must have the shape [3, 32]"),
        ({}, {EMBEDDINGS: torch.full((3, 32), float("nan"))}, "not finite"),
        ({}, {EMBEDDINGS: torch.ones(3, 32, dtype=torch.int64)}, "must hold floating-point numbers"),
        ({}, {"other": torch.ones(3, 32)}, "has no tensor 'prompt_embeddings'"),
        ({}, {EMBEDDINGS: torch.ones(3, 32), "score.weight": torch.ones(2, 32)}, "cannot be imported: score.weight"),
        ({"peft_type": "PREFIX_TUNING", "num_layers": 5}, None, "num_layers is 5, but the backbone has 2"),
        ({"peft_type": "PREFIX_TUNING"}, None, "must have the shape [3, 64]"),
    ],
)  # fmt: skip
def test_adapters_that_contradict_the_backbone_are_refused(tiny, tmp_path, changes, tensors, message):
    refuse(write(tmp_path, changes, tensors), tiny, message)


def test_damaged_folders_are_refused(tiny, tmp_path):
    refuse(tmp_path / "missing", tiny, "is not a folder")
    folder = write(tmp_path / "outer" / "inner")
    refuse(folder.parent, tiny, "pass one of its folders: inner")
    for content, message in (("{", "is not valid JSON"), ("[" * 100_000, "is not valid JSON"), ("[]", "JSON object")):
        (folder / CONFIG).write_text(content)
        refuse(folder, tiny, message)
    write(folder)
    (folder / WEIGHTS).write_bytes(b"\xff" * 100)
    refuse(folder, tiny, "is not a valid safetensors file")


def test_pickles_and_links_are_not_read(tiny, tmp_path):
    folder = write(tmp_path / "adapter")
    (folder / WEIGHTS).rename(tmp_path / "outside.safetensors")
    (folder / PICKLED).write_bytes(pickle.dumps(print))
    refuse(folder, tiny, "is a pickle, which is not read")
    (folder / WEIGHTS).symlink_to(tmp_path / "outside.safetensors")
    refuse(folder, tiny, "link to a file outside its folder")


def test_templates_begin_with_the_soft_tokens(tiny, tmp_path, load):
    folder = write(tmp_path)
    assert from_peft(folder, tiny, "{text} :{target}").row_format().template == "{soft}<s>{text} :{target}"
    assert from_peft(folder, tiny, "{soft}{text}{target}").row_format().template == "{soft}{text}{target}"
    assert from_peft(folder, tiny).row_format().template == "{soft}<s>{text}{target}"
    refuse(folder, tiny, "must begin with {soft}", template="{text}{soft}{target}")
    refuse(folder, tiny, "has a single task", task_names=["a"])
    refuse(folder, load("llama"), "rows of")


def test_the_named_backbone_is_loaded(tiny_folder, tmp_path):
    folder = write(tmp_path, {"base_model_name_or_path": str(tiny_folder("llama", 0))})
    assert from_peft(folder).backbone.spec.start_token == "none"
    with pytest.raises(ValueError, match="does not name its backbone"):
        from_peft(write(tmp_path))
