"""The study of reinforcement learning from human feedback, from supervised training to the comparison."""

import json
from pathlib import Path

import pytest
import yaml
from preferences import PAIRS
from row_files import write_splits

from lightning_softprompt.__main__ import main
from lightning_softprompt.methods.trainer_hooks import TrainerHooks

STUDY = Path(__file__).parents[2] / "configs" / "study" / "rlhf.yaml"
STAGES = ("sft", "reward", "policy")


class Killed(BaseException):
    """Simulates a kill: no handler of exceptions catches it."""


@pytest.fixture
def run_study(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.chdir(STUDY.parents[2])
    data = write_splits(tmp_path / "data", train=PAIRS * 2, validation=PAIRS, test=PAIRS)
    study = yaml.safe_load(STUDY.read_text())
    study["common"] |= {"backbone.name": str(tiny_folder("llama")), "model.length": 2}
    study["common"]["trainer"]["enable_progress_bar"] = False
    short = {"data.path": str(data), "data.cache": False, "data.max_tokens": 60, "data.batch_size": 2}
    short |= {"trainer.max_epochs": -1, "trainer.max_steps": 4, "trainer.val_check_interval": 2}
    for stage in STAGES:
        study["stages"][stage] |= {**short, "trainer.check_val_every_n_epoch": None}
    study["stages"]["sft"] |= {"data.max_target_tokens": 12, "model.init": "SampleVocabulary"}
    del study["stages"]["sft"]["model.init.text"]
    shorter = {"data.reference_answers": 2, "model.objective.answers": 2, "model.objective.max_new_tokens": 6}
    study["stages"]["policy"] |= {**shorter, "data.max_target_tokens": 6}
    path = tmp_path / "rlhf.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))

    def run_study(name):
        assert main(["study", str(path), f"--folder={tmp_path / name}"]) == 0
        return tmp_path / name / "all"

    return run_study


def read_results(folder):
    """Returns the metrics of the stages and of the final test, without times."""
    results = {}
    for name in (*STAGES, "policy.test"):
        metrics = json.loads((folder / f"{name}.json").read_text())["metrics"]
        results[name] = {key: value for key, value in metrics.items() if "second" not in key and "speed" not in key}
    return results


@pytest.mark.slow
def test_a_study_killed_in_each_stage_gives_the_same_results(run_study, monkeypatch):
    reference = run_study("reference")
    test = read_results(reference)["policy.test"]
    assert test["test/lift"] == pytest.approx(test["test/reward"] - test["test/reference_reward"], abs=1e-5)
    original = TrainerHooks.training_step
    killed = []

    def training_step(module, batch, batch_idx):
        stage = type(module.objective).__name__
        if module.global_step == 3 and stage not in killed:
            killed.append(stage)
            raise Killed
        return original(module, batch, batch_idx)

    monkeypatch.setattr(TrainerHooks, "training_step", training_step)
    while True:
        try:
            folder = run_study("killed")
            break
        except Killed:
            pass
    assert killed == ["LanguageModeling", "RewardModeling", "GRPO"]
    assert read_results(folder) == read_results(reference)
