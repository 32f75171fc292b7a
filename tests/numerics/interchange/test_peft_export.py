"""Exported prompts have the same logits in PEFT, and the same tensors after they are imported again."""

import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lightning_softprompt import ClassHead, Prompt, from_peft, methods, to_peft
from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.core.types import Classes
from lightning_softprompt.interchange import peft_export
from lightning_softprompt.interchange.adapter_folder import EMBEDDINGS, README, WEIGHTS
from lightning_softprompt.methods.optimizers import trainable_parameters

LEAD, NO_LEAD = RowFormat("it is {soft}{text} :{target}"), RowFormat("{soft}{text} :{target}")
TOKEN_METHODS = [
    (methods.PromptTuning, {"length": 3}),
    (methods.PTuning, {"blocks": [3]}),
    (methods.ResidualPromptTuning, {"length": 3}),
]
KV_METHODS = [(methods.PrefixTuning, {"length": 3, "width": 8}), (methods.PTuningV2, {"length": 3})]


def make_prompt(backbone, method_class, row_format=LEAD, classes=None, **arguments):
    torch.manual_seed(0)
    method = method_class(backbone=backbone.spec, classes=classes, **arguments)
    method.attach(backbone)
    for parameter in trainable_parameters(method).values():
        torch.nn.init.normal_(parameter.data, std=0.5)
    return Prompt(method, {"": row_format})


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
@pytest.mark.parametrize(("method_class", "arguments"), TOKEN_METHODS)
def test_soft_tokens_have_the_logits_of_peft(load, family, method_class, arguments, tmp_path):
    prompt = make_prompt(load(family), method_class, **arguments)
    export = to_peft(prompt, tmp_path / "adapter")
    assert export.error < 1e-6
    has_start_token = family != "t5"
    assert export.num_lead == has_start_token + 2
    assert export.num_virtual_tokens == export.num_lead + 3
    embeddings = load_file(export.folder / WEIGHTS)[EMBEDDINGS]
    assert torch.equal(embeddings[export.num_lead :][:3], prompt.method.fold().tokens[0])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("method_class", "arguments"), KV_METHODS)
def test_keys_and_values_have_the_logits_of_peft(load, family, method_class, arguments, tmp_path):
    prompt = make_prompt(load(family), method_class, **arguments)
    export = to_peft(prompt, tmp_path / "adapter")
    assert export.error < 1e-6
    assert (export.num_lead, export.num_virtual_tokens) == (0, 3)
    back = from_peft(export.folder).method.fold()
    for layer, (key, value) in prompt.method.fold().kv["self"].items():
        assert torch.equal(back.kv["self"][layer][0], key)
        assert torch.equal(back.kv["self"][layer][1], value)


def test_an_imported_adapter_is_exported_as_the_same_tensor(load, tmp_path):
    to_peft(make_prompt(load("llama"), methods.PromptTuning, length=3), tmp_path / "one")
    to_peft(from_peft(tmp_path / "one", template=NO_LEAD.template), tmp_path / "two")
    one, two = (load_file(tmp_path / name / WEIGHTS)[EMBEDDINGS] for name in ("one", "two"))
    assert torch.equal(one, two)


def test_the_code_of_the_readme_generates_the_same_answer(load, tmp_path):
    prompt = make_prompt(load("llama"), methods.PromptTuning, length=3)
    expected = prompt.generate("a warm and funny film", max_new_tokens=32)[0]
    folder = to_peft(prompt, tmp_path / "adapter").folder
    code = re.search(r"```python\n(.*?)```", (folder / README).read_text(), re.DOTALL)[1]
    names = {"FOLDER": str(folder)}
    exec(code.replace('text="..."', 'text="a warm and funny film"'), names)
    tokenizer = AutoTokenizer.from_pretrained(prompt.backbone.spec.name)
    assert tokenizer.decode(names["answer"][0], skip_special_tokens=True).endswith(expected)
    assert expected


REFUSED = [
    (methods.PromptTuning, {"length": 2}, RowFormat("{text}{soft} :{target}"), "column 'text' before {soft}"),
    (methods.PTuning, {"blocks": [1, 2]}, RowFormat("{soft}{text}{soft} :{target}"), "one block of soft tokens"),
    (methods.PTuningV2, {"length": 2, "layers": [1]}, LEAD, "in every layer"),
    (methods.DePT, {"length": 2, "rank": 2}, LEAD, "shift depends on the row"),
    (methods.SMoP, {"length": 2}, LEAD, "computed from each row"),
    (methods.NoPrompt, {}, LEAD, "has both or none"),
]


@pytest.mark.parametrize(("method_class", "arguments", "row_format", "message"), REFUSED)
def test_prompts_that_peft_cannot_represent_are_refused(load, method_class, arguments, row_format, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        to_peft(make_prompt(load("llama"), method_class, row_format, **arguments), tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_encoders_and_trained_heads_are_refused(load, tmp_path):
    with pytest.raises(ValueError, match="start token of encoders"):
        to_peft(make_prompt(load("bert"), methods.PromptTuning, length=2), tmp_path / "adapter")
    classes = Classes({"good": [], "bad": []}, LEAD.template)
    prompt = make_prompt(load("llama"), methods.PromptTuning, classes=classes, length=2, readout=ClassHead)
    with pytest.raises(ValueError, match="trained classification head"):
        to_peft(prompt, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_logits_is_removed(load, tmp_path, monkeypatch):
    prompt = make_prompt(load("llama"), methods.PromptTuning, length=2)
    monkeypatch.setattr(peft_export, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="PEFT computes other logits"):
        to_peft(prompt, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ValueError, match="exists; remove it"):
        to_peft(prompt, tmp_path / "adapter")
