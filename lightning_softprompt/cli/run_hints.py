"""The commands to suggest after `fit`, `validate`, `test` and `predict`, each for the checkpoint of that run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_softprompt.cli.commands.analysis.analyze import read_run
from lightning_softprompt.cli.next_steps import command_line, pipe
from lightning_softprompt.cli.run_config import config_beside, read_run_config
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.data.prepared import Split
from lightning_softprompt.system.errors import CommandError
from lightning_softprompt.training.session import Session

Words = list[str | Path]
SAMPLE_TEXT = "..."  # the user replaces it


def commands_after_fit(session: Session, data: SoftPromptDataModule) -> list[str]:
    """Test the best checkpoint of a training, and predict with it."""
    monitored = next(iter(session.best.values()))
    checkpoint = Path(monitored.best_model_path or session.last)
    start = start_options("ckpt_path", checkpoint, session)
    if start is None:
        return []
    return [command_line(evaluation_command(data), *start), *_prediction(data, start)]


def commands_after_evaluation(session: Session, data: SoftPromptDataModule, config: Any) -> list[str]:
    """Analyze a test of question answering; otherwise use the evaluated prompt for what has not been done yet.

    Args:
        session: The run of `validate`, `test` or `predict`.
        data: Its data module.
        config: Its options, of which `ckpt_path` and `init_from` name the prompt.
    """
    if session.command == "test" and _answers_questions(session.folder):
        return [command_line("analyze", session.folder)]
    option = "ckpt_path" if config.get("ckpt_path") else "init_from"
    if session.prints or not config.get(option):
        return []
    start = start_options(option, Path(config[option]), session)
    if start is None:
        return []
    if session.command != "test" and has_rows(data, "test"):
        return [command_line("test", *start)]
    return [] if session.command == "predict" else _prediction(data, start)


def start_options(option: str, file: Path, session: Session) -> Words | None:
    """The options that load a checkpoint or prompt with the settings of its run; None if no config has them.

    Args:
        option: `ckpt_path` or `init_from`.
        file: The checkpoint or prompt.
        session: The current run, whose config is used if the file is not in the folder of a run.
    """
    start: Words = [f"--{option}", file.absolute()]
    config = config_beside(file)
    if config is None:
        config = session.config_file
        return ["--config", config, *start] if config.is_file() else None
    try:
        read_run_config(config)
    except ValueError:  # it names classes that a command uses only if the config is passed to it
        return ["--config", config, *start]
    return start


def evaluation_command(data: SoftPromptDataModule) -> str:
    """The command that evaluates a checkpoint on the rows that a data module has."""
    return "test" if has_rows(data, "test") else "validate"


def has_rows(data: SoftPromptDataModule, split: Split) -> bool:
    """Whether a data module, or each task of a multi-task one, has a source with rows of a split."""
    tasks: Any = getattr(data, "tasks", None)
    if tasks is not None:
        return all(has_rows(task, split) for task in tasks.values())
    source = data.sources[split] or data.path
    if source is None or source == "-":
        return False
    if isinstance(source, str) and Path(source).expanduser().is_file():
        return True
    try:
        data.rows(split)
    except (ValueError, OSError):
        return False
    return True


def _prediction(data: SoftPromptDataModule, start: Sequence[str | Path]) -> list[str]:
    """A command that predicts one sample row; none if a row needs more than a text in each column."""
    trainer: Any = data.trainer
    if trainer is None or trainer.world_size > 1:
        return []
    row = sample_row(data)
    if row is None:
        return []
    return [pipe(json.dumps(row, ensure_ascii=False), command_line("predict", *start, "--data.predict", "-"))]


def sample_row(data: SoftPromptDataModule) -> dict[str, str] | None:
    """A row to predict with sample texts, by the column names of the source; None if the data module refuses it."""
    tasks: Any = getattr(data, "tasks", None)
    if tasks:
        name, task = next(iter(tasks.items()))
        row = sample_row(task)
        return None if row is None else {"task": name, **row}
    try:
        data.example(dict.fromkeys(data.needed_columns, SAMPLE_TEXT), labelled=False)
    except Exception:  # a data module may raise any error for a text where it needs another kind of value
        return None
    old_names = {new: old for old, new in data.rename_columns.items()}
    return {old_names.get(name, name): SAMPLE_TEXT for name in data.needed_columns}


def _answers_questions(folder: Path) -> bool:
    try:
        read_run(folder)
    except CommandError:
        return False
    return True
