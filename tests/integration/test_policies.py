"""Training with a reward from the command line."""

import json

import pytest
import torch
from forks import fork_command, torchrun_environments, wait_for
from policies import QUESTIONS
from row_files import read_rows, write_splits
from runs import load_state, read_column, read_metrics

from lightning_softprompt.checkpoints.checkpoint_file import load_checkpoint
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


OBJECTIVES = {
    "GRPO": ["--model.objective=GRPO"],
    "PPO": ["--model.readout=ValueHead", "--model.objective=PPO"],
}
TWO_BY_TWO = ["--model.objective.epochs=2", "--model.objective.minibatches=2"]
ADAPTIVE = ["--model.objective.kl=0.1", "--model.objective.kl_target=0.01", "--model.objective.kl_horizon=50"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_prompt_is_trained_and_tested_with_a_reward(options, objective):
    reward = [*OBJECTIVES[objective], "--model.objective.reward=Length", "--model.objective.reward.words=3"]
    policy = ["--model.objective.answers=3", "--model.objective.kl=0.1", SHORT]
    assert main(["fit", *options, *reward, *policy]) == 0
    folder = last_folder()
    metrics = read_metrics(folder)
    assert -1 <= metrics["val"]["val/reward"] <= 0
    assert "val/loss" not in metrics["val"]
    assert main(["test", f"--ckpt_path={folder / 'prompt.safetensors'}"]) == 0
    tested = read_metrics(last_folder())["test"]
    assert tested["test/lift"] == pytest.approx(tested["test/reward"] - tested["test/reference_reward"])
    assert tested["test/win_rate_low"] <= tested["test/win_rate"] <= tested["test/win_rate_high"]
    records = read_rows(last_folder() / "test_predictions.jsonl")
    words = [len(record["prediction"].split()) for record in records]
    assert [record["reward"] for record in records] == pytest.approx([-abs(n - 3) / 3 for n in words])


@pytest.fixture
def start(options, tmp_path):
    """A function that trains in one or two processes; returns their exit codes and the folder of the run."""

    def start(name, *more, world=1):
        shared = [f"--run.experiment={name}", f"--trainer.devices={world}", f"--data.batch_size={4 // world}"]
        argv = ["fit", *options, *shared, *more]
        environments = torchrun_environments(2) if world == 2 else [{}]
        commands = [fork_command(argv, tmp_path / f"log_{n}", env) for n, env in enumerate(environments)]
        codes, logs = zip(*map(wait_for, commands), strict=True)
        folder = max((tmp_path / "runs" / name).glob("*/"), default=None)
        return codes, folder, "\n".join(logs)

    return start


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_stops_in_the_middle_of_a_rollout_resumes_exactly(start, world):
    policy = [*OBJECTIVES["PPO"], "--model.objective.reward=Length", "--model.objective.answers=2", SHORT]
    policy += [*TWO_BY_TWO, *ADAPTIVE, "--model.objective.normalize_rewards=true", "--trainer.max_steps=6"]
    policy += ["--trainer.max_epochs=-1", "--run.accept_changes=trainer.callbacks", "--ckpt_path=last"]
    codes, whole, logs = start("whole", *policy, world=world)
    assert set(codes) == {0}, logs
    stop = [{"class_path": "signals.SignalAt", "init_args": {"batch": 1, "rank": world - 1}}]
    codes, _, logs = start("cut", *policy, f"--trainer.callbacks={json.dumps(stop)}", world=world)
    assert set(codes) == {143}, logs
    codes, resumed, logs = start("cut", *policy, world=world)
    assert set(codes) == {0}, logs
    columns = ("train/loss", "train/reward", "train/kl", "train/explained_variance", "train/kl_weight")
    for column in columns:
        values = read_column(whole, column)
        assert read_column(resumed, column) == values
        assert len(values) == 6
    states = load_state(whole), load_state(resumed)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    deviations = [float(value) for value in read_column(whole, "train/ratio_deviation")]
    assert max(deviations[::4]) < 1e-5 < 1e-4 < min(deviations[1:4])  # a part runs apart from the rest, up to rounding


def test_sampled_answers_are_reported(options):
    rewards = "{length: {class_path: Length, init_args: {words: 3}}, end: Unfinished}"
    policy = ["--model.objective=GRPO", "--model.objective.reward=WeightedSum", SHORT]
    policy += [f"--model.objective.reward.rewards={rewards}", "--model.objective.answers=3", "--model.objective.kl=0.1"]
    judged = ["--data.judge=Pattern", "--data.judge.pattern=a", "--data.reference_answers=2"]
    assert main(["fit", *options, *policy, *judged, "--run.table_rows=5"]) == 0
    folder = last_folder()
    rows = read_rows(folder / "rollouts.jsonl")
    assert [row["question"] for row in rows] == [0, 0, 0, 1, 1]
    for row in rows:
        assert row["reward"] == pytest.approx(row["reward_length"] + row["reward_end"], abs=1e-6)
        assert row["reward_length"] == pytest.approx(-abs(len(row["answer"].split()) - 3) / 3)
    assert sum(row["advantage"] for row in rows[:3]) == pytest.approx(0, abs=1e-5)
    metrics = read_metrics(folder)
    assert {"val/judge", "val/reward_length", "val/reward_end"} <= metrics["val"].keys()
    assert {"train/reward_length", "train/kl"} <= metrics["train"].keys()
    assert {"rollouts.png", "training_reward_over_kl.png"} <= {path.name for path in (folder / "plots").iterdir()}
    assert main(["test", f"--ckpt_path={folder / 'prompt.safetensors'}"]) == 0
    tested = read_metrics(last_folder())["test"]
    assert tested["test/judge_lift"] == pytest.approx(tested["test/judge"] - tested["test/reference_judge"])
    assert tested["test/best_of_1"] <= tested["test/best_of_2"]
    assert (last_folder() / "plots" / "test_reward_over_kl.png").is_file()


def test_steps_after_a_large_change_of_the_policy_are_skipped(options):
    policy = [*OBJECTIVES["GRPO"], "--model.objective.reward=Length", "--model.objective.answers=3", SHORT]
    policy += ["--model.objective.epochs=4", "--model.objective.max_kl=1e-6", "--model.lr=0.1"]
    assert main(["fit", *options, *policy, "--trainer.max_steps=5"]) == 0
    folder = last_folder()
    assert [float(value) for value in read_column(folder, "train/skipped")] == [0, 1, 1, 1, 0]
    assert [float(value) for value in read_column(folder, "train/loss")][1:4] == [0, 0, 0]
    optimizer = load_checkpoint(folder / "checkpoints/last.ckpt")["optimizer_states"][0]["state"][0]
    assert int(optimizer["step"]) == 2


def test_a_reward_outside_of_the_package_is_one_file(options, tmp_path, monkeypatch):
    (tmp_path / "first_token.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--model.objective=GRPO", "--model.objective.reward=first_token.FirstToken"]
    assert main(["fit", *options, *arguments, "--model.objective.reward.token=9", SHORT]) == 0
    lines = (last_folder() / "config.yaml").read_text()
    assert "first_token.FirstToken" in lines
    assert json.dumps(9) in lines
