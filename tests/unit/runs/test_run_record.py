"""`--ckpt_path last` finds the run that was started last, independent of file times and copies."""

import os
import shutil

import pytest
import torch

from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.runs.run_record import LAST, note_evaluation, note_start, read_record
from lightning_softprompt.runs.run_spec import RunSpec, new_name, refuse_used
from lightning_softprompt.system.atomic_files import expand_home, expand_home_in


@pytest.fixture
def start(tmp_path):
    """A function that starts or resumes a run and writes a checkpoint."""

    def start(name, steps=1):
        folder = tmp_path / "e" / name
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        note_start(folder)
        torch.save({"global_step": steps}, folder / LAST)
        return folder

    return start


@pytest.fixture
def last(tmp_path):
    """A function that returns the name of the folder that `last` selects."""

    def last(name=None):
        checkpoint = RunSpec(folder=str(tmp_path), experiment="e", name=name).last_checkpoint()
        return None if checkpoint is None else checkpoint.parents[1].name

    return last


def test_last_is_the_last_started_or_resumed_run_with_a_checkpoint(start, last, tmp_path):
    assert last() is None
    start("one", steps=9)
    start("two")
    assert last() == "two"
    assert last("one") == "one"
    assert last("three") is None
    start("one", steps=10)
    assert last() == "one"
    (tmp_path / "e" / "three").mkdir()
    note_start(tmp_path / "e" / "three")
    assert last() == "one"


def test_times_of_files_do_not_matter(start, last):
    start("old")
    new = start("new")
    for path in [new, *new.rglob("*")]:
        os.utime(path, (0, 0))
    assert last() == "new"


def test_a_copy_is_last_only_after_it_is_resumed(start, last, tmp_path):
    old = start("old", steps=9)
    start("new")
    shutil.copytree(old, tmp_path / "e" / "copy")
    assert last() == "new"
    shutil.copytree(tmp_path / "e" / "new", tmp_path / "e" / "a copy of the new")
    assert last() == "new"
    start("a copy of the new", steps=2)
    assert last() == "a copy of the new"


def test_the_copy_with_more_steps_is_last(start, last, tmp_path):
    shutil.copytree(start("new"), tmp_path / "e" / "copy")
    torch.save({"global_step": 2}, tmp_path / "e" / "copy" / LAST)
    assert last() == "copy"


def test_several_runs_of_earlier_versions_are_listed_in_the_error(start, last):
    for name in ("one", "two"):
        (start(name, steps=3) / "run.json").unlink()
    with pytest.raises(ValueError, match=r"one/checkpoints/last.ckpt \(step 3, .*two/checkpoints.* --run.name"):
        last()
    assert last("two") == "two"
    start("three")
    assert last() == "three"


def test_a_run_does_not_train_in_the_folder_of_another(start):
    used = start("one")
    refuse_used(used, used / "checkpoints" / "last-1.ckpt")
    refuse_used(used.parent / "free", None)
    for resumed in (None, used.parent / "other" / LAST):
        with pytest.raises(ValueError, match=r"--ckpt_path last --run\.name one"):
            refuse_used(used, resumed)


@pytest.mark.parametrize(
    "environment", [{"LOCAL_RANK": "0"}, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "LOCAL_RANK": "0"}]
)
def test_two_runs_of_one_process_have_different_folders(tmp_path, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    spec = RunSpec(folder=str(tmp_path))
    first, second = spec.name_folder(training=True), spec.name_folder(training=True)
    assert first != second


def test_a_child_process_uses_the_folder_of_its_parent(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("SOFTPROMPT_RUN_FOLDER", str(tmp_path / "parent"))
    monkeypatch.setenv("SOFTPROMPT_RUN_PROCESS", "1")
    assert RunSpec(folder=str(tmp_path)).name_folder(training=True) == tmp_path / "parent"


def test_the_runs_of_a_job_have_different_names(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert [new_name(), new_name()] == ["slurm-8-0-0", "slurm-8-0-0-2"]


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    spec = RunSpec(folder="~/runs", predictions="~/rows.jsonl")
    assert (spec.folder, spec.predictions) == (f"{tmp_path}/runs", f"{tmp_path}/rows.jsonl")
    assert BackboneSpec(name="~/model").name == f"{tmp_path}/model"
    words = ["test", "--ckpt_path=~/a.ckpt", "--init_from", "~/b.ckpt", "--data.template={text} ~/c"]
    assert expand_home(words) == [
        "test", f"--ckpt_path={tmp_path}/a.ckpt", "--init_from", f"{tmp_path}/b.ckpt", "--data.template={text} ~/c"
    ]  # fmt: skip


def test_a_tilde_in_nested_options_is_the_home_folder_but_not_in_text(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = {"init_args": {"path": "~/a b.ckpt", "paths": ["~", "x~/y"]}, "template": "~/{text} {target}"}
    assert expand_home_in(options) == {
        "init_args": {"path": f"{tmp_path}/a b.ckpt", "paths": [str(tmp_path), "x~/y"]},
        "template": "~/{text} {target}",
    }


@pytest.mark.parametrize("options", [{"name": ".."}, {"name": "a/b"}, {"name": "/a"}, {"experiment": "../a"}])
def test_a_run_folder_outside_of_its_experiment_is_rejected(options):
    with pytest.raises(ValueError, match=r"must be the name of a folder|must be inside run\.folder"):
        RunSpec(**options)


@pytest.mark.parametrize("content", [
    "[" * 10**5, "[]", "{}", '{"id": "a", "name": "b", "order": 1e999, "started": "x"}', "\x1b[2J",
    '{"id": "a", "name": "b", "order": [1], "started": "x"}',
], ids=["nested", "list", "empty", "infinite", "control", "type"])  # fmt: skip
def test_a_forged_record_is_ignored(start, last, content):
    (start("forged") / "run.json").write_text(content)
    start("run")
    assert last() == "run"


def test_a_record_names_the_checkpoint_that_a_run_started_from(tmp_path):
    training, test, resumed = (tmp_path / "e" / name for name in ("training", "test", "resumed"))
    for folder in (training, test, resumed):
        folder.mkdir(parents=True)
    prompt = tmp_path / "prompt.safetensors"
    note_start(training, source=prompt)
    assert read_record(training).source == "../../prompt.safetensors"
    note_start(training, source=training / LAST)  # it resumes
    note_evaluation(training, source=training / LAST)
    assert read_record(training).source == "../../prompt.safetensors"
    note_evaluation(test, source=training / LAST)
    note_start(resumed, source=training / LAST)
    assert read_record(test).source == read_record(resumed).source == f"../training/{LAST}"
