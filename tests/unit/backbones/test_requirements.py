"""The requirements of a method are checked before a run writes to disk."""

import pytest
from architectures import Architecture, save
from transformers import LlamaForCausalLM, PreTrainedModel

from lightning_softprompt.backbones.insertion.key_values import NAME, injectable_attention
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.backbones.requirements import generates, require_of_copy
from lightning_softprompt.cli.app import main
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.refusals import UnsupportedBackboneError, reason_of, refusing
from lightning_softprompt.core.types import SoftPrompt
from lightning_softprompt.methods import LatePromptTuning, PrefixTuning, PromptTuning

FIT = [
    "--model=PrefixTuning", "--data=ClassificationDataModule", '--data.labels={"negative": "bad", "positive": "good"}',
    "--data.template={soft}{text} it is{target}", "--trainer.accelerator=cpu", "--trainer.max_steps=1",
    "--run.wandb=disabled",
]  # fmt: skip
HYBRID = Architecture("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]})
REFUSED = {  # a model type and a method, and why the method cannot use it
    ("bloom", PrefixTuning): "its self attention does not use the attention interface of transformers",
    ("albert", PrefixTuning): "layers share weights, so that the number of self attentions is 1",
    ("deepseek_v3", PrefixTuning): "heads and sizes of its keys and values differ",
    ("t5", LatePromptTuning): "encoder-decoders do not support soft tokens at a middle layer",
    ("longformer", LatePromptTuning): "Sequence length should be multiple of",
    ("nllb-moe", PrefixTuning): "with an attention function that accepts them, its results differ",
}


@pytest.mark.parametrize(("name", "cls"), REFUSED, ids=str)
def test_a_method_that_cannot_use_a_backbone_reports_the_reason(name, cls, tmp_path):
    spec = BackboneSpec(name=str(save(Architecture(name), tmp_path)))
    with pytest.raises(UnsupportedBackboneError, match=REFUSED[name, cls]) as refusal:
        cls(backbone=spec).check_backbone()
    assert cls.__name__ in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)
    PromptTuning(backbone=spec).check_backbone()


def test_hybrid_models_are_refused_because_only_some_layers_attend(tmp_path):
    spec = BackboneSpec(name=str(save(HYBRID, tmp_path)))
    with pytest.raises(UnsupportedBackboneError, match=r"is 1, and the number of layers is 2"):
        PrefixTuning(backbone=spec).check_backbone()


def test_a_run_is_refused_in_two_lines_before_its_folder_exists(tmp_path, capsys):
    folder = save(Architecture("bloom"), tmp_path / "bloom")
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "positive"}\n' * 4)
    options = [
        f"--backbone.name={folder}",
        f"--data.train={tmp_path / 'rows.jsonl'}",
        f"--run.folder={tmp_path / 'runs'}",
    ]
    assert main(["fit", *FIT, *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2].startswith("error: PrefixTuning cannot use backbone")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["t5gemma", "mamba2", "openai-gpt"])
def test_small_copies_support_what_the_backbone_supports(name, tmp_path):
    spec = BackboneSpec(name=str(save(Architecture(name), tmp_path)))
    PromptTuning(backbone=spec).check_backbone()
    require_of_copy((generates(),), "GenerationEvaluation", spec)


def test_a_copy_receives_token_ids_if_the_backbone_does(tmp_path):
    spec = BackboneSpec(name=str(save(Architecture("deepseek_v4"), tmp_path)))
    PromptTuning(backbone=spec).check_backbone()
    assert load_backbone(spec).entry.by_ids


def test_a_method_is_accepted_if_the_backbone_cannot_be_copied(tmp_path):
    spec = BackboneSpec(name=str(save(Architecture("t5gemma2"), tmp_path)))
    PromptTuning(backbone=spec).check_backbone()


def test_parts_of_a_model_keep_their_attention_functions(tmp_path):
    model = load_backbone(BackboneSpec(name=str(save(Architecture("got_ocr2"), tmp_path)))).model
    model.set_attn_implementation(NAME)
    parts = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [part._attn_implementation for part in parts]
    assert len(set(before)) > 1
    with injectable_attention(model):
        pass
    assert [part._attn_implementation for part in parts] == before


SUMMARIES = [
    "--model=PromptTuning", "--data=SummarizationDataModule", "--data.template={soft}{document} :{target}",
    "--trainer.accelerator=cpu", "--trainer.max_steps=1", "--run.wandb=disabled",
]  # fmt: skip


def test_a_generation_task_refuses_a_backbone_without_generation(tmp_path, capsys, monkeypatch):
    def generate(self, *args, **kwargs):
        raise NotImplementedError("this model has no generation")

    folder = save(Architecture("llama"), tmp_path / "llama")
    (tmp_path / "data").mkdir()
    for split in ("train", "val", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text('{"document": "a film", "summary": "bad"}\n' * 4)
    options = [f"--backbone.name={folder}", f"--data.path={tmp_path / 'data'}", f"--run.folder={tmp_path / 'runs'}"]
    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    assert main(["fit", *SUMMARIES, *options]) == 2
    error = capsys.readouterr().err
    assert "GenerationEvaluation cannot use backbone" in error
    assert "this model has no generation" in error
    assert not (tmp_path / "runs").exists()


def test_a_backbone_that_does_not_run_in_a_precision_is_refused_when_it_is_loaded(tmp_path):
    spec = BackboneSpec(name=str(save(Architecture("fnet"), tmp_path)), dtype="bfloat16")
    with pytest.raises(UnsupportedBackboneError, match="Unsupported dtype BFloat16"):
        load_backbone(spec)


def test_errors_of_libraries_become_reasons_and_errors_of_the_package_do_not_change():
    for error in (NotImplementedError("not yet"), KeyError("full_attention"), AssertionError()):
        with (
            pytest.raises(UnsupportedBackboneError, match=f"x: {type(error).__name__}.* Take y"),
            refusing("x", "Take y"),
        ):
            raise error
    with pytest.raises(ValueError, match=r"^blocks must add up"), refusing("x", "Take y"):
        SoftPrompt(blocks=(1,))
    assert reason_of(ValueError("one\ntwo")) == "one."
