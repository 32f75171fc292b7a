"""Adapters that PEFT saves give the logits, losses, gradients and generated tokens of PEFT."""

from dataclasses import replace

import peft
import pytest
import torch
from peft import TaskType, get_peft_model
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lightning_softprompt import from_peft
from lightning_softprompt.core.template import Template
from lightning_softprompt.interchange.adapter_folder import read_adapter
from lightning_softprompt.interchange.adapters import KINDS as KINDS_OF_ADAPTERS

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
N = 4
TEXT, ANSWER = "a warm and funny film", "it is very good"


CONFIGS = {
    "prompt tuning": (peft.PromptTuningConfig, {}),
    "P-tuning": (peft.PromptEncoderConfig, {"encoder_hidden_size": 8}),
    "P-tuning LSTM": (
        peft.PromptEncoderConfig,
        {"encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"},
    ),
    "prefix": (peft.PrefixTuningConfig, {}),
    "prefix network": (peft.PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 8}),
    "multitask": (peft.MultitaskPromptTuningConfig, {"num_tasks": 3, "num_ranks": 2}),
    "cartridge": (peft.CartridgeConfig, {"num_frozen_tokens": 1}),
    "CPT": (peft.CPTConfig, {"cpt_token_ids": [5, 6, 7, 8], "cpt_mask": [1] * N, "cpt_tokens_type_mask": [1, 2, 3, 4]}),
}
KINDS = list(CONFIGS)
CASES = [(family, kind) for family in ("llama", "gpt2") for kind in KINDS]
CASES += [("t5", kind) for kind in KINDS[:3]]


@pytest.fixture(params=CASES, ids=" ".join)
def adapter(request, tiny_folder, tmp_path):
    """A PEFT model with random values in its adapter, its kind and its folder."""
    family, kind = request.param
    torch.manual_seed(0)
    name = str(tiny_folder(family, 0))
    auto, task_type = AutoModelForCausalLM, TaskType.CAUSAL_LM
    if family == "t5":
        auto, task_type = AutoModelForSeq2SeqLM, TaskType.SEQ_2_SEQ_LM
    config_class, arguments = CONFIGS[kind]
    config = config_class(task_type=task_type, num_virtual_tokens=N, **arguments)
    model = get_peft_model(auto.from_pretrained(name), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    return model, family, kind, tmp_path / "adapter"


def row_of(backbone, template):
    pieces = Template(template).pieces({"text": TEXT})
    return backbone.codec.encode(pieces, f" {ANSWER}", append_eos=False)


def test_the_imported_prompt_equals_peft(adapter):
    model, family, kind, folder = adapter
    task = "1" if kind == "multitask" else None
    prompt = from_peft(folder)
    row_format = prompt._formats[task or ""]
    row = row_of(prompt.backbone, row_format.template)
    ids = torch.tensor([row.ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "multitask":
        inputs["task_ids"] = torch.tensor([1])
    if kind == "CPT":
        inputs["input_type_mask"] = torch.full_like(ids, 4)
    if family == "t5":
        labels = torch.tensor([row.targets])
        logits = model(**inputs, labels=labels).logits[0]
    else:
        labels = torch.full_like(ids, -100)
        labels[0, list(row.answers)] = torch.tensor(row.targets)
        all_logits = model(**inputs, **({"labels": labels} if kind == "CPT" else {})).logits[0]
        first = all_logits.shape[0] - ids.shape[1]  # keys and values have no logits
        logits = all_logits[[first + position - 1 for position in row.answers]]
    loss = cross_entropy(logits, torch.tensor(row.targets))

    method = prompt.method
    batch = prompt.backbone.codec.collate([row], task_ids=None if task is None else torch.tensor([1]))
    parameters = {name: parameter for name, parameter in method.named_parameters() if "backbone." not in name}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    our_logits = prompt.backbone(batch, method.prompt(batch))[0]
    our_loss = cross_entropy(our_logits, torch.tensor(row.targets))
    assert_close(our_logits, logits, **TOLERANCE)
    assert_close(our_loss, loss, **TOLERANCE)
    loss.backward()
    our_loss.backward()
    check_gradients(model, kind, folder, prompt, parameters)
    check_generation(model, prompt, batch, inputs, task)


def check_gradients(model, kind, folder, prompt, parameters):
    """Compares gradients of the parameters that PEFT saves as they are, converted as the parameters."""
    encoder = model.prompt_encoder["default"]
    if kind == "multitask":
        names = (("prompt_embeddings", encoder.embedding.weight), ("prefix_task_cols", encoder.prefix_task_cols))
        gradients = {name: parameter.grad for name, parameter in names}
        gradients["prefix_task_rows"] = encoder.prefix_task_rows.grad
    elif kind in ("prompt tuning", "prefix"):
        gradients = {"prompt_embeddings": encoder.embedding.weight.grad}
    else:
        return
    adapter = replace(read_adapter(folder), tensors=gradients)
    converters = [converter for converter in KINDS_OF_ADAPTERS if adapter.peft_type in converter.peft_types]
    expected = converters[0].convert(adapter, prompt.backbone, ()).tensors
    assert set(expected) == set(parameters)
    for name, parameter in parameters.items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_close(gradient, expected[name], **TOLERANCE)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-4


@torch.no_grad()
def check_generation(model, prompt, batch, inputs, task):
    """Compares greedy and beam search."""
    question = prompt.backbone.codec.without_answers(batch)
    length = question.input_ids.shape[1]
    inputs = {"input_ids": inputs["input_ids"][:, :length], "attention_mask": inputs["attention_mask"][:, :length]}
    if task is not None:
        inputs["task_ids"] = torch.tensor([1])
    for beams in (1, 3):
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
        expected = model.generate(**inputs, **options)[0][-6:]
        generated = prompt.method.lm().generate(question, **options)[0][-6:]
        assert generated.tolist() == expected.tolist()
