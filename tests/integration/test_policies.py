"""Training with a reward from the command line."""

import json

import pytest
from policies import QUESTIONS
from row_files import read_rows, write_splits
from runs import read_metrics

from lightning_softprompt.cli.app import main
from lightning_softprompt.runs.run_spec import last_folder

SHORT = "--model.objective.max_new_tokens=5"
PLUGIN = '''
from dataclasses import dataclass

from lightning_softprompt import Reward


@dataclass(frozen=True)
class FirstToken(Reward):
    """1 for an answer that begins with a given token."""

    token: int = 7

    def __call__(self, lm, batch):
        """Computes the rewards."""
        return (batch.targets[:, 0] == self.token).float()
'''


@pytest.fixture
def options(tmp_path, tiny_folder):
    data = write_splits(tmp_path / "data", train=QUESTIONS * 4, validation=QUESTIONS, test=QUESTIONS)
    return [
        "--model=PromptTuning", "--model.length=2", f"--backbone.name={tiny_folder('llama')}",
        "--data=PromptDataModule", f"--data.path={data}", "--data.batch_size=4", "--data.max_target_tokens=5",
        "--run.wandb=disabled", "--trainer.max_steps=4", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1",
        f"--run.folder={tmp_path / 'runs'}", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip


@pytest.mark.parametrize("objective", ["GRPO", "RLOO"])
def test_a_prompt_is_trained_and_tested_with_a_reward(options, objective):
    reward = [f"--model.objective={objective}", "--model.objective.reward=Length", "--model.objective.reward.words=3"]
    policy = ["--model.objective.answers=3", "--model.objective.kl=0.1", SHORT]
    assert main(["fit", *options, *reward, *policy]) == 0
    folder = last_folder()
    metrics = read_metrics(folder)
    assert -1 <= metrics["val"]["val/reward"] <= 0
    assert "val/loss" not in metrics["val"]
    assert main(["test", f"--ckpt_path={folder / 'prompt.safetensors'}"]) == 0
    tested = read_metrics(last_folder())["test"]
    assert tested["test/lift"] == pytest.approx(tested["test/reward"] - tested["test/bare_reward"])
    assert tested["test/win_rate_low"] <= tested["test/win_rate"] <= tested["test/win_rate_high"]
    records = read_rows(last_folder() / "test_predictions.jsonl")
    words = [len(record["prediction"].split()) for record in records]
    assert [record["reward"] for record in records] == pytest.approx([-abs(n - 3) / 3 for n in words])


def test_a_resumed_training_samples_the_same_answers(options):
    policy = ["--model.objective=GRPO", "--model.objective.reward=Length", "--model.objective.answers=3"]
    policy += [SHORT]
    policy += ["--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null"]
    assert main(["fit", *options, *policy]) == 0
    whole = last_folder()
    short = [option for option in options if not option.startswith("--trainer.max_steps")]
    assert main(["fit", *short, *policy, "--trainer.max_steps=2"]) == 0
    checkpoint = last_folder() / "checkpoints" / "last.ckpt"
    assert main(["fit", *short, *policy, "--trainer.max_steps=4", f"--ckpt_path={checkpoint}"]) == 0
    assert read_metrics(last_folder())["val"] == read_metrics(whole)["val"]


def test_a_reward_outside_of_the_package_is_one_file(options, tmp_path, monkeypatch):
    (tmp_path / "first_token.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--model.objective=GRPO", "--model.objective.reward=first_token.FirstToken"]
    assert main(["fit", *options, *arguments, "--model.objective.reward.token=9", SHORT]) == 0
    lines = (last_folder() / "config.yaml").read_text()
    assert "first_token.FirstToken" in lines
    assert json.dumps(9) in lines
