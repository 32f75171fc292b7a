"""Soft tokens as rows of a vocabulary: transformers alone gives the logits and the greedy answers of the prompt."""

import json
import re
import subprocess
import sys
from itertools import chain

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_softprompt import ClassHead, Prompt, methods, to_vocabulary
from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.core.types import Classes
from lightning_softprompt.interchange import vocabulary_check
from lightning_softprompt.interchange.head_rows import least_likely_word, untied_head
from lightning_softprompt.interchange.vocabulary_check import TEXTS
from lightning_softprompt.methods.optimizers import trainable_parameters

ROWS = RowFormat("{soft}{text} it was {target}", max_tokens=30)
BLOCKS = RowFormat("it is {soft}{text}{soft} :{target}", max_tokens=30)
TWO_COLUMNS = RowFormat(
    "{soft}{about} : {text} !{target}", truncate=("text",), defaults={"about": "film"}, max_tokens=30
)


def make_prompt(backbone, method_class=methods.PromptTuning, row_format=ROWS, seed=0, **arguments):
    torch.manual_seed(seed)
    method = method_class(backbone=backbone.spec, **(arguments or {"length": 3}))
    method.attach(backbone)
    for parameter in trainable_parameters(method).values():
        torch.nn.init.normal_(parameter.data, std=0.5)
    return Prompt(method, {"": row_format})


@pytest.fixture
def short_answers(monkeypatch):
    """The window of tiny backbones holds few tokens."""
    monkeypatch.setattr(vocabulary_check, "NEW_TOKENS", 6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_plain_folder_gives_the_answers_of_several_prompts(load_once, family, short_answers, tmp_path):
    backbone = load_once(family)
    prompts = {
        "one": make_prompt(backbone),
        "two-blocks": make_prompt(backbone, methods.PTuning, BLOCKS, blocks=(2, 3)),
        "columns": make_prompt(backbone, row_format=TWO_COLUMNS, seed=1),
    }
    export = to_vocabulary(prompts, tmp_path / "folder", max_probability=1.0)
    for check in export.checks.values():
        assert check.logits < 1e-6
        assert check.equal_answers == check.answers == len(TEXTS)
    old = len(backbone.codec.tokenizer)
    assert [len(ids) for ids in export.token_ids.values()] == [3, 5, 3]
    assert list(chain.from_iterable(export.token_ids.values())) == list(range(old, old + 11))
    tokenizer = AutoTokenizer.from_pretrained(export.folder)
    model = AutoModelForCausalLM.from_pretrained(export.folder)
    assert model.config.vocab_size == len(tokenizer) == old + 11
    head = model.get_output_embeddings().weight
    word = tokenizer.convert_tokens_to_ids(export.word)
    assert torch.equal(head[old:], head[word].expand(11, -1))
    rows = model.get_input_embeddings().weight[old : old + 3]
    assert torch.equal(rows, prompts["one"].method.fold().tokens[0])

    message = [{"role": "user", "content": "a warm dog"}]
    chat = tokenizer.apply_chat_template(message, tokenize=False)
    start = "<s>" if family == "llama" else "</s>"
    assert chat == f"{start}<|one:0|><|one:1|><|one:2|>a warm dog it was"
    chat = tokenizer.apply_chat_template(message, tokenize=False, prompt="columns", fields={"about": "story"})
    assert chat == f"{start}<|columns:0|><|columns:1|><|columns:2|>story : a warm dog !"
    assert " film : a warm dog" not in chat
    with pytest.raises(Exception, match="unknown prompt other; the prompts are one, two-blocks, columns"):
        tokenizer.apply_chat_template(message, prompt="other")

    inputs = tokenizer.apply_chat_template(message, return_dict=True, return_tensors="pt")
    sampled = model.generate(**inputs, do_sample=True, num_return_sequences=64, max_new_tokens=16, top_k=0)
    assert sampled[:, inputs["input_ids"].shape[1] :].max() < old
    index = json.loads((export.folder / "softprompt.json").read_text())
    assert index["prompts"]["columns"]["fields"] == ["about"]
    assert index["prompts"]["columns"]["message_column"] == "text"


def test_the_code_of_the_readme_runs_without_the_package(load_once, short_answers, tmp_path):
    prompt = make_prompt(load_once("llama"))
    folder = to_vocabulary({"one": prompt}, tmp_path / "folder", max_probability=1.0).folder
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    code = code.replace("FOLDER", repr(str(folder))).replace('"..."', repr("a warm film")).replace("=32", "=6")
    script = f"import sys\n{code}\nassert not [name for name in sys.modules if 'softprompt' in name]"
    command = [sys.executable, "-I", "-c", script]
    process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=250)
    assert process.stdout.strip() == prompt.generate("a warm film", max_new_tokens=6)[0]


def test_a_tied_head_remains_tied_or_is_separated(load, tmp_path, short_answers):
    prompt = make_prompt(load("gpt2"))
    rows = len(prompt.backbone.codec.tokenizer)
    copied = to_vocabulary({"one": prompt}, tmp_path / "copy", max_probability=1.0)
    tied = to_vocabulary({"one": prompt}, tmp_path / "tied", head="tied")
    numbers = [
        sum(tensor.numel() for tensor in load_file(export.folder / "model.safetensors").values())
        for export in (copied, tied)
    ]
    before = sum(parameter.numel() for parameter in prompt.backbone.model.parameters())
    assert numbers == [before + (rows + 2 * 3) * 32, before + 3 * 32]
    assert tied.word is None
    with pytest.raises(ValueError, match="is not tied"):
        to_vocabulary({"one": make_prompt(load("llama"))}, tmp_path / "other", head="tied")


def test_the_head_has_copies_of_the_least_likely_word_or_an_unreachable_bias():
    logits = torch.tensor([[-9.0, -1.0, -5.0, -4.0], [-2.0, -1.0, -4.0, -8.0]])
    least = least_likely_word([logits[:1], logits[1:]], num_words=4)
    assert least.id == 2  # the other words have at least -4 somewhere
    assert least.probability == pytest.approx(float(logits.softmax(-1)[:, 2].max()))
    head = torch.nn.Linear(5, 4, bias=False)
    states = torch.randn(50, 5)
    extended = untied_head(head, 4, 3, word=2)(states)
    assert torch.equal(extended[:, :4], head(states))
    leads = head(states).argmax(-1) == 2
    assert torch.equal(extended[~leads].argmax(-1), head(states)[~leads].argmax(-1))
    with_bias = torch.nn.Linear(5, 4)
    assert untied_head(with_bias, 4, 3, word=2)(states)[:, 4:].softmax(-1).shape == (50, 3)
    assert untied_head(with_bias, 4, 3, word=2)(states).softmax(-1)[:, 4:].max() == 0


CLASSES = Classes({"good": [], "bad": []}, ROWS.template)
REFUSED = [
    (methods.PrefixTuning, {"length": 3, "width": 8}, ROWS, "not keys, values or layers"),
    (methods.LatePromptTuning, {"length": 3, "layer": 1, "generator": "free"}, ROWS, "not keys, values or layers"),
    (methods.SMoP, {"length": 2}, ROWS, "computed from each row"),
    (methods.PromptTuning, {}, RowFormat("{soft}a film{target}"), "no column"),
    (methods.PromptTuning, {"length": 3, "classes": CLASSES, "readout": ClassHead}, ROWS,
     "trained classification head"),
]  # fmt: skip


@pytest.mark.parametrize(("method_class", "arguments", "row_format", "message"), REFUSED)
def test_other_prompts_are_refused(load_once, method_class, arguments, row_format, message, tmp_path):
    prompt = make_prompt(load_once("llama"), method_class, row_format, **arguments)
    with pytest.raises(ValueError, match=message):
        to_vocabulary({"one": prompt}, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_names_backbones_and_probabilities_are_checked(load, tmp_path):
    prompt = make_prompt(load("llama"))
    with pytest.raises(ValueError, match="consists of letters"):
        to_vocabulary({"a b": prompt}, tmp_path / "folder")
    with pytest.raises(ValueError, match="above the limit"):
        to_vocabulary({"one": prompt}, tmp_path / "folder", max_probability=0.0)
    with pytest.raises(ValueError, match="different backbones"):
        to_vocabulary({"one": prompt, "two": make_prompt(load("llama", seed=1))}, tmp_path / "folder")
    with pytest.raises(ValueError, match="decoders only"):
        to_vocabulary({"one": make_prompt(load("t5"))}, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_differs_is_not_written(load_once, monkeypatch, short_answers, tmp_path):
    monkeypatch.setattr(vocabulary_check, "LOGITS", -1.0)
    with pytest.raises(ValueError, match="the logits differ by"):
        to_vocabulary({"one": make_prompt(load_once("llama"))}, tmp_path / "folder", max_probability=1.0)
    assert list(tmp_path.iterdir()) == []
