"""The run commands from the command line, on a tiny backbone."""

import io
import json
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import wandb_file
from row_files import read_rows, write_rows, write_splits
from runs import load_state, read_losses, read_metrics

from lightning_softprompt import __version__
from lightning_softprompt.checkpoints.prompt_file import read_prompt
from lightning_softprompt.cli.app import main, make_cli
from lightning_softprompt.cli.commands import fold
from lightning_softprompt.cli.commands.configs import configs_folder
from lightning_softprompt.runs.run_checks import TRAINING_CHECKS
from lightning_softprompt.runs.run_spec import last_folder
from lightning_softprompt.system.errors import CommandError

CONFIGS = configs_folder()


@pytest.fixture
def data_folder(tmp_path, rows):
    return write_splits(tmp_path / "data", train=rows * 3, validation=rows, test=rows[:5])


@pytest.fixture
def common(tmp_path, data_folder, tiny_folder):
    return [
        f"--backbone.name={tiny_folder('llama')}",
        "--data=ClassificationDataModule",
        f"--data.path={data_folder}",
        "--data.template={soft}{text} it is{target}",
        '--data.labels={"negative": "bad", "neutral": "one", "positive": "good"}',
        "--data.batch_size=2",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--run.folder={tmp_path / 'runs'}",
    ]


@pytest.fixture
def fit(common):
    def fit(*options):
        has_method = any(option.startswith("--model=") for option in options)
        method = [] if has_method else ["--model=PromptTuning", "--model.length=3"]
        limits = [
            "--trainer.max_epochs=-1",
            "--trainer.max_steps=6",
            "--trainer.log_every_n_steps=1",
            "--trainer.val_check_interval=3",
        ]
        assert main(["fit", *method, *limits, *common, *options]) == 0
        return last_folder()

    return fit


def test_fit_leaves_config_metrics_checkpoints_plots_and_prompt(fit):
    folder = fit()
    for name in ("config.yaml", "metrics.csv", "metrics.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt",
                 "plots/learning_curve.png", "plots/val_confusion.png", "prompt.safetensors", "prompt.md"):  # fmt: skip
        assert (folder / name).stat().st_size > 0, name
    assert len(read_losses(folder)) == 6
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == ["tokens"]
    assert read_metrics(folder)["trainable_parameters"] == 3 * 32
    training = read_prompt(folder / "prompt.safetensors").training
    best = read_metrics(folder)["best"]
    assert (training["version"], training["readout"], training["seed"]) == (__version__, "LabelWords", 42)
    assert training["step"] == best["global_step"]
    assert training["metrics"]["val/accuracy"].items() >= {"value": best["value"]}.items()
    assert training["metrics"]["val/accuracy"]["low"] < best["value"] < training["metrics"]["val/accuracy"]["high"]
    assert training["data"]["path"] in (folder / "config.yaml").read_text()
    assert len(training["data"]["digest"]) == 16


@pytest.mark.parametrize("start", ["ckpt_path=checkpoints/last.ckpt", "init_from=prompt.safetensors"])
def test_inferred_classes_come_from_the_checkpoint_or_prompt_and_no_training_rows_are_needed(fit, data_folder, start):
    words = {"negative": "bad", "neutral": "one", "positive": "good"}
    for path in data_folder.glob("*.jsonl"):
        write_rows(path, [{**row, "label": words[row["label"]]} for row in read_rows(path)])
    folder = fit("--data.labels=null")
    option, _, file = start.partition("=")
    rows = [row for row in read_rows(data_folder / "test.jsonl") if row["label"] != "one"]  # without one of the classes
    test_path = write_rows(data_folder.parent / "test.jsonl", rows)
    shutil.rmtree(data_folder)
    assert main(["test", f"--{option}={folder / file}", "--trainer.accelerator=cpu", f"--data.test={test_path}"]) == 0
    records = read_rows(last_folder() / "test_predictions.jsonl")
    assert [record["target"] for record in records] == [row["label"] for row in rows]
    assert set(records[0]["scores"]) == {"bad", "good", "one"}


def test_names_of_classes_are_text_in_the_config_of_a_run_too(fit, data_folder):
    for path in data_folder.glob("*.jsonl"):
        write_rows(path, [{**row, "label": int(row["label"] == "positive")} for row in read_rows(path)])
    folder = fit("--data.labels={1: good, 0: bad}")  # not in the order of the numbers
    assert main(["test", f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"]) == 0
    records = read_rows(last_folder() / "test_predictions.jsonl")
    rows = read_rows(data_folder / "test.jsonl")
    assert [record["target"] for record in records] == [str(row["label"]) for row in rows]
    assert list(records[0]["scores"]) == ["1", "0"]


@pytest.mark.wandb
def test_offline_wandb_run_holds_config_losses_histogram_and_predictions(fit):
    run = wandb_file.read_run(fit("--run.project=trial"))
    assert run.project == "trial"
    assert run.config["model"]["init_args"]["length"] == 3
    assert len(run.rows("train/loss")) == 6
    assert run.rows("prompt/row_norms")
    assert run.tables("val/predictions")[-1]
    assert "val/accuracy" in run.metrics


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(fit):
    whole = fit()
    half = fit("--trainer.max_steps=4")
    resumed = fit(f"--ckpt_path={half / 'checkpoints' / 'last.ckpt'}")
    assert read_losses(whole) == read_losses(half) + read_losses(resumed)
    assert torch.equal(load_state(whole)["tokens"], load_state(resumed)["tokens"])


def test_keep_last_stores_several_checkpoints_and_the_previous_one_resumes_if_the_last_is_damaged(fit, capsys):
    whole = fit("--run.keep_last=3", "--trainer.val_check_interval=1")
    folder = whole / "checkpoints"
    steps = {p.name: torch.load(p, weights_only=True)["global_step"] for p in folder.glob("last*.ckpt")}
    assert steps == {"last.ckpt": 6, "last-1.ckpt": 5, "last-2.ckpt": 4}
    broken = folder / "last.ckpt"
    broken.write_bytes(broken.read_bytes()[:-100])
    with pytest.raises(AssertionError):
        fit(f"--ckpt_path={broken}")
    assert "last-1.ckpt, of " in capsys.readouterr().err.replace("\n", "")
    resumed = fit("--trainer.val_check_interval=1", f"--ckpt_path={folder / 'last-1.ckpt'}")
    assert read_losses(resumed) == read_losses(whole)[5:]


def test_a_run_whose_backbone_is_a_file_resumes(fit, tmp_path, tiny_folder):
    path = tmp_path / "backbone.yaml"
    path.write_text(json.dumps({"name": str(tiny_folder("llama"))}))
    whole, half = fit(f"--backbone={path}"), fit(f"--backbone={path}", "--trainer.max_steps=4")
    resumed = fit(f"--backbone={path}", f"--ckpt_path={half / 'checkpoints' / 'last.ckpt'}")
    assert read_losses(whole) == read_losses(half) + read_losses(resumed)


def test_each_replica_saves_a_prompt_that_equals_the_one_of_a_run_with_its_seed(fit):
    folder = fit("--replicas=2", "--seed_everything=7")
    metrics = read_metrics(folder)["val"]
    both = [metrics[f"val/accuracy/replica_{k}"] for k in (1, 2)]
    assert metrics["val/accuracy"] == pytest.approx(sum(both) / 2)
    assert metrics["val/accuracy/interval"] == pytest.approx(12.7062 * abs(both[0] - both[1]) / 2, abs=1e-3)
    for k, seed in ((1, 7), (2, 8)):
        alone = fit(f"--seed_everything={seed}")
        replica = read_prompt(folder / f"replica_{k}.safetensors").tensors
        torch.testing.assert_close(replica, read_prompt(alone / "prompt.safetensors").tensors, rtol=1e-5, atol=1e-7)
        of_replica, of_run = (read_prompt(path).training for path in (
            folder / f"replica_{k}.safetensors", alone / "prompt.safetensors",
        ))  # fmt: skip
        assert of_replica["metrics"]["val/accuracy"] == of_run["metrics"]["val/accuracy"]
    assert main(["test", f"--init_from={folder / 'replica_2.safetensors'}", "--replicas=1"]) == 0


def test_replicas_resume_bit_for_bit_and_are_tested_together(fit, capsys):
    two = "--replicas={count: 2, learning_rates: [0.1, 0.01]}"
    whole, half = fit(two), fit(two, "--trainer.max_steps=4")
    resumed = fit(two, f"--ckpt_path={half / 'checkpoints' / 'last.ckpt'}")
    assert read_losses(whole) == read_losses(half) + read_losses(resumed)
    states = [load_state(whole), load_state(resumed)]
    assert list(states[0]) == ["replicas.0.tokens", "replicas.1.tokens"]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert main(["test", f"--ckpt_path={whole / 'checkpoints' / 'best.ckpt'}"]) == 0
    assert "test/accuracy/replica_2" in read_metrics(last_folder())["test"]
    capsys.readouterr()
    last = f"--ckpt_path={whole / 'checkpoints' / 'last.ckpt'}"
    assert main(["fit", "--config", str(whole / "config.yaml"), "--replicas=3", last]) == 2
    assert "replicas was 2 and is 3" in capsys.readouterr().err
    assert main(["test", f"--init_from={whole / 'replica_1.safetensors'}"]) == 2
    assert "it is not of 2 replicas; --replicas=1 takes a single prompt" in capsys.readouterr().err


def test_test_of_a_checkpoint_needs_no_further_options_and_scores_each_row_once(fit):
    folder = fit()
    assert main(["test", f"--ckpt_path={folder / 'checkpoints' / 'best.ckpt'}"]) == 0
    tested = last_folder()
    records = read_rows(tested / "test_predictions.jsonl")
    assert sorted(record["row"] for record in records) == [0, 1, 2, 3, 4]
    num_correct = sum(record["prediction"] == record["target"] for record in records)
    metrics = read_metrics(tested)["test"]
    assert metrics["test/accuracy"] == pytest.approx(num_correct / 5)


def test_the_last_checkpoint_of_a_named_run_is_scored_without_a_config_and_its_config_remains(fit, tmp_path, capsys):
    folder = fit("--run.name=mine", "--trainer.log_every_n_steps=0")
    config = (folder / "config.yaml").read_text()
    run_options = [f"--run.folder={tmp_path / 'runs'}", "--run.name=mine"]
    assert main(["test", "--ckpt_path=last", *run_options, "--data.eval_batch_size=1"]) == 0
    assert last_folder() == folder
    assert (folder / "config.yaml").read_text() == config
    assert "eval_batch_size: 1" in (folder / "config_test.yaml").read_text()
    folder_as_output = ["--data.predict=rows.jsonl", f"--run.predictions={tmp_path}"]
    assert main(["predict", f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}", *folder_as_output]) == 2
    assert f"give {tmp_path / 'predictions.jsonl'}" in capsys.readouterr().err
    assert main(["test", f"--ckpt_path={folder / 'checkpoints'}"]) == 2
    assert "which is a folder; use one of its files" in capsys.readouterr().err


def suggested_commands(error):
    """Returns the suggested commands in the standard error of a command."""
    lines = error.splitlines()
    first = next((number for number, line in enumerate(lines) if line.startswith("Next: ")), len(lines))
    return [line[6:] for line in lines[first:]]


def test_each_command_suggests_the_next_one_which_runs_as_printed(fit, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = fit("--run.experiment=my runs").relative_to(tmp_path)
    test, predict = suggested_commands(capsys.readouterr().err)
    checkpoint = f"--ckpt_path '{folder}/checkpoints/best.ckpt'"
    assert test == f"softprompt test {checkpoint}"
    assert predict == f'echo \'{{"text": "..."}}\' | softprompt predict {checkpoint} --data.predict -'
    assert main(shlex.split(test)[1:]) == 0
    assert suggested_commands(capsys.readouterr().err) == [predict]
    program = f"{shlex.quote(sys.executable)} -m lightning_softprompt"
    done = subprocess.run(predict.replace("softprompt", program, 1), shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prediction"] in ("negative", "neutral", "positive")
    assert suggested_commands(done.stderr) == [], "standard output is read by another program"
    (tmp_path / "new.txt").write_text("a warm film\n")
    assert main([*shlex.split(test.replace("test", "predict", 1))[1:], "--data.predict=new.txt"]) == 0
    assert suggested_commands(capsys.readouterr().err) == [test]


def test_the_next_command_needs_rows_and_a_successful_run(fit, common, data_folder, capsys):
    (data_folder / "test.jsonl").unlink()
    fit()
    validate, _ = suggested_commands(capsys.readouterr().err)
    assert main(shlex.split(validate)[1:]) == 0
    capsys.readouterr()
    assert main(["test", "--model=PromptTuning", *common]) == 2
    assert suggested_commands(capsys.readouterr().err) == []


def test_the_folded_prompt_is_tested_as_suggested(fit, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = fit("--model=PTuning")
    capsys.readouterr()
    assert fold.main([str(folder / "prompt.safetensors")]) == 0
    (command,) = suggested_commands(capsys.readouterr().err)
    assert main(shlex.split(command)[1:]) == 0


@pytest.mark.parametrize(
    ("options", "is_larger"),
    [(["--model=DPT", "--model.rank=1", "--model.length=9"], True), (["--model=PTuning"], False)],
)
def test_folding_explains_a_larger_file(fit, capsys, options, is_larger):
    folder = fit(*options)
    capsys.readouterr()
    assert fold.main([str(folder / "prompt.safetensors")]) == 0
    assert ("The file is larger" in capsys.readouterr().out) == is_larger


def test_a_saved_prompt_scores_as_its_checkpoint_does(fit):
    folder = fit()
    predictions = []
    starts = [f"--init_from={folder / 'prompt.safetensors'}", f"--ckpt_path={folder / 'checkpoints' / 'best.ckpt'}"]
    for start in starts:
        assert main(["test", start]) == 0
        predictions.append((last_folder() / "test_predictions.jsonl").read_text())
    assert predictions[0] == predictions[1]


def test_predict_reads_standard_input_and_writes_json_lines(fit, monkeypatch, capsys):
    folder = fit()
    text = '{"text": "the movie was great"}\nthat dog is one dog\n'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    folders = set(folder.parent.iterdir())
    capsys.readouterr()
    assert main(["predict", f"--ckpt_path={folder / 'checkpoints' / 'best.ckpt'}", "--data.predict=-"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["input"] for record in records] == ["the movie was great it is", "that dog is one dog it is"]
    assert all(sum(record["scores"].values()) == pytest.approx(1, abs=1e-4) for record in records)
    assert all(record["prediction"] == max(record["scores"], key=record["scores"].get) for record in records)
    assert set(folder.parent.iterdir()) == folders, "a prediction to standard output makes no folder"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.length=4", "length was 3 and is 4"),
        ("--model.optimizer=SGD", "optimizer"),
        ("--model=NoPrompt", "NoPrompt"),
        ("--seed_everything=7", "seed_everything was 42 and is 7"),
    ],
)
def test_an_option_that_contradicts_the_checkpoint_is_refused(fit, common, capsys, option, message):
    folder = fit()
    changed = ["--model=PromptTuning", "--model.length=3", *common, option]
    assert main(["fit", *changed, f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "--init_from" in error


def test_a_prompt_of_another_backbone_is_refused(fit, common, tiny_folder, capsys):
    folder = fit()
    options = ["--model=PromptTuning", "--model.length=3", *common, f"--backbone.name={tiny_folder('llama', 1)}"]
    assert main(["test", *options, f"--init_from={folder / 'prompt.safetensors'}"]) == 2
    assert "was trained on" in capsys.readouterr().err


LONG_WORDS = '{"positive": "good bad", "negative": "one", "neutral": "was"}'


def test_a_test_after_a_warm_start_needs_no_config(fit):
    first = fit()
    second = fit(f"--init_from={first / 'prompt.safetensors'}")
    assert main(["test", f"--ckpt_path={second / 'checkpoints' / 'best.ckpt'}"]) == 0


def test_a_prompt_passed_as_a_checkpoint_is_evaluated_but_not_resumed(fit, capsys):
    folder = fit()
    assert main(["test", f"--ckpt_path={folder / 'prompt.safetensors'}"]) == 0
    assert (last_folder() / "test_predictions.jsonl").is_file()
    assert main(["fit", f"--ckpt_path={folder / 'prompt.safetensors'}"]) == 2
    assert "is a prompt, not a checkpoint" in capsys.readouterr().err
    assert folder.joinpath("prompt.safetensors").stat().st_mode == folder.joinpath("config.yaml").stat().st_mode


@pytest.mark.wandb
def test_fit_logs_once_how_to_sync_wandb_later(fit, caplog):
    fit()
    assert sum("wandb sync" in record.getMessage() for record in caplog.records) == 1


def test_a_bad_validation_row_stops_the_run(common, data_folder, capsys):
    with (data_folder / "validation.jsonl").open("a") as file:
        file.write("{broken\n")
    assert main(["fit", "--model=PromptTuning", *common]) == 2
    assert "validation.jsonl:7" in capsys.readouterr().err


def test_a_row_that_is_too_long_is_skipped_on_request(fit, data_folder, caplog):
    with (data_folder / "train.jsonl").open("a") as file:
        file.write(json.dumps({"text": "dull " * 600, "label": "negative"}) + "\n")
    fit("--data.truncate=[]", "--data.on_bad_row=skip")
    assert any("1 of the train rows were skipped" in record.getMessage() for record in caplog.records)


MISTAKES = {
    "misspelt option": (["--model=PromptTuning", "--model.lenght=3"], "Did you mean 'length'"),
    "misspelt method": (["--model=PromptTunin"], "Did you mean 'PromptTuning'"),
    "misspelt data module": (["--model=PromptTuning", "--data=ClassificationDataModul"], "'ClassificationDataModule'"),
    "misspelt initialiser": (["--model=PromptTuning", "--model.init=FromTxt"], "Did you mean 'FromText'"),
    "misspelt callback": (["--trainer.callbacks+=EarlyStoping"], "Did you mean 'EarlyStopping'"),
    "wrong type": (["--model=PromptTuning", "--data.batch_size=eight"], "batch_size: expected int, got eight"),
    "unknown trainer option": (["--trainer.max_stepz=3"], "Did you mean 'trainer.max_steps'"),
    "abbreviated option": (["--trainer.max_step=3"], "unknown option --trainer.max_step"),
    "misspelt readout": (["--model=PromptTuning", "--model.readout=RankedChoises"], "Did you mean 'RankedChoices'"),
    "misspelt optimizer": (["--model=PromptTuning", "--model.optimizer=AdmW"], "Did you mean 'AdamW'"),
    "missing noun file": (["--model=nope.yaml"], "nope.yaml does not exist"),
    "linked option": (["--model=PromptTuning", "--model.backbone.name=x"], "is set by --backbone"),
    "evaluation of the data": (["--model=PromptTuning", "--model.evaluation=X"], "the class of --data determines the"),
    "half precision": (["--model=PromptTuning", "--trainer.precision=bf16-true"], "bf16-mixed"),
    "no such device": (["--model=PromptTuning", "--trainer.strategy=foo"], "strategy"),
    "batch of none": (["--model=PromptTuning", "--data.batch_size=0"], "at least 1"),
    "missing config": (["--config=missing.yaml"], "missing.yaml"),
    "missing model": ([], "--model must be given"),
    "option before its optimizer": (["--model=PromptTuning", "--model.optimizer.lr=0.1"], "names its class"),
    "option before its schedule": (
        ["--model=PromptTuning", "--model.scheduler.max_lr=1"], "precedes --model.scheduler, which names its class"
    ),
    "option before its objective": (
        ["--model=PromptTuning", "--model.objective.gamma=2"], "precedes --model.objective, which names its class"
    ),
    "option before its callback": (["--trainer.callbacks.patience=3"], "precedes --trainer.callbacks, which"),
    "option before its logger": (["--trainer.logger.save_dir=x"], "precedes --trainer.logger, which"),
    "misspelt option of an optimizer": (
        ["--model=PromptTuning", "--model.optimizer=AdamW", "--model.optimizer.weight_decey=1"],
        "AdamW has no option 'weight_decey'. Did you mean 'weight_decay'",
    ),
    "misspelt schedule": (["--model=PromptTuning", "--model.scheduler=CosineLR"], "Did you mean 'CosineAnnealingLR'"),
    "callback without its monitor": (["--trainer.callbacks=EarlyStopping"], "requires the option monitor"),
    "logger without its folder": (["--trainer.logger=CSVLogger"], "CSVLogger requires the option save_dir"),
    "logger that is not installed": (
        ["--model=PromptTuning", "--trainer.logger=MLFlowLogger"], "MLFlowLogger requires the package mlflow",
    ),
    "unknown precision": (["--trainer.precision=half"], "expected int or one of transformer-engine"),
    "unknown mode of W&B": (["--run.wandb=of"], "run.wandb: expected one of auto, online, offline, disabled, got of"),
    "rate that is no number": (
        ["--model=PromptTuning", "--model.optimizer=AdamW", "--model.optimizer.lr=high"],
        "model.optimizer.lr: expected float or Tensor, got high",
    ),
    "seed that is no number": (["--seed_everything=abc"], "seed_everything: expected bool or int, got abc"),
    "no file": (["--model=PromptTuning", "--ckpt_path="], "--ckpt_path is empty"),
    "no file to start from": (["--model=PromptTuning", "--init_from="], "--init_from is empty"),
    "metric of no validation": (
        [
            "--model=PromptTuning", "--trainer.limit_val_batches=0", "--trainer.callbacks=EarlyStopping",
            "--trainer.callbacks.monitor=val/loss",
        ],
        "EarlyStopping monitors val/loss, but --trainer.limit_val_batches 0",
    ),
    "name that leads elsewhere": (["--model=PromptTuning", "--run.name=.."], "must be the name of a folder"),
    "validation after no step": (["--model=PromptTuning", "--trainer.val_check_interval=0"], "above 0"),
    "logging after less than no step": (["--model=PromptTuning", "--trainer.log_every_n_steps=-1"], "at least 1, or 0"),
    "missing data": (["--model=PromptTuning", "--data.path=/nowhere"], "/nowhere"),
    "word that YAML reads as a value": (
        ["--model=PromptTuning", "--data.labels={negative: no, positive: yes}"],
        "labels, class 'negative': a name or word is expected, got False. YAML reads unquoted",
    ),
    "name that YAML reads as a value": (["--model=PromptTuning", "--data.labels={no: bad, yes: good}"], "got False."),
    "text that YAML reads as a value": (
        ["--model=PromptTuning", "--data.truncate=[no]"], "data.truncate: expected str, got False"
    ),
    "file in the place of a mapping": (
        ["--model=PromptTuning", "--data.labels=labels.json"], "data.labels: expected dict or list, got labels.json"
    ),
    "prompt longer than the window": (
        ["--model=PromptTuning", "--model.length=100000"], "--model.length is 100000, but"
    ),
    "no time to train": (["--model=PromptTuning", "--trainer.max_time=00:00:00:00"], "--trainer.max_time is 00:"),
    "bad template": (["--model=PromptTuning", "--data.template={text}"], "{target}"),
    "long label word": (
        ["--model=PromptTuning", "--model.readout=LabelWords", f"--data.labels={LONG_WORDS}"], "single-token word",
    ),
}  # fmt: skip


START_OF_RUN = ("Run folder", "Seed set", "W&B", "GPU", "TPU", "💡")  # lines that may precede an error


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_reported_in_two_lines_with_exit_code_2(common, capsys, mistake):
    options, message = MISTAKES[mistake]
    try:
        code = main(["fit", *common, *options])
    except SystemExit as stop:
        code = stop.code
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(START_OF_RUN)]
    assert code == 2
    assert message in error[0]
    assert error[0].startswith("error: ")
    assert len(error) == 2


def test_a_learning_rate_without_an_optimizer_is_answered_with_the_option_for_it(common, capsys):
    with pytest.raises(SystemExit):
        main(["fit", *common, "--model=PromptTuning", "--model.optimizer.lr=0.1"])
    assert capsys.readouterr().err.splitlines()[1].startswith("pass --model.lr to set the learning rate")
    with pytest.raises(SystemExit):
        main(["fit", *common, "--model=PromptTuning", "--model.optimizer.amsgrad=true"])
    assert "--model.lr" not in capsys.readouterr().err


def test_a_config_without_settings_is_refused_by_name(tmp_path, capsys):
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert main(["fit", f"--config={tmp_path / 'empty.yaml'}"]) == 2
    assert "empty.yaml is not a config" in capsys.readouterr().err


def test_a_time_limit_of_zero_is_refused_before_the_run_has_a_folder(common, tmp_path):
    assert main(["fit", "--model=PromptTuning", *common, "--trainer.max_time={minutes: 0}"]) == 2
    assert not (tmp_path / "runs").exists()


def test_a_training_that_a_callback_stops_before_its_first_step_is_an_error(common, capsys, monkeypatch):
    monkeypatch.delitem(TRAINING_CHECKS, "max_time")  # a limit of zero adds a Timer, which this check refuses first
    assert main(["fit", "--model=PromptTuning", *common, "--trainer.max_time=00:00:00:00"]) == 2
    assert "stopped before its first step" in capsys.readouterr().err


def test_a_resumed_training_without_a_step_left_names_its_checkpoint(common, tmp_path, capsys):
    words = ["fit", "--model=PromptTuning", *common, "--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    assert main([*words, "--run.name=one"]) == 0
    last = next(tmp_path.rglob("one/checkpoints/last.ckpt"))
    assert main([*words, "--run.name=two", f"--ckpt_path={last}"]) == 2
    assert f"{last} is of step 1, after which this run has no step left" in capsys.readouterr().err


def test_a_yaml_mistake_names_file_and_line(tmp_path, capsys, monkeypatch):
    path = tmp_path / "broken.yaml"
    path.write_text("model: [1\ndata: 2\n")
    monkeypatch.setattr("sys.argv", ["softprompt", "fit", "--config", str(path)])
    assert main(["fit", "--config", str(path)]) == 2
    assert f"{path}:2" in capsys.readouterr().err


RUN_CONFIGS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in ("study", "sweep"))


@pytest.mark.parametrize("path", RUN_CONFIGS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_packaged_config_begins_with_a_comment_and_can_be_instantiated(path, tiny_folder, data_folder):
    assert path.read_text().startswith("# ")
    noun = path.parent.name
    backbone = [] if noun == "backbone" else [f"--backbone.name={tiny_folder('llama')}"]
    model = [] if noun in ("method", "run") else ["--model=PromptTuning"]
    data = [] if noun in ("data", "run") else ["--data=ClassificationDataModule", "--data.labels=[good, bad]"]
    flag = {"method": "--model", "run": "--config"}.get(noun, f"--{noun}")
    paths = [] if "MultitaskDataModule" in path.read_text() else [f"--data.path={data_folder}"]
    cli = make_cli([flag, str(path), *model, *data, *backbone, *paths], run=False)
    assert cli.model.spec == cli.datamodule.spec
    assert cli.model.classes == cli.datamodule.classes
    assert cli.model.classes_by_task == cli.datamodule.classes_by_task


PRUNING_CLASS = "lightning_softprompt.callbacks.algorithms.pruning.Pruning"
PRUNING = json.dumps([{"class_path": PRUNING_CLASS, "init_args": {"after": 3, "measured": 2}}])


@pytest.mark.parametrize(
    "options",
    [
        ["--model=PrefixTuning", "--model.width=8", "--model.prompt_dropout=0.1"],
        ["--model=PTuningV2", "--model.readout=ClassHead"],
        ["--model=SMoP", "--model.penalty_weights={balance: 0.01}"],
        [
            "--model=DePT",
            "--model.length=3",
            '--model.penalties=[{"class_path": "UniformNorm", "init_args": {"weight": 0.1}}]',
        ],
        ["--model=ContextAware", "--data.demonstrations=1"],
        ["--model=XPrompt", f"--trainer.callbacks={PRUNING}"],
        ["--model=LatePromptTuning", "--model.layer=1"],
        ["--model=Spring", "--model.length=4", "--model.use=3"],
        ["--model=FullFineTuning"],
        ["--model=LoRA", "--model.rank=2"],
        ["--model=Combined", "--model.parts=[{class_path: PromptTuning, init_args: {length: 3}}, {class_path: LoRA}]"],
    ],
    ids=lambda options: options[0].removeprefix("--model="),
)
def test_methods_train_and_a_checkpoint_gets_the_same_score_again(fit, options):
    folder = fit(*options)
    report = read_metrics(folder)
    assert main(["validate", f"--ckpt_path={folder / 'checkpoints' / 'best.ckpt'}"]) == 0
    again = read_metrics(last_folder())["val"]
    assert again["val/accuracy"] == report["best"]["value"]


def test_a_folded_prompt_has_the_scores_of_its_method(fit, common, tmp_path):
    method = ["--model=ResidualPromptTuning", "--model.bottleneck=8", "--model.length=3"]
    folder = fit(*method)
    assert main(["test", *common, *method, f"--init_from={folder / 'prompt.safetensors'}"]) == 0
    expected = read_metrics(last_folder())["test"]
    assert fold.main([str(folder / "prompt.safetensors"), "--out", str(tmp_path / "folded.safetensors")]) == 0
    assert main(["test", *common, "--model=Folded", f"--model.path={tmp_path / 'folded.safetensors'}"]) == 0
    assert read_metrics(last_folder())["test"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model=SMoP", "--model.length=2"], "input-dependent prompt cannot be folded"),
        (["--model=Combined", "--model.parts=[{class_path: LoRA}]"], "Combined cannot be folded: it changes weights"),
    ],
    ids=["SMoP", "LoRA"],
)
def test_a_prompt_that_cannot_be_folded_is_refused(fit, options, message):
    folder = fit(*options)
    with pytest.raises(CommandError, match=message):
        fold.main([str(folder / "prompt.safetensors")])


def test_an_optimizer_is_the_one_of_pytorch_even_if_a_package_has_one_of_the_same_name(fit):
    pytest.importorskip("bitsandbytes")
    fit("--trainer.max_steps=1", "--model.optimizer=SGD", "--model.optimizer.lr=0.1")
