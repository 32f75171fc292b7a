"""`softprompt sweep` on tiny runs, and the command of a W&B agent."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import optuna
import pytest
import torch
import yaml
from optuna.storages.journal import JournalFileBackend
from row_files import write_rows
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args
from wandb_file import read_run, read_runs

from lightning_softprompt.callbacks.reporting.prompt_watch import PromptWatch
from lightning_softprompt.cli.app import main as run
from lightning_softprompt.cli.app import make_cli
from lightning_softprompt.cli.commands import sweep
from lightning_softprompt.cli.commands.configs import configs_folder
from lightning_softprompt.studies.options import to_arguments
from lightning_softprompt.system.errors import CommandError

SEARCH = {
    "model.length": {"int": {"low": 1, "high": 4}},
    "model.lr": {"float": {"low": 0.001, "high": 0.1, "log": True}},
    "model.init": {"categorical": {"choices": ["SampleVocabulary", "Uniform"]}},
}


@pytest.fixture
def write_sweep(tmp_path, rows, tiny_folder):
    path = tmp_path / "data"
    path.mkdir()
    for split in ("train", "validation"):
        write_rows(path / f"{split}.jsonl", rows)

    def write_sweep(trials, storage="sweeps/search.log", **fit):
        options = {
            "model": "PromptTuning", "backbone.name": str(tiny_folder("llama")),
            "data": "ClassificationDataModule", "data.path": str(path), "data.template": "{soft}{text} it is{target}",
            "data.labels": {"negative": "bad", "neutral": "one", "positive": "good"}, "trainer.accelerator": "cpu",
            "trainer.max_steps": 2, "trainer.enable_progress_bar": False, "run.folder": str(tmp_path / "runs"),
            "run.wandb": "disabled", **fit,
        }  # fmt: skip
        settings = {"storage": storage.replace("sweeps", str(tmp_path / "sweeps")), "trials": trials, "seed": 1}
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump({**settings, "fit": options, "search": SEARCH}))
        return file

    return write_sweep


@pytest.fixture
def calls(monkeypatch):
    """Runs trials in this process, which has already imported everything, and returns their commands."""
    calls = []

    def call(command, env):
        assert command[1:4] == ["-m", "lightning_softprompt", "fit"]
        calls.append(command)
        return run(command[3:])

    monkeypatch.setattr(sweep.subprocess, "call", call)
    return calls


def test_trials_are_runs_and_the_best_is_reported(write_sweep, calls, tmp_path, capsys):
    assert sweep.main([str(write_sweep(2))]) == 0
    output = capsys.readouterr()
    report = json.loads(output.out)
    scores = []
    for number in range(2):
        path = tmp_path / "runs" / "mine" / f"trial-{number}" / "metrics.json"
        scores.append(json.loads(path.read_text())["best"])
    assert report["trials"] == 2
    assert report["value"] == max(score["value"] for score in scores)
    assert scores[report["best"]]["value"] == report["value"]
    assert set(report["options"]) == set(SEARCH)
    progress = re.findall(r"^\[(\d)/2\] trial (\d): val/accuracy (\S+) in ", output.err, re.MULTILINE)
    first, second = (f"{score['value']:.4f}" for score in scores)
    assert progress == [("1", "0", first), ("2", "1", second)]
    lines = output.err[output.err.index("\ntrial  val/accuracy") :].splitlines()
    assert lines[1].split() == ["trial", "val/accuracy", *sorted(SEARCH), "time"]  # YAML sorts them
    assert lines[3].split()[:2] == [str(report["best"]), f"{report['value']:.4f}"]
    image = (tmp_path / "runs" / "mine" / "mine.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    best_run = tmp_path / "runs" / "mine" / f"trial-{report['best']}"
    suggestion = output.err.splitlines()[-1]
    best = best_run / "checkpoints" / "best.ckpt"
    assert suggestion == f"Next: softprompt validate --ckpt_path {best}"  # there are no test rows
    assert run(suggestion.split()[2:]) == 0
    config = yaml.safe_load((best_run / "config.yaml").read_text())
    assert config["model"]["init_args"]["length"] == report["options"]["model.length"]
    sweep.main([str(write_sweep(2))])  # both trials exist already
    assert len(calls) == 2
    options = dict(argument.split("=", 1) for argument in calls[report["best"]][4:])
    name = options["--run.display_name"].split(" ")
    assert name[0] == f"trial-{report['best']}"
    assert f"length={report['options']['model.length']}" in name
    assert (options["--run.group"], options["--run.job_type"]) == ("mine", "sweep")
    sweep.main([str(write_sweep(3))])
    assert len(calls) == 3


def test_the_sweep_continues_after_a_failed_trial(write_sweep, calls, monkeypatch, capsys):
    codes = iter([1, 0])
    monkeypatch.setattr(sweep.subprocess, "call", lambda command, env: next(codes) or run(command[3:]))
    assert sweep.main([str(write_sweep(2, "sqlite:///sweeps/search.db"))]) == 0
    assert json.loads(capsys.readouterr().out)["trials"] == 1
    monkeypatch.setattr(sweep.subprocess, "call", lambda command, env: 1)
    with pytest.raises(CommandError, match="no trial finished"):
        sweep.main([str(write_sweep(1, "sweeps/other.log"))])


PROCESS = """
import json, subprocess, sys
from pathlib import Path
from lightning_softprompt.cli.commands import sweep
def call(command, env):
    options = dict(argument.removeprefix("--").split("=", 1) for argument in command[4:])
    folder = Path(options["run.folder"], options["run.experiment"], options["run.name"])
    folder.mkdir(parents=True)  # no two processes have the same trial
    (folder / "metrics.json").write_text(json.dumps({"best": {"value": float(options["model.length"])}}))
    return 0
sweep.subprocess.call = call
sys.exit(sweep.main(sys.argv[1:]))
"""


def test_two_processes_share_one_search(write_sweep, tmp_path):
    command = [sys.executable, "-c", PROCESS, str(write_sweep(8))]
    root = Path(sweep.__file__).parents[2]
    started = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    reports = [json.loads(process.communicate(timeout=120)[0]) for process in started]
    assert [process.returncode for process in started] == [0, 0]
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "sweeps" / "search.log")))
    trials = optuna.load_study(study_name="mine", storage=storage).trials
    assert len({trial.number for trial in trials}) == len(trials)
    assert 8 <= len(trials) <= 9  # one process can still run a trial when the other ends the last one
    best = max(trial.value for trial in trials)
    assert best == max(report["value"] for report in reports)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("trials: 3", "storage, trials and search"),
        ("{storage: a, trials: 1, search: {model.length: [1, 2]}}", "model.length requires one of float, int"),
        ("{storage: a, trials: 1, search: {model.length: {uniform: {}}}}", "model.length requires one of float, int"),
        ("[", "cannot be read as YAML"),
    ],
)
def test_files_that_are_not_sweeps_are_refused(content, message, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(content)
    with pytest.raises(CommandError, match=message):
        sweep.main([str(file)])


def test_arguments_that_are_not_options_are_refused(write_sweep):
    with pytest.raises(CommandError, match="expected options such as"):
        sweep.main([str(write_sweep(1)), "foo"])


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match=r"pip install 'lightning-softprompt\[sweep\]'"):
        sweep.main([str(tmp_path / "a.yaml")])


def test_trials_on_wandb_have_their_number_the_group_of_the_sweep_and_the_state_of_a_failure(
    write_sweep, calls, tmp_path, monkeypatch
):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    options = {"run.wandb": "offline", "trainer.val_check_interval": 1, "trainer.log_every_n_steps": 1}
    assert sweep.main([str(write_sweep(1, **options))]) == 0
    trial = read_run(tmp_path / "runs" / "mine" / "trial-0")
    assert (trial.group, trial.job_type) == ("mine", "sweep")
    assert trial.name.startswith("trial-0 init=")
    assert trial.config["run"]["trial"] == 0
    assert (trial.summary["trial/number"], trial.summary["trial/state"]) == (0, "COMPLETE")
    assert (trial.is_complete, trial.exit_code) == (True, 0)

    def fail(*args):
        raise ValueError("the loss cannot be computed")

    monkeypatch.setattr(PromptWatch, "on_train_batch_end", fail)
    with pytest.raises(CommandError, match="no trial finished"):
        sweep.main([str(write_sweep(1, "sweeps/failing.log", **options, **{"run.experiment": "failing"}))])
    failed = read_run(tmp_path / "runs" / "failing" / "trial-0")
    assert (failed.summary["trial/number"], failed.summary["trial/state"]) == (0, "FAIL")
    assert (failed.is_complete, failed.exit_code) == (True, 1)


def write_results(command, env, length=None):
    """Write the result of a trial in place of its training: the length of the prompt, and a failure of trial 3."""
    options = dict(argument.removeprefix("--").split("=", 1) for argument in command[4:])
    if options["run.trial"] == "3":
        return 1
    folder = Path(options["run.folder"], options["run.experiment"], options["run.name"])
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"best": {"value": float(length or options["model.length"])}}))
    return 0


def test_the_importance_of_options_is_printed_written_and_logged(write_sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(sweep.subprocess, "call", write_results)
    assert sweep.main([str(write_sweep(12, **{"run.wandb": "offline"}))]) == 0
    output = capsys.readouterr()
    summary = json.loads(output.out)
    importance = summary["importance"]
    assert next(iter(importance)) == "model.length"  # the result depends on it alone
    assert importance.keys() == SEARCH.keys()
    assert sum(importance.values()) == pytest.approx(1)
    assert (summary["trials"], summary["failed"]) == (11, 1)
    share = f"{importance['model.length']:.0%}"
    assert re.search(rf"^option +importance\n-+ +-+\nmodel.length +{share}$", output.err, re.MULTILINE)
    folder = tmp_path / "runs" / "mine"
    results = json.loads((folder / "results.json").read_text())
    assert results["importance"] == importance
    states = [trial["state"] for trial in results["results"]]
    assert states == ["COMPLETE"] * 3 + ["FAIL"] + ["COMPLETE"] * 8
    assert results["results"][3]["value"] is None
    assert results["results"][summary["best"]]["options"] == summary["options"]

    run = read_run(folder)
    assert (run.name, run.group, run.job_type) == ("mine", "mine", "sweep-summary")
    assert run.summary["importance/model.length"] == importance["model.length"]
    assert (run.summary["best"], run.summary["metric"]) == (summary["best"], "val/accuracy")
    (trials,) = run.tables("sweep/trials")
    assert trials["columns"] == ["trial", "state", "val/accuracy", "seconds", *sorted(SEARCH)]
    assert [row[:2] for row in trials["data"]] == [[number, state] for number, state in enumerate(states)]
    (shares,) = run.tables("sweep/importance")
    assert shares["data"] == [list(pair) for pair in importance.items()]
    assert run.rows("sweep/plot")
    assert sweep.main([str(write_sweep(12, **{"run.wandb": "offline"}))]) == 0
    assert {part.id for part in read_runs(folder)} == {run.id}  # the same search continues its run


def test_without_differences_no_option_is_important(write_sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep.subprocess, "call", partial(write_results, length=1))
    assert sweep.main([str(write_sweep(3))]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["importance"] == {}
    assert "importance" not in output.err


def test_the_sweep_of_this_project_has_options_of_the_command(tiny_folder, tmp_path):
    settings = sweep.read_sweep(configs_folder() / "sweep" / "optuna.yaml")
    sampled = {name: next(iter(distribution.values()))["low"] for name, distribution in settings["search"].items()}
    data = {"data": str(configs_folder() / "data" / "sst2.yaml"), "data.path": str(tmp_path)}
    options = {**settings["fit"], **sampled, **data, "backbone.name": str(tiny_folder("llama"))}
    cli = make_cli(to_arguments(options), run=False)
    assert cli.model.length == sampled["model.length"]


def test_the_command_of_a_wandb_agent_is_valid(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(configs_folder().parent)
    settings = yaml.safe_load((configs_folder() / "sweep" / "wandb.yaml").read_text())
    sampled = {"model.init_args.length": 10, "model.init_args.lr": 0.02}
    assert sampled.keys() == settings["parameters"].keys()
    flags = create_sweep_command_args({"args": {name: {"value": value} for name, value in sampled.items()}})["args"]
    command = [str(word) for word in settings["command"]]
    assert command[:5] == ["${env}", "${interpreter}", "-m", "${program}", "fit"]
    more = [f"--backbone.name={tiny_folder('llama')}", f"--data.path={tmp_path}"]
    cli = make_cli([*command[5:-1], *flags, *more], run=False)
    assert cli.model.length == 10
    optimizer = cli.model.optimizer_factory.build([{"params": [torch.nn.Parameter(torch.zeros(1))]}], steps=None)
    assert optimizer.param_groups[0]["lr"] == 0.02
