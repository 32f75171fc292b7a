"""The importance of the weights of a backbone to general text is measured without training, as a stage of a study."""

from pathlib import Path

import pytest
import torch
import yaml
from runs import read_column, read_metrics

from lightning_softprompt.__main__ import main
from lightning_softprompt.checkpoints.prompt_file import read_prompt

STUDY = Path(__file__).parents[2] / "configs" / "study" / "corpus_ewc.yaml"
GENERAL = "it is a sad story . it is good\n\nthat film ends\n\nwell , it is a film\n\na dog that is good\n\nit is sad"
DOMAIN = "a warm and funny film about a dog\n\ndull\n\nfunny , warm , funny\n\na warm dog\n\nthat dog is a warm dog"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder in which commands run, with both texts."""
    monkeypatch.chdir(tmp_path)
    Path("general.txt").write_text(GENERAL)
    Path("domain.txt").write_text(DOMAIN)
    return tmp_path


@pytest.fixture
def study(folder, tiny_folder):
    """The study of the documentation, on a tiny backbone."""
    study = yaml.safe_load(
        STUDY.read_text().replace("data/general", "general.txt").replace("data/corpus", "domain.txt")
    )
    study["common"] |= {
        "data": "CorpusDataModule",
        "backbone.name": str(tiny_folder("llama")),
        "data.window": 24,
        "data.max_tokens": 40,
        "data.validation_share": 0.2,
        "data.test_share": 0.2,
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 2,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": False,
    }
    study["tests"] = {"general": study["tests"]["general"]}
    study["compare"] = {"trainer.callbacks.weight": [1e6]}
    Path("study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return study


@pytest.mark.timeout(120)
def test_a_study_measures_importance_and_then_trains_with_it(study, folder):
    assert main(["study", "study.yaml", "--folder=runs"]) == 0
    (variant,) = (path for path in (folder / "runs").iterdir() if path.is_dir())
    general, domain = variant / "general", variant / "domain"
    saved = read_prompt(general / "importance.safetensors").tensors
    start = read_prompt(general / "prompt.safetensors").tensors
    assert read_metrics(general)["global_step"] == 0
    head = "backbone.model.lm_head.weight"
    assert torch.equal(saved[f"anchor/{head}"], start["weights.lm_head/weight"])
    assert saved[f"importance/{head}"].sum() > 0
    pulls = [float(value) for value in read_column(domain, "train/penalty/ewc_pull")]
    assert pulls[0] == 0
    assert pulls[-1] > 0


def fit(tiny_folder, callback):
    return main([
        "fit", "--model=PromptTuning", "--model.length=2", "--data=CorpusDataModule", "--data.path=general.txt",
        "--data.validation_share=0.2", f"--backbone.name={tiny_folder('llama')}", "--data.max_tokens=40",
        "--trainer.max_steps=0", "--trainer.accelerator=cpu", "--run.wandb=disabled",
        f"--trainer.callbacks+={callback}",
    ])  # fmt: skip


def test_other_callbacks_require_a_step(folder, tiny_folder, capsys):
    assert fit(tiny_folder, "SynapticIntelligence") == 2
    assert "only the callback EWC measures the importance" in capsys.readouterr().err
