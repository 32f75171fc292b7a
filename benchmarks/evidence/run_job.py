"""Runs one job of the queue: `softprompt fit` and `softprompt test`. Called by `run_queue.py`."""

from __future__ import annotations

import argparse
import csv
import json
import resource
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from measures import MEASURES, Run, run
from plan import Job
from question_sets import write_question_sets

from lightning_softprompt.reports.prediction_file import PREDICTIONS, read_predictions
from lightning_softprompt.reports.run_table import Score, row_scores
from lightning_softprompt.runs.run_spec import last_folder
from lightning_softprompt.system.atomic_files import write_file

SETS = "{shared}/sets"  # in options: sets of questions that are derived from others
DIGITS = 5  # of the scores of rows


def main() -> None:
    """Runs the commands and writes `result.json` to the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="folder of the run and its result")
    parser.add_argument("data", help="folder of all data sets")
    parser.add_argument("models", help="folder of models that are not packages")
    parser.add_argument("device", choices=["cpu", "cuda"])
    parser.add_argument("job", help="the job as JSON")
    parser.add_argument("machine", help="the description of the machine and the code as JSON")
    args = parser.parse_args()
    started = time.monotonic()
    job = Job(**json.loads(args.job))
    folder = Path(args.folder)
    if SETS in json.dumps(job.options):
        write_question_sets(Path(args.data), folder.parent / "shared" / "sets")
    arguments = to_arguments(job, folder, Path(args.data), Path(args.models), args.device)
    is_resumed = (folder / "job").is_dir()
    trains, checkpoint = "trainer.max_steps" in job.options, None
    result: dict[str, Any] = {}
    if trains:
        result, checkpoint = train(job, arguments)
    elif job.selects_rate:
        result = {"validation": validate(job, arguments)}
    if not job.selects_rate:
        source = [] if checkpoint is None else [f"--ckpt_path={checkpoint}"]
        result |= test(job, [*arguments, *source])
        finished = Run(job, arguments, checkpoint, Path(args.data), folder, last_folder())
        for name in job.measures:
            result |= MEASURES[name](finished)
    result |= json.loads(args.machine)
    result |= describe_cost(started) | {"resumed": is_resumed, "finished": f"{datetime.now(UTC):%F %T}"}
    write_file(folder / "result.json", json.dumps(result).encode())


def describe_cost(started: float) -> dict[str, float]:
    """Returns time and memory of this process, which has resumed the job if an earlier one was interrupted."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "wall_seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss / 1024),
    }


def to_arguments(job: Job, folder: Path, data: Path, models: Path, device: str) -> list[str]:
    """Returns the options that all commands of the job share.

    In options, `{data}` is the folder of all data sets, `{models}` that of models, and `{shared}` a folder that jobs
    share, such as for indexes.
    """
    options = {
        **job.options,
        "data.path": job.options.get("data.path", str(data / job.path)),
        "run.folder": str(folder),
        "run.experiment": "job",
        "run.wandb": "disabled",
        "trainer.accelerator": "cpu" if device == "cpu" else "gpu",
        "trainer.devices": 1,
        "trainer.enable_progress_bar": "false",
    }
    if device == "cuda":  # full fine-tuning needs float32 weights: in bfloat16 its small updates would be rounded away
        trains_weights = job.options["model"] == "FullFineTuning"
        options |= {"backbone.dtype": "float32" if trains_weights else "bfloat16", "trainer.precision": "bf16-mixed"}
    places = {"{data}": str(data), "{models}": str(models), "{shared}": str(folder.parent / "shared")}
    arguments = []
    for name, value in options.items():
        text = str(value)
        if name.endswith(".template"):
            text = json.dumps(value)  # quoted, because YAML reads `Review: {text}` as a mapping
        for placeholder, path in places.items():
            text = text.replace(placeholder, path)
        arguments.append(f"--{name}={text}")
    return arguments


def train(job: Job, arguments: Sequence[str]) -> tuple[dict[str, Any], Path]:
    """Trains, or resumes an interrupted training, and returns the results and the best checkpoint."""
    run(["fit", *arguments, "--run.name=train", "--ckpt_path=last"])
    folder = last_folder()
    report = json.loads((folder / "metrics.json").read_text())
    result = {
        "validation": report["best"]["value"],
        "best_step": report["best"]["global_step"],
        "train_loss": report.get("train", {}).get("train/loss"),
        "trainable_parameters": report["trainable_parameters"],
        "train_seconds": report["seconds"],
        "train_peak_mb": describe_cost(0.0)["peak_mb"],
        "curve": read_curve(folder / "metrics.csv", job.metric),
    }
    return result, folder / "checkpoints" / "best.ckpt"


def validate(job: Job, arguments: Sequence[str]) -> float:
    """Validates without training, and returns the metric."""
    run(["validate", *arguments])
    metrics = json.loads((last_folder() / "metrics.json").read_text())["val"]
    return float(metrics[f"val/{job.metric}"])


def test(job: Job, arguments: Sequence[str]) -> dict[str, Any]:
    """Tests, and returns the metrics and the score of each row."""
    run(["test", *arguments])
    metrics = json.loads((last_folder() / "metrics.json").read_text())["test"]
    metric = job.test_metric or job.metric
    value = metrics[f"test/{metric}"]
    records = read_predictions(last_folder() / PREDICTIONS)
    scores = [round(score, DIGITS) for score in row_scores(records, Score(metric, value))]
    return {"test": value, "test_metrics": metrics, "row_scores": scores}


def read_curve(path: Path, metric: str) -> dict[str, list[list[float]]]:
    """Returns steps and values of the losses, the gradient norm and the validation metric, by name."""
    names = ["train/loss", "prompt/grad_norm"]
    names += [f"{stage}/{name}" for stage in ("val", "train_sample") for name in ("loss", metric)]
    curve: dict[str, list[list[float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name in names:
                if row.get(name):
                    value = float(f"{float(row[name]):.5g}")
                    curve.setdefault(name, []).append([int(row["step"]), value])
    return curve


if __name__ == "__main__":
    main()
