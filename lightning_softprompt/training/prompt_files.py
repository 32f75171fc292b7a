"""The files of a trained prompt in the folder of its run: the prompt and its model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from lightning_softprompt import __version__
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, write_prompt
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.evaluation.metrics.intervals import share_interval
from lightning_softprompt.reports.model_card import model_card
from lightning_softprompt.system.atomic_files import write_file

SHARES = ("accuracy", "exact_match")  # metrics that are the share of rows with some property
SOURCE = ("path", "train", "validation", "tasks")  # arguments that describe which rows a data module reads


def write_prompt_files(prompt: SavedPrompt, path: Path, config_file: Path, validation_rows: int | None) -> None:
    """Write a prompt, and a Markdown file of the same name that describes it.

    Args:
        prompt: The prompt.
        path: The file, in the folder of the run.
        config_file: The config of the run.
        validation_rows: The number of rows that each validation scores, if it is known.
    """
    metrics = path.with_name("metrics.json")
    report = json.loads(metrics.read_text()) if metrics.is_file() else {}
    data = yaml.safe_load(config_file.read_text()).get("data") or {}
    training = {
        **prompt.training,
        "version": __version__,
        "data": {**_describe_data(data), **prompt.training.get("data", {})},
        "metrics": _with_intervals(prompt.training.get("metrics", {}), validation_rows),
        "parameters": {name: report.get(f"{name}_parameters", 0) for name in ("trainable", "frozen")},
    }
    complete = replace(prompt, training=training)
    write_prompt(path, complete)
    card = model_card(path.name, complete.backbone, complete.method, complete.rows, training)
    write_file(path.with_suffix(".md"), card.encode())


def _describe_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the class of a data module and the arguments that describe its source; of several tasks, their names."""
    arguments = data.get("init_args") or {}
    source = {name: arguments[name] for name in SOURCE if arguments.get(name) is not None}
    if isinstance(source.get("tasks"), Mapping):
        source["tasks"] = list(source["tasks"])
    return {"class_path": data.get("class_path"), **source}


def _with_intervals(metrics: Mapping[str, Any], rows: int | None) -> dict[str, Any]:
    """Adds the 95 % interval to metrics that are the share of a known number of rows."""
    with_intervals: dict[str, Any] = {}
    for name, values in metrics.items():
        with_intervals[name] = values
        if rows and name.rpartition("/")[2] in SHARES:
            low, high = share_interval(values["value"], rows)
            with_intervals[name] = {**values, "low": low, "high": high, "rows": rows}
    return with_intervals


def count_validation_rows(data: SoftPromptDataModule, limit: int | float | None) -> int | None:
    """The number of rows that each validation scores, if all of them are scored and belong to one task.

    Args:
        data: The data module.
        limit: The Trainer's `limit_val_batches`.
    """
    if data.classes_by_task is not None or limit != 1.0:
        return None
    return len(data.split("validation"))
