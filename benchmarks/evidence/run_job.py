"""Runs one job of the queue: `softprompt fit` and `softprompt test`. Called by `run_queue.py`."""

from __future__ import annotations

import argparse
import csv
import json
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plan import Job

from lightning_softprompt.cli.app import main as run_command
from lightning_softprompt.reports.prediction_file import PREDICTIONS, read_predictions
from lightning_softprompt.reports.run_table import Score, row_scores
from lightning_softprompt.runs.run_spec import last_folder
from lightning_softprompt.system.atomic_files import write_file

DIGITS = 5  # of the scores of rows


def main() -> None:
    """Runs the commands and writes `result.json` to the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="folder of the run and its result")
    parser.add_argument("data", help="folder of all data sets")
    parser.add_argument("device", choices=["cpu", "cuda"])
    parser.add_argument("job", help="the job as JSON")
    args = parser.parse_args()
    folder, data, device = args.folder, args.data, args.device
    job = Job(**json.loads(args.job))
    result: dict[str, Any] = {}
    checkpoint = None
    if job.rate is not None:
        report, checkpoint = train(job, folder, data, device)
        result = {
            "validation": report["best"]["value"],
            "best_step": report["best"]["global_step"],
            "train_loss": report.get("train", {}).get("train/loss"),
            "trainable_parameters": report["trainable_parameters"],
            "train_seconds": report["seconds"],
            "curve": read_curve(last_folder() / "metrics.csv", job.metric),
        }
    if not job.selects_rate:
        result |= test(job, folder, data, device, checkpoint)
    result["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    write_file(Path(folder) / "result.json", json.dumps(result).encode())


def to_arguments(job: Job, folder: str, data: str, device: str) -> list[str]:
    """Returns the options that all commands of the job share."""
    options = {
        **job.options,
        "data.path": str(Path(data, job.path)),
        "run.folder": folder,
        "run.experiment": "job",
        "run.wandb": "disabled",
        "trainer.accelerator": "cpu" if device == "cpu" else "gpu",
        "trainer.devices": 1,
        "trainer.enable_progress_bar": "false",
    }
    if device == "cuda":
        options |= {"backbone.dtype": "bfloat16", "trainer.precision": "bf16-mixed"}
    return [f"--{name}={value}" for name, value in options.items()]


def train(job: Job, folder: str, data: str, device: str) -> tuple[Mapping[str, Any], Path]:
    """Trains, or resumes an interrupted training, and returns the report and the best checkpoint."""
    run(["fit", *to_arguments(job, folder, data, device), "--run.name=train", "--ckpt_path=last"])
    report = json.loads((last_folder() / "metrics.json").read_text())
    return report, last_folder() / "checkpoints" / "best.ckpt"


def test(job: Job, folder: str, data: str, device: str, checkpoint: Path | None) -> dict[str, Any]:
    """Tests, and returns the metrics and the score of each row."""
    source = [] if checkpoint is None else [f"--ckpt_path={checkpoint}"]
    run(["test", *to_arguments(job, folder, data, device), *source])
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
                    curve.setdefault(name, []).append([int(row["step"]), float(f"{float(row[name]):.5g}")])
    return curve


def run(arguments: Sequence[str]) -> None:
    """Runs a command.

    Raises:
        SystemExit: If it fails.
    """
    code = run_command(list(arguments))
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
