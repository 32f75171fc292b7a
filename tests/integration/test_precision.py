"""Frozen weights in half precision under prompts in float32, precisions that are refused, and runs that repeat."""

import logging

import pytest
import tiny
import torch
from row_files import write_splits
from runs import load_state, read_losses, read_metrics

from lightning_softprompt.cli.app import main
from lightning_softprompt.core.types import SoftPrompt
from lightning_softprompt.runs.run_spec import last_folder

HALVES = ("bfloat16", "float16")
KINDS = ("torchao-int8", "bitsandbytes-nf4")


@pytest.fixture
def run(tmp_path, rows, tiny_folder):
    path = write_splits(tmp_path / "data", train=rows * 3, validation=rows, test=rows)

    def run(command, *options, expected=0, family="llama"):
        words = [
            f"--backbone.name={tiny_folder(family)}", "--data=ClassificationDataModule", f"--data.path={path}",
            "--data.template={soft}{text} it is{target}", "--data.batch_size=3", "--trainer.accelerator=cpu",
            '--data.labels={"negative": "bad", "neutral": "one", "positive": "good"}', "--model=PromptTuning",
            "--model.length=3", "--trainer.enable_progress_bar=false", f"--run.folder={tmp_path / 'runs'}",
            "--run.wandb=disabled",
        ]  # fmt: skip
        training = ["--trainer.max_steps=4", "--trainer.log_every_n_steps=1"] if command == "fit" else []
        assert main([command, *words, *training, *options]) == expected
        return last_folder()

    return run


def load_tokens(folder):
    return load_state(folder)["tokens"]


@pytest.mark.parametrize("dtype", HALVES)
def test_a_float32_prompt_is_trained_and_tested_on_a_backbone_in_half_precision(dtype, run, caplog):
    caplog.set_level(logging.INFO, "lightning.pytorch")
    full, half = run("fit"), run("fit", f"--backbone.dtype={dtype}")
    assert load_tokens(half).dtype == torch.float32
    assert not torch.equal(load_tokens(half), load_tokens(full))
    for actual, expected_loss in zip(read_losses(half), read_losses(full), strict=True):
        assert float(actual) == pytest.approx(float(expected_loss), rel=0.05)
    tested = run("test", f"--backbone.dtype={dtype}", f"--init_from={half / 'prompt.safetensors'}")
    assert read_metrics(tested)["test"]["test/accuracy"] >= 0
    assert "was not set" not in caplog.text  # the warning is about an option that Lightning sets


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", [*tiny.CAUSAL, *tiny.SEQ2SEQ, *tiny.MASKED])
def test_a_float32_prompt_has_a_gradient_and_generates_on_a_backbone_in_half_precision(dtype, family, load):
    backbone = load(family, dtype=dtype)
    batch, prompt = tiny.batch_of(backbone.codec), torch.randn(1, 3, backbone.hidden_size).requires_grad_()
    backbone.cross_entropy(batch, SoftPrompt(tokens=prompt)).sum().backward()
    assert prompt.grad.dtype == torch.float32
    assert torch.isfinite(prompt.grad).all()
    assert prompt.grad.abs().sum() > 0
    if family not in tiny.MASKED:  # masked models do not generate
        assert len(backbone.generate(batch, SoftPrompt(tokens=prompt.detach()), max_new_tokens=2)) == len(batch)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_precisions_that_halve_the_prompt_are_refused_with_an_alternative(precision, run, capsys):
    run("fit", f"--trainer.precision={precision}", expected=2)
    message = capsys.readouterr().err
    assert "small updates would be lost" in message
    assert "bf16-mixed" in message
    assert "--backbone.dtype" in message


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_of_quantized_weights_is_tested_with_them_or_with_the_full_weights(kind, run, capsys):
    quantized = run("fit", f"--backbone.quantization={kind}")
    prompt = f"--init_from={quantized / 'prompt.safetensors'}"
    assert load_tokens(quantized).dtype == torch.float32
    run("test", f"--backbone.quantization={kind}", prompt)
    run("test", prompt, expected=2)
    message = capsys.readouterr().err
    assert f"quantized to {kind}" in message
    accept_prompts_of = message.partition("--backbone.accept_prompts_of ")[2].split()[0]
    run("test", f"--backbone.accept_prompts_of={accept_prompts_of}", prompt)
    on = f"--ckpt_path={quantized / 'checkpoints' / 'last.ckpt'}"
    longer = run("fit", f"--backbone.quantization={kind}", on, "--trainer.max_steps=6")
    assert len(read_losses(longer)) == 2


def test_a_deterministic_run_twice_gives_the_same_bits(run):
    option = ["--trainer.deterministic=true", "--model.prompt_dropout=0.3"]
    try:
        first, second = (run("fit", *option) for _ in range(2))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(load_tokens(first), load_tokens(second))
    assert read_losses(first) == read_losses(second)
    assert read_losses(first) != read_losses(run("fit", "--model.prompt_dropout=0.3", "--seed_everything=1"))


def test_a_loss_that_is_not_finite_stops_the_command_or_its_step_is_skipped(run, capsys):
    wild = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.init_args.lr=1e38"]
    run("fit", *wild, expected=2)
    message = capsys.readouterr().err
    assert "is not finite: rows" in message
    assert "--run.skip_bad_steps 3" in message
    folder = run("fit", *wild, "--run.skip_bad_steps=9", expected=0)
    assert (folder / "bad_rows.jsonl").read_text().count("\n") > 0
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["NumericGuard"]
    assert state["skipped"] > 0
