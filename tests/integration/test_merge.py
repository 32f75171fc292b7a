"""`softprompt merge`: the written folder equals the trained method, in plain transformers."""

import pytest
import torch
from small_tokenizers import extend_by_words
from tiny import FAMILIES, SEQ2SEQ, batch_of, perturb, tokenizer
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.cli.commands.export import merge
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.inference.prompt import load_prompt, save_prompt
from lightning_softprompt.methods import IDPG, Combined, FullFineTuning, LoRA, NewTokens, PromptTuning
from lightning_softprompt.system.errors import CommandError

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
NEW = ["angioplasty", "cardiology"]
TEXTS = ("an angioplasty", "cardiology is good", "a film about cardiology", "dull")
METHODS = {
    "new_tokens": lambda: NewTokens(),
    "tied": lambda: NewTokens(tied=True),
    "lora": lambda: LoRA(rank=2),
    "full": lambda: FullFineTuning(),
    "combined": lambda: Combined(parts=[PromptTuning(length=3), NewTokens()]),
    "combined_lora": lambda: Combined(parts=[NewTokens(), LoRA(rank=2)]),
}


@pytest.fixture
def train(tmp_path, tiny_folder):
    """Writes the file of a method with other than its initial parameters, and returns the method and the file."""

    def train(family, method):
        folder, _ = extend_by_words(tokenizer(family), NEW, tmp_path / "vocabulary")
        spec = BackboneSpec(str(tiny_folder(family)), vocabulary=str(folder))
        module = METHODS[method]() if isinstance(method, str) else method
        module.spec = spec
        module.hparams["backbone"] = vars(spec)
        for part in module.parts.methods if isinstance(module, Combined) else ():
            part.spec = spec
        module.configure_model()
        perturb(module, 0.1).eval()
        return module, save_prompt(module, tmp_path / "prompt.safetensors")

    return train


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        *((family, "new_tokens") for family in FAMILIES),
        *(("llama", method) for method in METHODS if method != "new_tokens"),
        *(("gpt2", "tied"), ("t5", "combined_lora"), ("bert", "combined")),
    ],
)
def test_a_merged_folder_equals_the_method(kind, case, train, tmp_path, capsys):
    module, path = train(kind, case)
    assert merge.main([str(path), "--out", str(tmp_path / "merged")]) == 0
    assert "the logits of transformers differ by" in capsys.readouterr().out
    merged = load_backbone(BackboneSpec(str(tmp_path / "merged")))
    batch = batch_of(merged.codec, texts=TEXTS)
    assert batch.input_ids.max() >= len(tokenizer(kind))
    prompt = None
    if case == "combined":
        prompt = load_prompt(tmp_path / "merged" / "prompt.safetensors").method.prompt(batch)
    with torch.no_grad():
        assert_close(merged(batch, prompt), module(batch), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_reads_the_folder(family, train, tmp_path):
    module, path = train(family, "new_tokens")
    merge.main([str(path), "--out", str(tmp_path / "merged")])
    auto = AutoModelForSeq2SeqLM if family in SEQ2SEQ else AutoModelForMaskedLM if family == "bert" else None
    model = (auto or AutoModelForCausalLM).from_pretrained(tmp_path / "merged").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("angioplasty is good", return_tensors="pt").input_ids
    start = {"decoder_input_ids": ids[:, :2]} if family in SEQ2SEQ else {}
    with torch.no_grad():
        assert_close(model(input_ids=ids, **start).logits, module.loaded.model(input_ids=ids, **start).logits, **CLOSE)


def test_methods_without_changed_weights_are_refused(train, tmp_path):
    _, path = train("llama", PromptTuning(length=2))
    with pytest.raises(CommandError, match=r"does not change weights.*softprompt fold"):
        merge.main([str(path), "--out", str(tmp_path / "merged")])
    assert not (tmp_path / "merged").exists()


def test_prompts_that_depend_on_the_row_are_refused(train, tmp_path):
    _, path = train("llama", Combined(parts=[IDPG(length=2, bottleneck=4), NewTokens()]))
    with pytest.raises(CommandError, match="input-dependent"):
        merge.main([str(path), "--out", str(tmp_path / "merged")])


def test_an_existing_folder_is_not_overwritten(train, tmp_path):
    _, path = train("llama", "tied")
    (tmp_path / "merged").mkdir()
    with pytest.raises(CommandError, match="exists"):
        merge.main([str(path), "--out", str(tmp_path / "merged")])
