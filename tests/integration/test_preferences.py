"""Preference learning from the command line: reward models and direct objectives."""

import json

import pytest
import torch
from preferences import PAIRS
from row_files import read_rows, write_splits
from runs import read_column, read_losses, read_metrics

import lightning_softprompt as sp
from lightning_softprompt.checkpoints.prompt_file import read_prompt
from lightning_softprompt.cli.app import main
from lightning_softprompt.runs.run_spec import last_folder


@pytest.fixture
def options(tmp_path, tiny_folder):
    data = write_splits(tmp_path / "data", train=PAIRS * 2, validation=PAIRS, test=PAIRS)
    return [
        "--model=PromptTuning", "--model.length=2", f"--backbone.name={tiny_folder('llama')}",
        "--data=PreferenceDataModule", f"--data.path={data}", "--data.batch_size=4", "--run.wandb=disabled",
        "--trainer.max_steps=2", "--trainer.accelerator=cpu", f"--run.folder={tmp_path / 'runs'}",
        "--trainer.enable_progress_bar=false",
    ]  # fmt: skip


def test_a_reward_model_is_fitted_trained_tested_and_used(options, caplog, tmp_path):
    reward = ["--model.objective=RewardModeling", "--model.readout=RewardHead", "--model.readout.fit_first=true"]
    assert main(["fit", *options, *reward]) == 0
    assert "Fitted the reward head to 10 pairs of training answers; it is right on 1.000" in caplog.text
    folder = last_folder()
    saved = read_prompt(folder / "prompt.safetensors")
    assert {"readout.linear.weight", "readout.mean", "readout.std"} <= set(saved.tensors)
    prompt = folder / "prompt.safetensors"
    assert main(["test", f"--ckpt_path={prompt}"]) == 0
    metrics = read_metrics(last_folder())["test"]
    records = read_rows(last_folder() / "test_predictions.jsonl")
    assert [record["target"] for record in records] == [row["chosen"] for row in PAIRS]
    right = [record["scores"]["chosen"] > record["scores"]["rejected"] for record in records]
    assert metrics["test/accuracy"] == sum(right) / 5
    assert metrics["test/accuracy_low"] <= metrics["test/accuracy"] <= metrics["test/accuracy_high"]
    path, out = tmp_path / "new.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    assert main(["predict", f"--ckpt_path={prompt}", f"--data.predict={path}", f"--run.predictions={out}"]) == 0
    predicted = read_rows(out)
    assert len(predicted) == len(PAIRS)
    with pytest.raises(ValueError, match="the prompt is a reward model, which scores answers and writes none"):
        sp.load_prompt(prompt).predict([{"prompt": "a dog is"}])
    torch.testing.assert_close(predicted[0]["scores"], records[0]["scores"])


def test_the_fit_alone_is_a_baseline(options):
    head = ["--model=NoPrompt", "--model.objective=RewardModeling", "--model.readout=RewardHead"]
    arguments = [option for option in options if not option.startswith(("--model", "--trainer.max_steps"))]
    head += ["--model.readout.fit_first=true", "--model.lr_schedule=linear"]
    assert main(["fit", *arguments, *head, "--trainer.max_steps=0"]) == 0
    saved = read_prompt(last_folder() / "prompt.safetensors")
    assert set(saved.tensors) == {"readout.linear.weight", "readout.linear.bias", "readout.mean", "readout.std"}


def test_replicas_are_an_ensemble_of_reward_models(options):
    reward = ["--model.objective=RewardModeling", "--model.readout=RewardHead", "--replicas=2"]
    assert main(["fit", *options, *reward, "--trainer.log_every_n_steps=1"]) == 0
    metrics = read_metrics(last_folder())["val"]
    margins = [metrics[f"val/margin/{name}"] for name in ("replica_1", "replica_2", "ensemble")]
    assert margins[2] == pytest.approx(sum(margins[:2]) / 2, abs=1e-4)
    assert len(set(margins)) == 3


def test_a_policy_starts_at_its_reference_and_is_tested_against_it(options, capsys):
    assert main(["fit", *options, "--model.objective=DPO", "--trainer.log_every_n_steps=1"]) == 0
    folder = last_folder()
    losses = [float(loss) for loss in read_losses(folder)]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses[1] != losses[0]
    assert read_column(folder, "train/chosen_logprob") != read_column(folder, "train/rejected_logprob")
    assert main(["test", f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"]) == 0
    metrics = read_metrics(last_folder())["test"]
    assert metrics["test/margin"] != 0
    assert {"test/logprob_accuracy", "test/chosen_logprob"} <= set(metrics)
    capsys.readouterr()
    assert main(["test", f"--ckpt_path={folder / 'prompt.safetensors'}"]) == 2
    assert "use a file in the folder checkpoints of the run" in capsys.readouterr().err


def test_kto_learns_from_single_answers(options, tmp_path):
    rows = []
    for row in PAIRS:
        rows += [
            {"prompt": row["prompt"], "chosen": row[name], "liked": name == "chosen"} for name in ("chosen", "rejected")
        ]
    data = write_splits(tmp_path / "liked", train=rows, validation=rows, test=rows)
    options = [option for option in options if not option.startswith("--data.path")]
    kto = ["--model.objective=KTO", f"--data.path={data}", "--data.liked=liked", "--trainer.log_every_n_steps=1"]
    assert main(["fit", *options, *kto]) == 0
    assert float(read_losses(last_folder())[0]) == pytest.approx(0.5, abs=1e-4)


def test_a_resumed_policy_has_the_reference_of_the_uninterrupted_one(options):
    dpo = ["--model.objective=DPO", "--trainer.log_every_n_steps=1"]
    options = [option for option in options if not option.startswith("--trainer.max_steps")]
    assert main(["fit", *options, *dpo, "--trainer.max_steps=4"]) == 0
    whole = last_folder()
    assert main(["fit", *options, *dpo, "--trainer.max_steps=2"]) == 0
    half = last_folder()
    checkpoint = half / "checkpoints" / "last.ckpt"
    assert main(["fit", f"--config={half / 'config.yaml'}", f"--ckpt_path={checkpoint}", "--trainer.max_steps=4"]) == 0
    assert read_losses(last_folder()) == read_losses(whole)[-2:]
