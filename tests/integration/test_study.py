"""Studies as a user runs them: each run once, whatever happens on the way."""

import csv
import json
import signal
import sys
from itertools import count
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
import yaml
from row_files import write_rows

from lightning_softprompt.__main__ import main
from lightning_softprompt.checkpoints.prompt_file import read_prompt
from lightning_softprompt.cli import app
from lightning_softprompt.cli.app import make_cli
from lightning_softprompt.cli.commands.configs import configs_folder
from lightning_softprompt.evaluation.metrics.continual import transfer
from lightning_softprompt.studies.study import PLACE
from lightning_softprompt.studies.study_file import read_study

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from killing import Kill, ended, start

CONFIGS = configs_folder()
MOOD = {"labels": {"negative": "bad", "neutral": "one", "positive": "good"}, "template": "{soft}{text} it is{target}"}
SIZE = {"labels": {"short": "never", "long": "long"}, "template": "{soft}{text} is {target}"}
PROMPT = "prompt.safetensors"


@pytest.fixture
def data(tmp_path, rows):
    """Two tasks, each as an option."""
    short = [{"text": row["text"], "label": "long" if len(row["text"]) > 12 else "short"} for row in rows]
    options = {}
    for name, task, own in (("mood", MOOD, rows), ("size", SIZE, short)):
        folder = tmp_path / name
        folder.mkdir()
        for split in ("train", "validation", "test"):
            write_rows(folder / f"{split}.jsonl", own * 2)
        own_options = {**task, "path": str(folder), "batch_size": 2, "cache": False}
        options[name] = {"class_path": "ClassificationDataModule", "init_args": own_options}
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
    """A function that runs a study, and gives its folder and what `fit` and `test` were asked for."""
    monkeypatch.chdir(tmp_path)

    def study(said, *options, name="study", code=0):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(said, sort_keys=False))
        asked = []
        run = app.main

        def noted(argv, **options):
            asked.append(argv)
            return run(argv, **options)

        monkeypatch.setattr(app, "main", noted)
        assert main(["study", str(path), *options]) == code
        monkeypatch.setattr(app, "main", run)
        return tmp_path / "studies" / name, asked

    return study


def tensors(folder):
    return read_prompt(folder / PROMPT).tensors


def results(folder):
    with (folder / "results.csv").open(newline="") as file:
        return json.loads((folder / "results.json").read_text()), list(csv.DictReader(file))


def test_draws_and_seeds_are_each_run_once_and_averaged(study, common, data, capsys):
    said = {
        "common": {**common, "data": data["mood"]},
        "compare": {"data.shots": [1, 2]},
        "repeat": {"data.seed": [1, 2], "seed_everything": [5]},
        "metrics": ["accuracy"],
    }
    folder, asked = study(said)
    assert [argv[0] for argv in asked] == ["fit", "test"] * 4
    means, each = results(folder)
    for shots in (1, 2):
        values = [
            float(row["value"]) for row in each if row["data.shots"] == str(shots) and row["metric"] == "accuracy"
        ]
        own = [row for row in means if row["compare"] == {"data.shots": shots} and row["metric"] == "accuracy"]
        assert own[0]["values"] == pytest.approx(values)
        assert own[0]["mean"] == pytest.approx(fmean(values))
        assert own[0]["interval"] == pytest.approx(12.7062 * stdev(values) / 2**0.5, rel=1e-4)
        rows = yaml.safe_load(
            (folder / f"data.shots={shots},data.seed=2,seed_everything=5/run/config.yaml").read_text()
        )
        assert rows["data"]["init_args"]["shots"] == shots
        assert rows["data"]["init_args"]["seed"] == 2
    said_last = capsys.readouterr().out
    table = said_last[said_last.rindex("data.shots  stage") :]  # behind what the tests said of themselves
    assert "±" in table
    assert "macro_f1" not in table
    said["repeat"]["data.seed"] = [1, 2, 3]
    said["compare"]["data.shots"] = [2]
    folder, asked = study(said)
    assert len(asked) == 2
    assert "--data.seed=3" in asked[0]
    _, asked = study(said)
    assert not asked


def test_options_of_the_command_line_go_to_all_runs_and_win(study, common, data):
    said = {"common": {**common, "data": data["mood"]}, "stages": {"one": {}, "two": {"init_from": "${one}/" + PROMPT}}}
    folder, _ = study(said, "--model.length", "4", "--trainer.max_steps=2")
    for stage in ("one", "two"):
        assert tensors(folder / "all" / stage)["tokens"].shape == (4, 32)
    said["common"].pop("data")
    said["common"].pop("model")
    study(said, "--model", "PromptTuning", "--data", json.dumps(data["size"]), "--trainer.max_steps=2", name="other")


def test_a_run_is_not_gone_on_with_under_other_options_but_mistakes_can_be_mended(study, common, data, capsys):
    said = {"common": {**common, "data": data["mood"], "model.lenght": 3}}
    with pytest.raises(SystemExit):
        study(said)
    said["common"].pop("model.lenght")
    folder, _ = study(said)
    said["common"]["model.length"] = 5
    study(said, code=2)
    error = capsys.readouterr().err
    assert "model.length=3" in error
    assert "model.length=5" in error
    assert main(["study", "study.yaml", "--show", "--folder", "elsewhere"]) == 0
    assert capsys.readouterr().out.count("to do") == 2
    (folder / "all" / "run.json").unlink()
    (folder / "all" / "run.test.json").unlink()
    study(said)
    assert tensors(folder / "all" / "run")["tokens"].shape == (5, 32)


def test_a_sequence_of_tasks_leaves_a_matrix_and_what_was_forgotten(study, common, data):
    """R[i, j] is what `softprompt test` says of prompt i on task j, and a held prompt forgets less than a free one."""
    after = {"init_from": "${mood}/" + PROMPT}
    held = {"class_path": "EWC", "init_args": {"former": "${mood}/importance.safetensors"}}
    said = {
        "common": {
            **common,
            "trainer.max_steps": 12,
            "model.optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.1}},
        },
        "compare": {"trainer.callbacks.weight": [0.0, 1e6]},
        "stages": {
            "mood": {"data": data["mood"], "trainer.callbacks": [{"class_path": "EWC"}]},
            "size": {"data": data["size"], "trainer.callbacks": [held], **after},
        },
        "tests": {"mood": {"data": data["mood"]}, "size": {"data": data["size"]}},
    }
    folder, asked = study(said)
    assert len(asked) == 12
    means, _ = results(folder)
    backward = {}
    for weight in (0.0, 1e6):
        found = {
            (r["stage"], r["test"], r["metric"]): r["mean"] for r in means if list(r["compare"].values()) == [weight]
        }
        matrix = [[found[i, j, "loss"] for j in ("mood", "size")] for i in ("mood", "size")]
        for i, j in (("mood", "mood"), ("mood", "size"), ("size", "mood"), ("size", "size")):
            place = folder / f"trainer.callbacks.weight={weight}" / f"{i}.{j}" / "metrics.json"
            assert json.loads(place.read_text())["test"]["test/loss"] == found[i, j, "loss"]
        assert found["size", "average", "loss"] == pytest.approx((matrix[1][0] + matrix[1][1]) / 2)
        backward[weight] = found["size", "backward transfer", "loss"]
        assert backward[weight] == pytest.approx(matrix[1][0] - matrix[0][0])
        assert backward[weight] == transfer(matrix)[1]
    assert backward[0.0] > 0.05  # the loss rises: it forgets
    assert backward[1e6] < 0.5 * backward[0.0]


def chain(common, data):
    """MPT's stages, small."""
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


def left(folder):
    """What the stages left, but for times."""
    prompts = {stage: tensors(folder / "all" / stage) for stage in ("teacher_mood", "teacher_size", "source", "target")}
    last = torch.load(folder / "all" / "target" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    scores = json.loads((folder / "all" / "target.test" / "metrics.json").read_text())["test"]
    return prompts, last, scores


def same(one, other):
    (prompts, last, scores), (prompts_2, last_2, scores_2) = one, other
    for stage in prompts:
        assert all(torch.equal(prompts[stage][name], prompts_2[stage][name]) for name in prompts[stage]), stage
    assert all(torch.equal(last[name], last_2[name]) for name in last)
    assert scores == scores_2


def test_a_chain_of_stages_that_is_killed_anywhere_ends_as_if_it_had_not_been(study, common, data, tmp_path):
    """SIGKILL, again and again, as files get their names and halfway through writing them."""
    said = chain(common, data)
    whole, _ = study(said, name="whole")
    path = tmp_path / "killed.yaml"
    path.write_text(yaml.safe_dump(said, sort_keys=False))
    places = ("before a file has its name", "within a checkpoint", "after a file has its name", "within metrics.json")
    for kills in count():
        kill = Kill(places[kills % len(places)], 1 + 4 * kills % 7)
        (code,) = ended([start(["study", str(path)], tmp_path / "told.txt", kill)])
        if code == 0:
            break
        assert code == -signal.SIGKILL, (tmp_path / "told.txt").read_text()
    assert kills >= 12
    same(left(whole), left(tmp_path / "studies" / "killed"))


class Killed(BaseException):
    """What a process is spared that is killed: nothing after it runs."""


@pytest.mark.parametrize("at", range(1, 9))
def test_a_run_that_stops_between_any_two_saves_ends_as_if_it_had_not(study, common, data, monkeypatch, at):
    """Every save of a checkpoint in turn is the last thing that happens."""
    from lightning.pytorch import Trainer

    said = {"common": {**common, "data": data["mood"], "model.prompt_dropout": 0.1}}
    whole, _ = study(said, name="whole")
    saved = Trainer.save_checkpoint
    left = iter(range(at - 1, -1, -1))

    def save(self, *args, **kwargs):
        saved(self, *args, **kwargs)
        if next(left, 1) == 0:
            raise Killed

    monkeypatch.setattr(Trainer, "save_checkpoint", save)
    try:
        study(said)
    except Killed:
        monkeypatch.setattr(Trainer, "save_checkpoint", saved)
        study(said)
    one, other = whole / "all", whole.parent / "study" / "all"
    assert torch.equal(tensors(one / "run")["tokens"], tensors(other / "run")["tokens"])
    scores = [json.loads((folder / "run.test" / "metrics.json").read_text())["test"] for folder in (one, other)]
    assert scores[0] == scores[1]
    bests = [json.loads((folder / "run" / "metrics.json").read_text())["best"] for folder in (one, other)]
    assert bests[0] == bests[1]


MISTAKES = {
    "no such part": ({"stage": {}}, r"must be a mapping with some of"),
    "a later stage": ({"stages": {"a": {"init_from": "${b}/x"}, "b": {}}}, r"asks for \['b'\], .* before it are \[\]"),
    "a name with a slash": ({"stages": {"a/b": {}}}, "names of stages and tests"),
    "one value": ({"repeat": {"data.seed": 3}}, r"values by option, as in \{data\.seed: \[1, 2\]\}"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_the_file_are_told(tmp_path, mistake):
    said, named = MISTAKES[mistake]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises(ValueError, match=named):
        read_study(tmp_path / "study.yaml")


def test_options_that_are_none_and_files_that_are_not_there_are_told(tmp_path, capsys):
    (tmp_path / "study.yaml").write_text("common: {}\n")
    assert main(["study", str(tmp_path / "study.yaml"), "--model"]) == 2
    assert "like --model MPT" in capsys.readouterr().err
    assert main(["study", str(tmp_path / "none.yaml")]) == 2
    assert "no file " in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((CONFIGS / "study").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_that_ships_can_be_made(path, tiny_folder, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    assert path.read_text().startswith("# ")
    given = ["--backbone.name", str(tiny_folder("llama"))]
    if path.stem == "few_shot":
        given += ["--model", "PromptTuning", "--data", "configs/data/sst2.yaml"]
    if path.stem == "rag":
        given += ["--data", "configs/data/squad.yaml"]
    study = read_study(path, options=given)
    assert len(study.steps) == len(study.variants) * (len(study.stages) + sum(map(len, study.tests_of.values())))
    for step in {(step.command, step.name): step for step in study.steps}.values():
        words = [PLACE.sub(lambda found: found[1], word) for word in step.words]
        made = make_cli([word for word in words if not word.startswith("--init_from")], run=False)
        assert made.model.spec == made.datamodule.spec


def test_two_processes_do_not_run_one_study(study, common, data, capsys):
    import fcntl

    said = {"common": {**common, "data": data["mood"]}}
    folder = Path("studies/study")
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        study(said, code=2)
    assert "another process runs the study" in capsys.readouterr().err
