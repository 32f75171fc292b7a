"""The commands of docs/guide/continued_pretraining.md run, on tiny backbones."""

import re
import shlex
from pathlib import Path

import pytest

from lightning_softprompt.__main__ import main
from lightning_softprompt.runs.run_spec import last_folder
from lightning_softprompt.studies.study_file import read_study

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guide" / "continued_pretraining.md").read_text()
SHORT = {
    "test": ["--data.eval_batch_size=2"],
    "fit": ["--data.batch_size=2", "--trainer.max_steps=2", "--trainer.log_every_n_steps=1"],
}
RUN = ["--trainer.accelerator=cpu", "--run.wandb=disabled", "--trainer.enable_progress_bar=false"]
DOCUMENTS = (
    "a warm and funny film\nabout a dog", "dull\nvery dull", "it is a sad story .\nit is good", "well",
    "that film\nends",
)  # fmt: skip


def commands():
    """Returns the words of each command of the page."""
    blocks = re.findall(r"```console\n(.*?)```", PAGE, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line]


def newest(folder):
    """Returns the folder of the latest run of an experiment."""
    return max(Path(folder).glob("*"), key=lambda path: path.stat().st_mtime)


def shorten(command, options, decoder, encoder):
    """Adds options that make a run short, on a tiny backbone."""
    if command not in SHORT:
        return options
    options = [*options, *RUN, *SHORT[command]]
    if "--ckpt_path" not in options:
        options += ["--data.window=24", "--data.max_tokens=40", "--data.validation_share=0.2"]
        options += [] if "ENCODER" in options else [f"--backbone.name={decoder}"]
    if command == "fit":
        options += ["--model.rank=2"] * ("LoRA" in options) + ["--model.length=2"] * ("PromptTuning" in options)
    return [encoder if word == "ENCODER" else word for word in options]


@pytest.mark.timeout(300)
def test_the_commands_run_one_after_the_other(tmp_path, monkeypatch, tiny_folder, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("medical.txt", "wikitext.txt"):
        Path(name).write_text("\n\n".join(DOCUMENTS))
    trained = None
    for words in commands():
        command, *options = [word.replace("configs/", f"{ROOT}/configs/") for word in words]
        if command == "study" or any(word.startswith("studies") for word in options):
            continue
        options = [word.replace("runs/default/TIME-ID", str(trained)) for word in options]
        options = [str(newest(Path(word).parent)) if word.endswith("TIME-ID") else word for word in options]
        options = shorten(command, options, str(tiny_folder("llama")), str(tiny_folder("bert")))
        assert main([command, *options]) == 0, words
        if command == "fit":
            trained = last_folder()
    assert "general" in capsys.readouterr().out


def test_the_study_of_the_page_compares_both_corpora():
    words, _ = [words for words in commands() if words[0] == "study"]
    study = read_study(ROOT / words[1], arguments=words[2:])
    assert list(study.metrics) == ["bits_per_byte", "general/bits_per_byte"]
    assert "data.corpora" in study.common
