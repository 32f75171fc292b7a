"""The queue of experiments: a killed queue continues without a lost or doubled result."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "evidence"))
import run_queue
import tables
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


def list_jobs(tmp_path, experiments):
    return start(tmp_path, experiments, "--list").communicate(timeout=60)[0].split()


def test_a_killed_queue_continues_without_a_lost_or_doubled_result(tmp_path, experiments):
    results = tmp_path / "results.jsonl"
    queue = start(tmp_path, experiments)
    while not list((tmp_path / "work").glob("*/job/train/checkpoints/last.ckpt")):
        assert queue.poll() is None
        time.sleep(0.05)
    os.killpg(queue.pid, signal.SIGKILL)
    queue.communicate()
    with results.open("a") as file:
        file.write('{"key": "incompl')  # as after a power failure
    output, _ = start(tmp_path, experiments).communicate(timeout=200)
    assert "all experiments have results" in output
    first, second, tested = run_queue.read_results(results)
    assert [first["rate"], second["rate"], tested["seed"]] == [*RATES, 1]
    assert tested["rate"] == max((first, second), key=lambda result: result["validation"])["rate"]
    assert "test" not in first
    assert tested["test"] == sum(tested["row_scores"]) / 16
    assert tested["trainable_parameters"] > 0
    assert not list((tmp_path / "work").iterdir())
    assert "all experiments have results" in start(tmp_path, experiments).communicate(timeout=60)[0]
    assert len(run_queue.read_results(results)) == 3


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


def test_tables_name_pairs_that_differ_and_pairs_that_do_not():
    def results(method, scores):
        common = {"block": "b", "task": "t", "backbone": "m", "metric": "accuracy", "mode": "max", "peak_mb": 9}
        common |= {"steps": 5, "rate": 0.1, "selects_rate": False, "train_seconds": 60.0, "trainable_parameters": 1200}
        return [
            {**common, "method": method, "seed": seed, "test": sum(scores) / len(scores), "row_scores": scores}
            for seed in (1, 2)
        ]

    low, high = [0.0] * 30 + [1.0] * 10, [1.0] * 40
    rows = [*results("weak", low), *results("strong", high), *results("also strong", high)]
    text = "\n".join(tables.page(rows))
    assert "| strong | 2 | 1.000 ± 0.000 | 0.1 | 1,200 | 1.0 | 9 |" in text
    assert "| strong over weak | 0.750 |" in text
    assert "| also strong over weak | 0.750 |" in text
    assert "No difference is shown between strong and also strong." in text
