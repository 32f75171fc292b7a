"""`softprompt inspect`: the table, the page and the scores of a prompt."""

import json
import re
import shutil
from pathlib import Path

import pytest
from row_files import write_rows

from lightning_softprompt.__main__ import main
from lightning_softprompt.runs.run_spec import last_folder


@pytest.fixture
def train(tmp_path, tiny_folder):
    """Trains a prompt and returns its file."""
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"text": f"a {word} film", "label": word} for word in ("good", "bad")] * 4)

    def train(*options):
        argv = [
            "fit", "--data=ClassificationDataModule", f"--data.train={path}", f"--data.validation={path}",
            "--data.template={soft}{text} it is {target}", "--data.batch_size=4", "--run.wandb=disabled",
            f"--backbone.name={tiny_folder('llama')}", f"--run.folder={tmp_path / 'runs'}", "--trainer.max_steps=1",
            "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
        ]  # fmt: skip
        assert main([*argv, *options]) == 0
        return last_folder() / "prompt.safetensors"

    return train


def test_a_prompt_of_words_is_its_words(train, capsys):
    text = json.dumps({"class_path": "FromText", "init_args": {"text": "a funny dog"}})
    prompt = train("--model=PromptTuning", "--model.length=3", "--model.lr=1e-12", f"--model.init={text}")
    capsys.readouterr()
    assert main(["inspect", str(prompt), "--against", str(prompt), "--words=1", "--scores"]) == 0
    shown = capsys.readouterr().out
    for word in ("a", "funny", "dog"):
        assert f"'{word}' 1.00" in shown
    lines = {line.split("  ")[0]: line.split()[-2:] for line in shown.splitlines()}
    assert lines["trained"] == lines["nearest words"] != lines["none"]
    page = prompt.with_suffix(".inspect.html").read_text()
    assert "funny" in page
    assert page.count("<img") == 2
    assert "<script" not in page


def test_keys_and_values_have_sizes_and_ranks(train, capsys, tmp_path):
    prompt = train("--model=PrefixTuning", "--model.length=3", "--model.width=8")
    out = tmp_path / "page.html"
    assert main(["inspect", str(prompt), f"--out={out}"]) == 0
    shown = capsys.readouterr().out
    assert "kv.self.0.key    3 x" in shown
    assert "of 3" in shown
    assert "nearest words" not in shown
    assert "kv.self.0.key" in out.read_text()
    assert main(["inspect", str(prompt), "--scores"]) == 2
    assert "must have soft tokens only, but has kv.self.0.key" in capsys.readouterr().err


def test_options_of_validate_require_scores(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "prompt.safetensors"), "--data.batch_size=2"]) == 2
    assert "options of validate require --scores" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "prompt.safetensors")]) == 2
    assert "prompt.safetensors" in capsys.readouterr().err


def test_the_attention_of_the_page_on_analysis_adds_up_to_one(train, tmp_path, monkeypatch, tiny_folder):
    """The code of the page, with the files and the backbone of this test."""
    prompt = train("--model=PromptTuning", "--model.length=3")
    monkeypatch.chdir(tmp_path)
    shutil.copy(prompt, "prompt.safetensors")
    (tmp_path / "test.csv").write_text("text,label\na funny dog,good\na sad film,bad\n")
    page = (Path(__file__).parents[2] / "docs" / "guide" / "analysis.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    code = code.replace('"great"', '"good"').replace('"awful"', '"bad"')
    code = code.replace("test=", f"backbone=sp.BackboneSpec(name={str(tiny_folder('llama'))!r}), test=")
    names = {}
    exec(code, names)
    assert names["by_layer"].shape[1] == 3
    assert names["by_layer"].sum(1).tolist() == pytest.approx([1] * len(names["by_layer"]))
    assert (names["by_layer"][:, :2] > 0).all()
