"""Studies on the command line: each run happens once, also if the study is killed."""

import csv
import json
import re
import signal
import sys
from itertools import count
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
import yaml
from row_files import write_rows
from wandb_file import read_run

from lightning_softprompt.__main__ import main
from lightning_softprompt.checkpoints.prompt_file import read_prompt
from lightning_softprompt.cli import app
from lightning_softprompt.cli.app import make_cli
from lightning_softprompt.cli.commands import RUN_COMMANDS
from lightning_softprompt.cli.commands.configs import configs_folder
from lightning_softprompt.evaluation.metrics.continual import transfer
from lightning_softprompt.studies.stage_run import STAGE_REFERENCE
from lightning_softprompt.studies.study import Study
from lightning_softprompt.studies.study_file import read_study

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from killing import Kill, start, wait_for_exit

CONFIGS = configs_folder()
MOOD = {"labels": {"negative": "bad", "neutral": "one", "positive": "good"}, "template": "{soft}{text} it is{target}"}
SIZE = {"labels": {"short": "never", "long": "long"}, "template": "{soft}{text} is {target}"}
PROMPT = "prompt.safetensors"


@pytest.fixture
def data(tmp_path, rows):
    """The options of two data modules."""
    short = [{"text": row["text"], "label": "long" if len(row["text"]) > 12 else "short"} for row in rows]
    options = {}
    for name, task, task_rows in (("mood", MOOD, rows), ("size", SIZE, short)):
        folder = tmp_path / name
        folder.mkdir()
        for split in ("train", "validation", "test"):
            write_rows(folder / f"{split}.jsonl", task_rows * 2)
        arguments = {**task, "path": str(folder), "batch_size": 2, "cache": False}
        options[name] = {"class_path": "ClassificationDataModule", "init_args": arguments}
    return options


@pytest.fixture
def common(tiny_folder):
    return {
        "backbone.name": str(tiny_folder("llama")),
        "model": "PromptTuning",
        "model.length": 3,
        "trainer": {"accelerator": "cpu", "max_epochs": -1, "max_steps": 6, "val_check_interval": 2,
                    "check_val_every_n_epoch": None, "enable_progress_bar": False},
        "run.wandb": "disabled",
    }  # fmt: skip


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A function that runs a study and returns its folder and the commands that it ran."""
    monkeypatch.chdir(tmp_path)

    def study(settings, *options, name="study", code=0):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        commands = []
        run = app.main

        def record_command(argv, **options):
            commands.append(argv)
            return run(argv, **options)

        monkeypatch.setattr(app, "main", record_command)
        assert main(["study", str(path), *options]) == code
        monkeypatch.setattr(app, "main", run)
        return tmp_path / "studies" / name, commands

    return study


def tensors(folder):
    return read_prompt(folder / PROMPT).tensors


def results(folder):
    with (folder / "results.csv").open(newline="") as file:
        return json.loads((folder / "results.json").read_text()), list(csv.DictReader(file))


def test_samples_and_seeds_run_once_and_are_averaged(study, common, data, capsys):
    settings = {
        "common": {**common, "data": data["mood"]},
        "compare": {"data.shots": [1, 2]},
        "repeat": {"data.seed": [1, 2], "seed_everything": [5]},
        "metrics": ["accuracy"],
    }
    folder, commands = study(settings)
    assert [argv[0] for argv in commands] == ["fit", "test"] * 4
    means, each = results(folder)
    for shots in (1, 2):
        values = [
            float(row["value"]) for row in each if row["data.shots"] == str(shots) and row["metric"] == "accuracy"
        ]
        scores = [row for row in means if row["compare"] == {"data.shots": shots} and row["metric"] == "accuracy"]
        assert scores[0]["values"] == pytest.approx(values)
        assert scores[0]["mean"] == pytest.approx(fmean(values))
        assert scores[0]["interval"] == pytest.approx(12.7062 * stdev(values) / 2**0.5, rel=1e-4)
        rows = yaml.safe_load(
            (folder / f"data.shots={shots},data.seed=2,seed_everything=5/run/config.yaml").read_text()
        )
        assert rows["data"]["init_args"]["shots"] == shots
        assert rows["data"]["init_args"]["seed"] == 2
    output, error = capsys.readouterr()
    assert re.search(r"^\[8/8\] test \S+ \((\d+ s|less than 1 s) left\)$", error, re.MULTILINE)
    assert re.search(r"^Completed 8 runs in \d+ s$", error, re.MULTILINE)
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    table = output[output.rindex("data.shots  stage") :]  # after the output of the tests
    assert "±" in table
    assert "macro_f1" not in table
    settings["repeat"]["data.seed"] = [1, 2, 3]
    settings["compare"]["data.shots"] = [2]
    folder, commands = study(settings)
    assert len(commands) == 2
    assert "--data.seed=3" in commands[0]
    _, commands = study(settings)
    assert not commands


def test_options_of_the_command_line_override_those_of_all_runs(study, common, data):
    settings = {
        "common": {**common, "data": data["mood"]},
        "stages": {"one": {}, "two": {"init_from": "${one}/" + PROMPT}},
    }
    folder, _ = study(settings, "--model.length", "4", "--trainer.max_steps=2")
    for stage in ("one", "two"):
        assert tensors(folder / "all" / stage)["tokens"].shape == (4, 32)
    settings["common"].pop("data")
    settings["common"].pop("model")
    study(
        settings, "--model", "PromptTuning", "--data", json.dumps(data["size"]), "--trainer.max_steps=2", name="other"
    )


def test_a_run_with_other_options_is_not_resumed_but_a_wrong_option_can_be_corrected(study, common, data, capsys):
    settings = {"common": {**common, "data": data["mood"], "model.lenght": 3}}
    with pytest.raises(SystemExit):
        study(settings)
    settings["common"].pop("model.lenght")
    folder, _ = study(settings)
    settings["common"]["model.length"] = 5
    study(settings, code=2)
    error = capsys.readouterr().err
    assert "model.length=3" in error
    assert "model.length=5" in error
    assert main(["study", "study.yaml", "--show", "--folder", "elsewhere"]) == 0
    assert capsys.readouterr().out.count("to do") == 2
    (folder / "all" / "run.json").unlink()
    (folder / "all" / "run.test.json").unlink()
    study(settings)
    assert tensors(folder / "all" / "run")["tokens"].shape == (5, 32)


def test_a_sequence_of_tasks_reports_average_and_backward_transfer(study, common, data):
    """R[i, j] is the result of `softprompt test` of prompt i on task j; EWC reduces forgetting."""
    after = {"init_from": "${mood}/" + PROMPT}
    penalty = {"class_path": "EWC", "init_args": {"former": "${mood}/importance.safetensors"}}
    settings = {
        "common": {
            **common,
            "trainer.max_steps": 12,
            "model.optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.1}},
        },
        "compare": {"trainer.callbacks.weight": [0.0, 1e6]},
        "stages": {
            "mood": {"data": data["mood"], "trainer.callbacks": [{"class_path": "EWC"}]},
            "size": {"data": data["size"], "trainer.callbacks": [penalty], **after},
        },
        "tests": {"mood": {"data": data["mood"]}, "size": {"data": data["size"]}},
    }
    folder, commands = study(settings)
    assert len(commands) == 12
    means, _ = results(folder)
    backward = {}
    for weight in (0.0, 1e6):
        values = {}
        for row in means:
            if list(row["compare"].values()) == [weight]:
                values[row["stage"], row["test"], row["metric"]] = row["mean"]
        matrix = [[values[i, j, "loss"] for j in ("mood", "size")] for i in ("mood", "size")]
        for i, j in (("mood", "mood"), ("mood", "size"), ("size", "mood"), ("size", "size")):
            path = folder / f"trainer.callbacks.weight={weight}" / f"{i}.{j}" / "metrics.json"
            report = json.loads(path.read_text())
            assert report["test"]["test/loss"] == values[i, j, "loss"]
        assert values["size", "average", "loss"] == pytest.approx((matrix[1][0] + matrix[1][1]) / 2)
        backward[weight] = values["size", "backward transfer", "loss"]
        assert backward[weight] == pytest.approx(matrix[1][0] - matrix[0][0])
        assert backward[weight] == transfer(matrix)[1]
    assert backward[0.0] > 0.05  # the loss rises because the prompt forgets
    assert backward[1e6] < 0.5 * backward[0.0]


def chain(common, data):
    """The stages of MPT, with few steps."""
    teacher = {"trainer.max_steps": 4}
    paths = ["${teacher_mood}/" + PROMPT, "${teacher_size}/" + PROMPT]
    distilled = {"class_path": "Distillation", "init_args": {"teachers": paths, "hidden": 0.1}}
    tasks = {name: data[name] for name in data}
    both = {"class_path": "MultitaskDataModule", "init_args": {"tasks": tasks, "together": {"rows": 4}}}
    init = {"class_path": "FromCheckpoint", "init_args": {"path": "${source}/" + PROMPT, "name": "shared"}}
    start = {"class_path": "FromTasks", "init_args": {"path": "${source}/" + PROMPT}}
    mpt = {"class_path": "MPT", "init_args": {"length": 3, "prompt_dropout": 0.1}}
    return {
        "common": {name: value for name, value in common.items() if not name.startswith("model")},
        "stages": {
            "teacher_mood": {"data": data["mood"], "model": "PromptTuning", "model.length": 3, **teacher},
            "teacher_size": {"data": data["size"], "model": "PromptTuning", "model.length": 2, **teacher},
            "source": {"data": both, "model": mpt, "model.objective": distilled, "trainer.max_steps": 9},
            "target": {"data": data["mood"], "model": mpt, "model.init": init, "model.start": start},
        },
    }


def read_results(folder):
    """Returns the prompts, last state and scores of the stages."""
    prompts = {stage: tensors(folder / "all" / stage) for stage in ("teacher_mood", "teacher_size", "source", "target")}
    last = torch.load(folder / "all" / "target" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    scores = json.loads((folder / "all" / "target.test" / "metrics.json").read_text())["test"]
    return prompts, last, scores


def assert_equal(one, other):
    (prompts, last, scores), (prompts_2, last_2, scores_2) = one, other
    for stage in prompts:
        assert all(torch.equal(prompts[stage][name], prompts_2[stage][name]) for name in prompts[stage]), stage
    assert all(torch.equal(last[name], last_2[name]) for name in last)
    assert scores == scores_2


def test_stages_have_the_same_results_after_kills(study, common, data, tmp_path):
    """SIGKILL repeatedly, before and after files are renamed and while they are written."""
    settings = chain(common, data)
    reference, _ = study(settings, name="reference")
    path = tmp_path / "killed.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    places = ("before a file has its name", "within a checkpoint", "after a file has its name", "within metrics.json")
    for kills in count():
        kill = Kill(places[kills % len(places)], 1 + 4 * kills % 7)
        (code,) = wait_for_exit([start(["study", str(path)], tmp_path / "output.txt", kill)])
        if code == 0:
            break
        assert code == -signal.SIGKILL, (tmp_path / "output.txt").read_text()
    assert kills >= 12
    assert_equal(read_results(reference), read_results(tmp_path / "studies" / "killed"))


class Killed(BaseException):
    """Simulates a kill: no handler of exceptions catches it."""


@pytest.mark.parametrize("at", range(1, 9))
def test_a_run_killed_after_any_save_has_the_same_results(study, common, data, monkeypatch, at):
    """The process ends after each save of a checkpoint in turn."""
    from lightning.pytorch import Trainer

    settings = {"common": {**common, "data": data["mood"], "model.prompt_dropout": 0.1}}
    reference, _ = study(settings, name="reference")
    save_checkpoint = Trainer.save_checkpoint
    remaining = iter(range(at - 1, -1, -1))

    def save(self, *args, **kwargs):
        save_checkpoint(self, *args, **kwargs)
        if next(remaining, 1) == 0:
            raise Killed

    monkeypatch.setattr(Trainer, "save_checkpoint", save)
    try:
        study(settings)
    except Killed:
        monkeypatch.setattr(Trainer, "save_checkpoint", save_checkpoint)
        study(settings)
    one, other = reference / "all", reference.parent / "study" / "all"
    assert torch.equal(tensors(one / "run")["tokens"], tensors(other / "run")["tokens"])
    scores = [json.loads((folder / "run.test" / "metrics.json").read_text())["test"] for folder in (one, other)]
    assert scores[0] == scores[1]
    bests = [json.loads((folder / "run" / "metrics.json").read_text())["best"] for folder in (one, other)]
    assert bests[0] == bests[1]


INVALID_FILES = {
    "an unknown key": ({"stage": {}}, r"must be a mapping with keys out of"),
    "a later stage": ({"stages": {"a": {"init_from": "${b}/x"}, "b": {}}}, r"refers to \['b'\], .* before it are \[\]"),
    "a name with a slash": ({"stages": {"a/b": {}}}, "names of stages and tests"),
    "one value": ({"repeat": {"data.seed": 3}}, r"values by option, such as \{data\.seed: \[1, 2\]\}"),
}


@pytest.mark.parametrize("case", INVALID_FILES)
def test_invalid_files_are_refused(tmp_path, case):
    settings, message = INVALID_FILES[case]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=message):
        read_study(tmp_path / "study.yaml")


def test_arguments_that_are_not_options_and_missing_files_are_refused(tmp_path, capsys):
    (tmp_path / "study.yaml").write_text("common: {}\n")
    assert main(["study", str(tmp_path / "study.yaml"), "--model"]) == 2
    assert "such as --model MPT" in capsys.readouterr().err
    assert main(["study", str(tmp_path / "none.yaml")]) == 2
    assert "no file " in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((CONFIGS / "study").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_of_this_project_is_valid(path, tiny_folder, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    assert path.read_text().startswith("# ")
    arguments = ["--backbone.name", str(tiny_folder("llama"))]
    if path.stem == "few_shot":
        arguments += ["--model", "PromptTuning", "--data", "configs/data/sst2.yaml"]
    if path.stem == "rag":
        arguments += ["--data", "configs/data/squad.yaml"]
    study = read_study(path, arguments=arguments)
    runs = [run for run in study.runs if run.command in RUN_COMMANDS]
    commands = [study.command_of(stage) for stage in study.stages]
    if set(commands) == {"fit"}:  # other stages can be shared by several variants
        num_tests = sum(map(len, study.tests_by_stage.values()))
        assert len(runs) == len(study.variants) * (len(study.stages) + num_tests)
    for run in {(run.command, run.name): run for run in runs}.values():
        arguments = [STAGE_REFERENCE.sub(lambda match: match[1], argument) for argument in run.arguments]
        cli = make_cli([argument for argument in arguments if not argument.startswith("--init_from")], run=False)
        assert cli.model.spec == cli.datamodule.spec


def test_two_processes_do_not_run_one_study(study, common, data, capsys):
    import fcntl

    settings = {"common": {**common, "data": data["mood"]}}
    folder = Path("studies/study")
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        study(settings, code=2)
    assert "another process runs the study" in capsys.readouterr().err


def test_runs_on_wandb_are_named_by_what_varies_and_grouped_by_study(study, common, data, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    options = {**common, "run.wandb": "offline", "trainer": {**common["trainer"], "max_steps": 2}}
    settings = {
        "common": {**options, "data": data["mood"]},
        "compare": {"model.length": [2, 3]},
        "repeat": {"seed_everything": [1]},
    }
    folder, _ = study(settings, name="lengths")
    for length in (2, 3):
        variant = folder / f"model.length={length},seed_everything=1"
        trained, tested = read_run(variant / "run"), read_run(variant / "run.test")
        assert trained.name == f"length={length} seed_everything=1"
        assert (trained.group, trained.job_type) == ("lengths", "fit")
        assert tested.id == trained.id


def test_stages_and_named_tests_have_wandb_runs_of_their_own(tmp_path):
    """The options of a run override these defaults."""
    stages = {"source": {}, "target": {"init_from": "${source}/prompt.safetensors"}}
    tests = {"dev": {}, "final": {"run.job_type": "report"}}
    runs = Study(tmp_path / "mine", stages=stages, tests=tests, compare=[{"data.shots": 8}]).runs
    commands = []
    for run in runs:

        def record_command(arguments, folder=run.folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.json").write_text("{}")
            commands.append(dict(argument.split("=", 1) for argument in arguments[1:]))
            return 0

        run.run(record_command)
    names = [command["--run.display_name"] for command in commands]
    assert names == [
        f"{name} shots=8" for name in ("source", "source.dev", "source.final", "target", "target.dev", "target.final")
    ]
    job_types = [command["--run.job_type"] for command in commands]
    assert job_types == ["source", "test", "report", "target", "test", "report"]
    assert {command["--run.group"] for command in commands} == {"mine"}
