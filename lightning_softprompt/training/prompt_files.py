"""The files of a trained prompt in the folder of its run: the prompt and its model card."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from lightning_softprompt import __version__
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, write_prompt
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.reports.model_card import model_card
from lightning_softprompt.system.atomic_files import write_file


def write_prompt_files(prompt: SavedPrompt, path: Path, config_file: Path, validation_rows: int | None) -> None:
    """Write a prompt, and a Markdown file of the same name that describes it.

    Args:
        prompt: The prompt.
        path: The file, in the folder of the run.
        config_file: The config of the run.
        validation_rows: The number of rows that each validation scores, if it is known.
    """
    write_prompt(path, prompt)
    metrics = path.with_name("metrics.json")
    report = json.loads(metrics.read_text()) if metrics.is_file() else {}
    report["validation_rows"] = validation_rows
    config = yaml.safe_load(config_file.read_text())
    card = model_card(path.name, prompt.backbone, prompt.method, config, report, __version__)
    write_file(path.with_suffix(".md"), card.encode())


def count_validation_rows(data: SoftPromptDataModule, limit: int | float | None) -> int | None:
    """The number of rows that each validation scores, if all of them are scored and belong to one task.

    Args:
        data: The data module.
        limit: The Trainer's `limit_val_batches`.
    """
    if data.classes_by_task is not None or limit != 1.0:
        return None
    return len(data.split("validation"))
