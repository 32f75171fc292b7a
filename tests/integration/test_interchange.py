"""`softprompt export` and `softprompt import-peft`, from a trained prompt to PEFT and back."""

import pytest

from lightning_softprompt import PromptTuning, load_prompt, save_prompt
from lightning_softprompt.__main__ import main
from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.interchange import vocabulary_check
from lightning_softprompt.system.errors import CommandError

ROW = "a warm and funny film"


@pytest.fixture
def prompt_file(tiny_folder, tmp_path):
    method = PromptTuning(length=3, backbone=BackboneSpec(str(tiny_folder("llama"))))
    method.configure_model()
    method.remember_formats({"": RowFormat("{soft}{text} :{target}")})
    return save_prompt(method, tmp_path / "prompt.safetensors")


def test_a_prompt_returns_from_peft_with_the_same_answers(prompt_file, tmp_path, capsys):
    adapter, back = tmp_path / "adapter", tmp_path / "back.safetensors"
    assert main(["export", str(prompt_file), "--format", "peft", "--out", str(adapter)]) == 0
    output = capsys.readouterr().out
    assert "4 virtual tokens, of which 1 stand for tokens of the template" in output
    assert "The logits of PEFT differ by" in output
    # the start token is one of the virtual tokens, so the text has none
    assert main(["import-peft", str(adapter), "--out", str(back), "--template", "{soft}{text} :{target}"]) == 0
    assert f"Wrote {back}: 128 parameters" in capsys.readouterr().out
    expected = load_prompt(prompt_file).generate(ROW, max_new_tokens=8)
    assert load_prompt(back).generate(ROW, max_new_tokens=8) == expected


def test_prompts_become_tokens_or_a_cache(prompt_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vocabulary_check, "NEW_TOKENS", 3)
    model, past = tmp_path / "model", tmp_path / "past"
    options = ["--format", "vocabulary", "--max-probability", "1", "--out", str(model)]
    assert main(["export", f"one={prompt_file}", f"two={prompt_file}", *options]) == 0
    output = capsys.readouterr().out
    assert "two: tokens 47 to 49" in output
    assert output.count("8 of 8 greedy answers are equal") == 2
    assert main(["export", str(prompt_file), "--format", "past", "--out", str(past)]) == 0
    assert "keys and values of 4 positions, of which 1 stand for tokens of the template" in capsys.readouterr().out


def test_wrong_arguments_write_nothing(prompt_file, tmp_path):
    def error_of(*arguments):
        with pytest.raises(CommandError) as error:
            import_command(arguments[0]).main(list(map(str, arguments[1:])))
        return str(error.value)

    from lightning_softprompt.cli.commands import import_command

    assert "exists; remove it" in error_of("export", prompt_file, "--format", "peft", "--out", tmp_path)
    twice = ["--format", "peft", "--out", tmp_path / "out"]
    assert "two prompts have the name" in error_of("export", f"a={prompt_file}", f"a={prompt_file}", *twice)
    assert "holds one prompt" in error_of("export", f"a={prompt_file}", f"b={prompt_file}", *twice)
    assert "has no adapter_config.json" in error_of("import-peft", tmp_path)
    assert "requires --backbone.name" in error_of("import-peft", tmp_path, "--backbone.revision", "main")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompt.safetensors"]
