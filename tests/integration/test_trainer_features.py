"""Features of Lightning's Trainer work with the rows and prompts of the project, or are refused by name."""

import pytest
import torch
from row_files import read_rows, write_rows
from runs import read_column, read_losses, read_metrics
from spies import Rows

from lightning_softprompt.callbacks.recovery.run_start import RunStart
from lightning_softprompt.cli.app import main
from lightning_softprompt.runs.run_spec import last_folder

LONG = " ".join(["very"] * 12)


@pytest.fixture
def argv(tmp_path, tiny_folder):
    """Options of a run on 24 rows; the second half of them is long and negative."""
    rows = [{"text": f"good {i % 3}", "label": "positive"} for i in range(12)]
    rows += [{"text": f"{LONG} {i % 3}", "label": "negative"} for i in range(12)]
    path = tmp_path / "rows.jsonl"
    write_rows(path, rows)
    return [
        "--model=PromptTuning", "--model.length=3", "--data=ClassificationDataModule", f"--data.train={path}",
        f"--data.validation={path}", f"--data.test={path}", "--data.template={soft}{text} it is{target}",
        "--data.cache=false", "--data.batch_size=4", '--data.labels={"negative": "bad", "positive": "good"}',
        "--run.wandb=disabled", f"--backbone.name={tiny_folder('llama')}", f"--run.folder={tmp_path / 'runs'}",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip


@pytest.fixture
def fit(argv):
    def fit(*options):
        assert main(["fit", *argv, "--trainer.log_every_n_steps=1", *options]) == 0
        return last_folder()

    return fit


def test_a_limited_test_scores_short_and_long_rows_and_logs_which(fit, argv, caplog):
    folder = fit("--trainer.max_steps=1")
    caplog.clear()
    run_options = ["--run.name=limited", f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"]
    assert main(["test", *argv, *run_options, "--trainer.limit_test_batches=0.34"]) == 0
    records = read_rows(last_folder() / "test_predictions.jsonl")
    assert [record["target"] for record in records].count("positive") == len(records) / 2 == 4
    assert "limit_test_batches=0.34: test scores 8 of 24 rows, an even sample" in caplog.text


def test_a_limited_test_scores_the_same_rows_for_every_data_seed(argv):
    scored = []
    for seed in (0, 1):
        options = ["--model=PromptTuning", f"--data.seed={seed}", "--trainer.limit_test_batches=0.34"]
        assert main(["test", *argv, *options]) == 0
        scored.append({record["row"] for record in read_rows(last_folder() / "test_predictions.jsonl")})
    assert scored[0] == scored[1]


def test_overfitting_trains_on_the_same_batches_in_each_epoch(fit, caplog):
    Rows.seen.clear()
    fit("--trainer.overfit_batches=2", "--trainer.max_epochs=3", "--trainer.callbacks=spies.Rows")
    assert len(Rows.seen[0]) == 2
    assert Rows.seen[0] == Rows.seen[1] == Rows.seen[2]
    assert "every epoch trains on the batches of the first epoch" in caplog.text


def load_rate(folder):
    """Returns the learning rate in a checkpoint."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["optimizer_states"][0]["param_groups"][0]["lr"]


def count_plateaus(values):
    """Returns how many values are not above the maximum of those before them."""
    return sum(value <= max(values[:n]) for n, value in enumerate(values) if n > 0)


def test_a_plateau_schedule_depends_on_validations_and_resumes_exactly(fit):
    options = ["--model.optimizer=SGD", "--model.optimizer.lr=0.1", "--model.scheduler=ReduceLROnPlateau"]
    options += ["--model.scheduler.monitor=val/accuracy", "--model.scheduler.mode=max", "--model.scheduler.patience=0"]
    options += ["--trainer.val_check_interval=2", "--trainer.max_epochs=-1"]
    uninterrupted = fit(*options, "--trainer.max_steps=8")
    num_reductions = count_plateaus([float(value) for value in read_column(uninterrupted, "val/accuracy")])
    assert load_rate(uninterrupted) < 0.1
    assert load_rate(uninterrupted) == pytest.approx(0.1 * 0.1**num_reductions)
    half = fit(*options, "--trainer.max_steps=4")
    rest = fit(*options, "--trainer.max_steps=8", f"--ckpt_path={half / 'checkpoints' / 'last.ckpt'}")
    assert read_losses(half) + read_losses(rest) == read_losses(uninterrupted)
    assert load_rate(rest) == load_rate(uninterrupted)


def test_a_schedule_that_is_as_long_as_the_training_resumes_bit_for_bit(fit, tmp_path):
    options = ["--model.scheduler=OneCycleLR", "--model.scheduler.max_lr=0.1", "--model.scheduler.total_steps=12"]
    saving = ["every_n_train_steps=4", "filename={step}", f"dirpath={tmp_path}", "save_top_k=-1"]
    checkpoints = ["--trainer.callbacks=ModelCheckpoint", *(f"--trainer.callbacks.{option}" for option in saving)]
    uninterrupted = fit("--trainer.max_epochs=2", *options, *checkpoints)
    rest = fit("--trainer.max_epochs=2", *options, f"--ckpt_path={tmp_path / 'step=4.ckpt'}")
    assert read_losses(rest) == read_losses(uninterrupted)[4:]


def test_the_monitored_metric_is_an_option(fit):
    folder = fit("--trainer.max_epochs=1", "--run.monitor=macro_f1")
    report = read_metrics(folder)
    assert report["best"]["metric"] == "val/macro_f1"
    assert report["best"]["value"] == report["val"]["val/macro_f1"]


def test_a_resumed_run_has_the_same_monitored_metric(fit, argv, capsys):
    folder = fit("--trainer.max_epochs=1")
    resume = ["fit", *argv, f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"]
    assert main([*resume, "--trainer.max_epochs=2", "--run.monitor=loss"]) == 2
    assert "run.monitor was 'val/accuracy' and is 'val/loss'" in capsys.readouterr().err
    assert main([*resume, "--trainer.max_epochs=2", "--run.monitor=accuracy"]) == 0


REFUSED = {
    "early stopping": (["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val_loss"], "mean val/loss"),
    "checkpoint": (["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitor=val/acc"], "val/accuracy"),
    "watched metric": (["--run.monitor=f2"], "--run.monitor is 'val/f2', but validation computes"),
    "plateau": (["--model.scheduler=ReduceLROnPlateau", "--model.scheduler.monitor=val/los"], "Did you mean val/loss"),
    "plateau without a metric": (["--model.scheduler=ReduceLROnPlateau"], "requires the option monitor"),
    "weight averaging": (
        ["--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.01"], "EMAWeightAveraging",
    ),
    "early copy": (["--trainer.callbacks=spies.Copying"], "Copying copied the model in `setup`"),
    "rate finder": (["--trainer.callbacks=LearningRateFinder"], "softprompt fit --find_lr"),
    "short schedule": (
        ["--model.scheduler=OneCycleLR", "--model.scheduler.max_lr=0.1", "--model.scheduler.total_steps=5"],
        "--model.scheduler fails at step 6 of 12",
    ),
    "schedule of zero": (["--model.scheduler=StepLR", "--model.scheduler.step_size=0"], "fails at step 1"),
    "function of transformers": (
        ["--model.scheduler=transformers.get_linear_schedule_with_warmup"], "get_linear_schedule_with_warmup",
    ),
    "rate below zero": (["--model.optimizer=AdamW", "--model.optimizer.lr=-1"], "--model.optimizer cannot be created"),
    "rate that is no number": (["--model.optimizer=AdamW", "--model.optimizer.lr=nan"], "float or Tensor, got nan"),
    "endless rate": (["--model.optimizer=AdamW", "--model.optimizer.lr=.inf"], "must be a finite, non-negative"),
    "betas": (["--model.optimizer=AdamW", "--model.optimizer.betas=[2, 3]"], "Invalid beta"),
    "dropout": (["--model.prompt_dropout=1.5"], "prompt_dropout must be at least 0 and below 1, got 1.5"),
    "no epochs": (["--trainer.max_epochs=0"], "--trainer.max_epochs is 0: nothing would be trained"),
    "no steps": (["--trainer.max_steps=0"], "--trainer.max_steps is 0: nothing would be trained"),
    "no batches": (["--trainer.limit_train_batches=0"], "--trainer.limit_train_batches is 0"),
    "no checkpoints": (["--trainer.enable_checkpointing=false"], "--run.keep_last"),
    "barebones": (["--trainer.barebones=true"], "omit the option"),
    "double precision": (["--trainer.precision=64-true"], "use 32-true"),
    "clipping below zero": (["--trainer.gradient_clip_val=-1"], "at least 0"),
    "accumulation of nothing": (["--trainer.accumulate_grad_batches=0"], "at least 1"),
    "validation never": (["--trainer.check_val_every_n_epoch=0"], "at least 1, or null"),
    "too few validation batches": (["--trainer.limit_val_batches=0.01"], "limit_val_batches"),
    "label of two words": (
        ["--data.labels={negative: bad, positive: very good}", "--model.readout=LabelWords"], "single-token word",
    ),
    "seed below zero": (["--data.seed=-5"], "seed must be at least 0, got -5"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", REFUSED.values(), ids=REFUSED)
def test_an_unsupported_feature_is_refused_in_two_lines_before_a_folder_exists(mistake, argv, tmp_path, capsys):
    options, message = mistake
    try:
        code = main(["fit", *argv, "--trainer.max_epochs=2", *options])
    except SystemExit as exit:
        code = exit.code
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("Seed set", "Loading"))]
    assert code == 2
    assert error[-2].startswith("error: ")
    assert message in error[-2]
    assert not (tmp_path / "runs").exists()


def test_an_error_of_a_library_names_its_kind_and_place(argv, monkeypatch, capsys):
    def fail(*arguments):
        raise KeyError("within")

    monkeypatch.setattr(RunStart, "on_train_start", fail)
    assert main(["fit", *argv]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-2].startswith("error: KeyError at ")
    assert "within" in error[-2]
