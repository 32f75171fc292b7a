"""The queue of experiments: a killed queue continues without a lost or doubled result."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "evidence"))
import run_job
import run_queue
from plan import Plan

RATES = [0.1, 0.01]


@pytest.fixture
def experiments(tmp_path, tiny_folder):
    """Experiments on a tiny backbone, with their data."""
    rows = [{"text": text, "label": label} for text, label in (("a funny dog", "good"), ("a sad dog", "dull")) * 8]
    folder = tmp_path / "data" / "rows"
    folder.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = {"data": "ClassificationDataModule", "data.template": "{soft}{text} {target}"}
    config = {
        "settings": {"steps": 6, "rate_steps": 6, "validate_every": 2, "options": {"data.batch_size": 4}},
        "methods": {"tuning": {"model": "PromptTuning", "options": {"model.length": 2}, "rates": RATES}},
        "tasks": {"rows": {"metric": "accuracy", "mode": "max", "path": "rows", "options": data}},
        "backbones": {"tiny": {"backbone.name": str(tiny_folder("llama"))}},
        "blocks": [{"name": "all", "methods": ["tuning"], "tasks": ["rows"], "backbones": ["tiny"], "seeds": [1]}],
    }
    path = tmp_path / "experiments.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(tmp_path, experiments, *options):
    words = [
        f"--data={tmp_path / 'data'}",
        f"--experiments={experiments}",
        f"--results={tmp_path / 'results.jsonl'}",
        f"--work={tmp_path / 'work'}",
    ]
    command = [sys.executable, run_queue.__file__, *words, *options]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True)


def wait_for_file(queue, folder, pattern):
    """Waits until a file or folder matches a pattern; the queue must run until then."""
    while not list(folder.glob(pattern)):
        assert queue.poll() is None
        time.sleep(0.02)


def list_jobs(tmp_path, experiments):
    return start(tmp_path, experiments, "--list").communicate(timeout=60)[0].split()


def test_a_killed_queue_continues_without_a_lost_or_doubled_result(tmp_path, experiments):
    results = tmp_path / "results.jsonl"
    queue = start(tmp_path, experiments)
    wait_for_file(queue, tmp_path / "work", "*/job/train/checkpoints/last.ckpt")
    os.killpg(queue.pid, signal.SIGKILL)
    queue.communicate()
    with results.open("a") as file:
        file.write('{"key": "incompl')  # as after a power failure
    output, _ = start(tmp_path, experiments).communicate(timeout=200)
    assert "all experiments have results" in output
    check_results(tmp_path, results)
    assert run_queue.read_results(results)[0]["resumed"]
    assert "all experiments have results" in start(tmp_path, experiments).communicate(timeout=60)[0]
    assert len(run_queue.read_results(results)) == 3


def check_results(tmp_path, results):
    first, second, tested = run_queue.read_results(results)
    assert [first["rate"], second["rate"], tested["seed"]] == [*RATES, 1]
    assert tested["rate"] == max((first, second), key=lambda result: result["validation"])["rate"]
    assert "test" not in first
    assert tested["test"] == sum(tested["row_scores"]) / 16
    assert tested["trainable_parameters"] > 0
    assert not list((tmp_path / "work").iterdir())
    for result in (first, second, tested):
        assert result["cpu"]
        assert result["commit"]
        assert result["options"]["model.length"] == 2
        assert result["cpu_seconds"] > 0
    assert {"rate-0.1", "rate-0.01", "seed-1"} == {result["key"].split("_")[-2] for result in (first, second, tested)}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the job keeps the lock until it ends")
def test_a_job_ends_with_a_queue_that_is_killed_alone(tmp_path, experiments):
    """Kills the queue, not its process group: no job may write to the folder that the next queue resumes."""
    results = tmp_path / "results.jsonl"
    queue = start(tmp_path, experiments)
    wait_for_file(queue, tmp_path / "work", "*/job/train")
    os.kill(queue.pid, signal.SIGKILL)
    queue.communicate()
    with run_queue.lock(results, patience=20):  # the job has inherited the lock
        assert run_queue.read_results(results) == []
        assert not list((tmp_path / "work").glob("*/result.json"))


def test_a_result_that_was_not_appended_is_not_measured_again(tmp_path, experiments):
    results = tmp_path / "results.jsonl"
    for job in Plan(experiments).jobs([]):
        folder = tmp_path / "work" / job.key
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"validation": job.rate}))
    done = [job.key for job in Plan(experiments).jobs([])]
    finished = {"key": done[0], "validation": RATES[0]}  # as if killed between the result and the removal of its folder
    run_queue.append(results, finished)
    output, _ = start(tmp_path, experiments, "--minutes=0").communicate(timeout=60)
    assert "the time is over" in output
    args = argparse.Namespace(
        experiments=experiments, results=results, work=tmp_path / "work", data=tmp_path / "data", device="cpu",
        threads=1, models=tmp_path,
    )  # fmt: skip
    assert run_queue.run_job(run_queue.open_jobs(experiments, results)[0], args, 0)["validation"] == RATES[1]
    run_queue.remove_finished(results, args.work)
    assert [path.name for path in args.work.iterdir()] == [done[1]]


def test_a_job_that_fails_does_not_stop_the_queue(tmp_path, experiments, monkeypatch, capsys):
    config = yaml.safe_load(experiments.read_text())
    config["methods"]["broken"] = {"model": "PromptTuning", "rates": [0.1, 0.2]}
    config["blocks"][0]["methods"] = ["broken", "tuning"]
    experiments.write_text(yaml.safe_dump(config))

    def run_job(job, args, lock_descriptor):
        return None if job.method == "broken" else {"key": job.key, "validation": job.rate}

    monkeypatch.setattr(run_queue, "run_job", run_job)
    words = [f"--experiments={experiments}", f"--results={tmp_path / 'r.jsonl'}", f"--work={tmp_path / 'work'}"]
    monkeypatch.setattr(sys, "argv", ["run_queue.py", *words])
    with pytest.raises(SystemExit, match="2 jobs failed"):
        run_queue.main()
    assert capsys.readouterr().out.count("failed; see ") == 2
    assert len(run_queue.read_results(tmp_path / "r.jsonl")) == 3


def test_a_command_that_fails_gives_no_result(tmp_path, experiments):
    job = next(Plan(experiments).jobs([]))
    broken = replace(job, options={**job.options, "model.length": -1})
    folders = {"work": tmp_path / "work", "data": tmp_path / "data", "models": tmp_path}
    args = argparse.Namespace(**folders, device="cpu", threads=1)
    with run_queue.lock(tmp_path / "results.jsonl") as descriptor:
        assert run_queue.run_job(broken, args, descriptor) is None
    assert "length" in (args.work / broken.key / "log.txt").read_text()


def test_results_of_another_machine_are_added_once(tmp_path):
    here, other = tmp_path / "results.jsonl", tmp_path / "other.jsonl"
    here.write_text('{"key": "a"}\n')
    other.write_text('{"key": "a"}\n{"key": "b"}\n{"key": "b"}\n{"key": "incompl')
    assert run_queue.merge(here, other) == 1
    assert run_queue.read_results(here) == [{"key": "a"}, {"key": "b"}]


def test_a_block_that_names_no_source_of_its_rates_is_refused(experiments):
    config = yaml.safe_load(experiments.read_text())
    config["blocks"].append({**config["blocks"][0], "name": "second", "rates_of": ["all"], "backbones": ["other"]})
    experiments.write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="none of \\['all'\\] selects the learning rate of 'tuning'"):
        Plan(experiments)


def test_each_run_of_the_committed_experiments_gets_a_job():
    plan = Plan(Path(run_queue.HERE, "experiments.yaml"))
    results = {}
    while new := [job for job in plan.jobs(list(results.values())) if job.key not in results]:
        results |= {job.key: {"key": job.key, "validation": 0.5, "job": job} for job in new}
    tested = [result["job"] for result in results.values() if not result["job"].selects_rate]
    for name in plan.blocks:
        cells = [(cell.task, cell.backbone, cell.method, cell.seed) for cell in plan.cells(name)]
        jobs = [(job.task, job.backbone, job.method, job.seed) for job in tested if job.block == name]
        assert sorted(jobs) == sorted(cells)
        assert len(set(cells)) == len(cells)


def test_jobs_are_listed_while_a_queue_runs(tmp_path, experiments):
    candidates = [job.key for job in Plan(experiments).jobs([])]
    with run_queue.lock(tmp_path / "results.jsonl"):
        assert list_jobs(tmp_path, experiments) == candidates


def test_a_second_queue_is_refused(tmp_path):
    with run_queue.lock(tmp_path / "results.jsonl"), pytest.raises(SystemExit, match="another queue writes"):
        run_queue.lock(tmp_path / "results.jsonl").__enter__()


def test_the_rate_is_selected_by_validation_and_other_settings_are_other_jobs(experiments):
    plan = Plan(experiments)
    candidates = list(plan.jobs([]))
    assert [job.rate for job in candidates] == RATES
    results = [{"key": job.key, "validation": score} for job, score in zip(candidates, (0.5, 0.75), strict=True)]
    *_, selected = plan.jobs(results)
    assert (selected.rate, selected.seed, selected.selects_rate) == (0.01, 1, False)
    config = yaml.safe_load(experiments.read_text())
    config["settings"]["rate_steps"] = 7
    experiments.write_text(yaml.safe_dump(config))
    assert {job.key for job in Plan(experiments).jobs([])}.isdisjoint({job.key for job in candidates})


def test_jobs_of_a_model_that_is_not_there_are_skipped(tmp_path, experiments, monkeypatch, capsys):
    config = yaml.safe_load(experiments.read_text())
    config["backbones"]["absent"] = {"backbone.name": "{models}/absent"}
    config["blocks"][0]["backbones"] = ["absent", "tiny"]
    experiments.write_text(yaml.safe_dump(config))

    def run_job(job, args, lock_descriptor):
        return {"key": job.key, "validation": job.rate, "backbone": job.backbone}

    monkeypatch.setattr(run_queue, "run_job", run_job)
    words = [f"--experiments={experiments}", f"--results={tmp_path / 'r.jsonl'}", f"--work={tmp_path / 'work'}"]
    monkeypatch.setattr(sys, "argv", ["run_queue.py", *words, f"--models={tmp_path}"])
    run_queue.main()
    output = capsys.readouterr().out
    assert output.count(f"skipped: there is no {tmp_path / 'absent'}") == 1
    assert "all experiments have results" not in output
    assert [result["backbone"] for result in run_queue.read_results(tmp_path / "r.jsonl")] == ["tiny"] * 3


def test_an_archive_runs_the_queue_on_another_machine(tmp_path, experiments):
    """Packs code, data and experiments, unpacks them elsewhere, and lists the jobs there."""
    archive = tmp_path / "evidence.tar.gz"
    words = [f"--data={tmp_path / 'data'}", f"--experiments={experiments}", f"--out={archive}"]
    folder = Path(run_queue.HERE)
    subprocess.run([sys.executable, folder / "pack.py", *words], check=True, timeout=120)
    elsewhere = tmp_path / "elsewhere"
    with tarfile.open(archive) as file:
        file.extractall(elsewhere, filter="data")
    assert (elsewhere / "evidence" / "data" / "rows" / "train.jsonl").is_file()
    command = ["sh", elsewhere / "evidence" / "run.sh", "--list", "--experiments", experiments]
    environment = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.split() == [job.key for job in Plan(experiments).jobs([])]


def test_options_of_a_gpu_are_bfloat16_except_for_trained_weights(experiments):
    job = next(Plan(experiments).jobs([]))
    folders = [Path("run"), Path("data"), Path("models")]
    assert "--trainer.accelerator=cpu" in run_job.to_arguments(job, *folders, "cpu")
    arguments = run_job.to_arguments(job, *folders, "cuda")
    assert {"--trainer.accelerator=gpu", "--backbone.dtype=bfloat16", "--trainer.precision=bf16-mixed"} <= set(
        arguments
    )
    tuned = replace(job, options={**job.options, "model": "FullFineTuning"})
    assert "--backbone.dtype=float32" in run_job.to_arguments(tuned, *folders, "cuda")


def test_options_name_folders_and_quote_templates(experiments):
    job = next(Plan(experiments).jobs([]))
    options = {"data.path": "{shared}/sets/x", "data.corpus": "{data}/y", "data.template": "Text: {text}\n{target}"}
    changed = replace(job, options={**job.options, **options})
    arguments = run_job.to_arguments(changed, Path("work/run"), Path("all"), Path("models"), "cpu")
    assert {"--data.path=work/shared/sets/x", "--data.corpus=all/y"} <= set(arguments)
    template = next(word for word in arguments if word.startswith("--data.template="))
    assert yaml.safe_load(template.partition("=")[2]) == options["data.template"]
    names = [word.partition("=")[0] for word in arguments]
    assert names.index("--data") < names.index("--data.path")
    plain = run_job.to_arguments(job, Path("work/run"), Path("all"), Path("models"), "cpu")
    assert "--data.path=all/rows" in plain
