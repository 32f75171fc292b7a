"""`softprompt sweep` on tiny runs, and what a W&B agent calls."""

import json
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import torch
import yaml
from optuna.storages.journal import JournalFileBackend
from row_files import write_rows
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from lightning_softprompt.cli.app import main as run
from lightning_softprompt.cli.app import make_cli
from lightning_softprompt.cli.commands import sweep
from lightning_softprompt.cli.commands.configs import configs_folder
from lightning_softprompt.studies.study import words
from lightning_softprompt.system.errors import CommandError

SEARCH = {
    "model.length": {"int": {"low": 1, "high": 4}},
    "model.optimizer.init_args.lr": {"float": {"low": 0.001, "high": 0.1, "log": True}},
    "model.init": {"categorical": {"choices": ["SampleVocabulary", "Uniform"]}},
}


@pytest.fixture
def written(tmp_path, rows, tiny_folder):
    path = tmp_path / "data"
    path.mkdir()
    for split in ("train", "validation"):
        write_rows(path / f"{split}.jsonl", rows)

    def written(trials, storage="sweeps/search.log", **fit):
        options = {
            "model": "PromptTuning", "model.optimizer": "torch.optim.AdamW", "backbone.name": str(tiny_folder("llama")),
            "data": "ClassificationDataModule", "data.path": str(path), "data.template": "{soft}{text} it is{target}",
            "data.labels": {"negative": "bad", "neutral": "one", "positive": "good"}, "trainer.accelerator": "cpu",
            "trainer.max_steps": 2, "trainer.enable_progress_bar": False, "run.folder": str(tmp_path / "runs"),
            "run.wandb": "disabled", **fit,
        }  # fmt: skip
        said = {"storage": storage.replace("sweeps", str(tmp_path / "sweeps")), "trials": trials, "seed": 1}
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump({**said, "fit": options, "search": SEARCH}))
        return file

    return written


@pytest.fixture
def here(monkeypatch):
    """Trials run in this process, which has all imported already."""
    calls = []

    def call(words, env):
        assert words[1:4] == ["-m", "lightning_softprompt", "fit"]
        calls.append(words)
        return run(words[3:])

    monkeypatch.setattr(sweep.subprocess, "call", call)
    return calls


def test_trials_are_runs_and_the_best_is_told(written, here, tmp_path, capsys):
    assert sweep.main([str(written(2))]) == 0
    output = capsys.readouterr()
    told = json.loads(output.out)
    scores = [
        json.loads((tmp_path / "runs" / "mine" / f"trial-{n}" / "metrics.json").read_text())["best"] for n in range(2)
    ]
    assert told["trials"] == 2
    assert told["value"] == max(score["value"] for score in scores)
    assert scores[told["best"]]["value"] == told["value"]
    assert set(told["options"]) == set(SEARCH)
    suggestion = output.err.splitlines()[-1]
    best = tmp_path / "runs" / "mine" / f"trial-{told['best']}" / "checkpoints" / "best.ckpt"
    assert suggestion == f"Next: softprompt validate --ckpt_path {best}"  # there are no test rows
    assert run(suggestion.split()[2:]) == 0
    config = yaml.safe_load((tmp_path / "runs" / "mine" / f"trial-{told['best']}" / "config.yaml").read_text())
    assert config["model"]["init_args"]["length"] == told["options"]["model.length"]
    sweep.main([str(written(2))])  # there are enough
    assert len(here) == 2
    sweep.main([str(written(3))])
    assert len(here) == 3


def test_a_trial_that_fails_counts_and_the_others_go_on(written, here, monkeypatch, capsys):
    in_turn = iter([1, 0])
    monkeypatch.setattr(sweep.subprocess, "call", lambda words, env: next(in_turn) or run(words[3:]))
    assert sweep.main([str(written(2, "sqlite:///sweeps/search.db"))]) == 0
    assert json.loads(capsys.readouterr().out)["trials"] == 1
    monkeypatch.setattr(sweep.subprocess, "call", lambda words, env: 1)
    with pytest.raises(CommandError, match="no trial finished"):
        sweep.main([str(written(1, "sweeps/other.log"))])


PROCESS = """
import json, subprocess, sys
from pathlib import Path
from lightning_softprompt.cli.commands import sweep
def call(words):
    given = dict(word.removeprefix("--").split("=", 1) for word in words[4:])
    folder = Path(given["run.folder"], given["run.experiment"], given["run.name"])
    folder.mkdir(parents=True)  # no two processes have the same trial
    (folder / "metrics.json").write_text(json.dumps({"best": {"value": float(given["model.length"])}}))
    return 0
sweep.subprocess.call = call
sys.exit(sweep.main(sys.argv[1:]))
"""


def test_two_processes_share_one_search(written, tmp_path):
    words = [sys.executable, "-c", PROCESS, str(written(8))]
    root = Path(sweep.__file__).parents[2]
    started = [subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [json.loads(process.communicate(timeout=120)[0]) for process in started]
    assert [process.returncode for process in started] == [0, 0]
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "sweeps" / "search.log")))
    trials = optuna.load_study(study_name="mine", storage=storage).trials
    assert len({trial.number for trial in trials}) == len(trials)
    assert 8 <= len(trials) <= 9  # one may have been under way when the other ended the last
    best = max(trial.value for trial in trials)
    assert best == max(one["value"] for one in told)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("trials: 3", "storage, trials and search"),
        ("{storage: a, trials: 1, search: {model.length: [1, 2]}}", "model.length requires one of float, int"),
        ("{storage: a, trials: 1, search: {model.length: {uniform: {}}}}", "model.length requires one of float, int"),
        ("[", "cannot be read as YAML"),
    ],
)
def test_what_is_no_sweep_is_told(said, told, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(said)
    with pytest.raises(CommandError, match=told):
        sweep.main([str(file)])


def test_words_that_are_no_option_are_told(written):
    with pytest.raises(CommandError, match="options of runs are like"):
        sweep.main([str(written(1)), "foo"])


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match=r"pip install 'lightning-softprompt\[sweep\]'"):
        sweep.main([str(tmp_path / "a.yaml")])


def test_the_sweep_that_ships_draws_options_that_the_command_takes(tiny_folder, tmp_path):
    said = sweep.read_sweep(configs_folder() / "sweep" / "optuna.yaml")
    drawn = {name: next(iter(how.values()))["low"] for name, how in said["search"].items()}
    data = {"data": str(configs_folder() / "data" / "sst2.yaml"), "data.path": str(tmp_path)}
    options = {**said["fit"], **drawn, **data, "backbone.name": str(tiny_folder("llama"))}
    cli = make_cli(words(options), run=False)
    assert cli.model.length == drawn["model.length"]


def test_what_an_agent_of_w_and_b_calls_is_taken(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(configs_folder().parent)
    said = yaml.safe_load((configs_folder() / "sweep" / "wandb.yaml").read_text())
    drawn = {"model.init_args.length": 10, "model.init_args.optimizer.init_args.lr": 0.02}
    assert drawn.keys() == said["parameters"].keys()
    flags = create_sweep_command_args({"args": {name: {"value": value} for name, value in drawn.items()}})["args"]
    command = [str(word) for word in said["command"]]
    assert command[:5] == ["${env}", "${interpreter}", "-m", "${program}", "fit"]
    more = [f"--backbone.name={tiny_folder('llama')}", f"--data.path={tmp_path}"]
    cli = make_cli([*command[5:-1], *flags, *more], run=False)
    assert cli.model.length == 10
    optimizer = cli.model.optimizer_factory.build([{"params": [torch.nn.Parameter(torch.zeros(1))]}])
    assert optimizer.param_groups[0]["lr"] == 0.02
