"""Which W&B run a command logs to, and how that run is named and grouped."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_softprompt.checkpoints.checkpoint_file import load_checkpoint
from lightning_softprompt.checkpoints.prompt_file import WANDB_RUN, read_prompt, replica_name, replica_numbers
from lightning_softprompt.runs.run_record import read_record
from lightning_softprompt.runs.run_spec import RunSpec
from lightning_softprompt.runs.wandb_artifacts import PROMPT, artifact_name

EVALUATIONS = ("validate", "test")  # commands that add to the run of the training
VALID_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
LONGEST_TAG = 64  # characters; W&B refuses longer tags


@dataclass(frozen=True)
class WandbIdentity:
    """The W&B run of a command.

    Args:
        id: Id of the run.
        name: Name of the run; None leaves the name of a continued run unchanged.
        group: Group of the run.
        job_type: Job type of the run.
        tags: Tags of the run.
        notes: Notes of the run.
        continues: Whether an earlier command has logged to the run.
        sources: Names of the artifacts of prompts of another run that this run starts from.
        earlier_folder: Folder of a command that has logged to the run, if it exists.
    """

    id: str
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: Sequence[str] | None = None
    notes: str | None = None
    continues: bool = False
    sources: Sequence[str] = ()
    earlier_folder: Path | None = None

    @property
    def init_options(self) -> dict[str, Any]:
        """The arguments of `wandb.init`, except those that have no value."""
        options = {
            "id": self.id,
            "group": self.group,
            "job_type": self.job_type,
            "tags": self.tags,
            "notes": self.notes,
        }
        return {name: value for name, value in options.items() if value is not None}


def identify_run(
    run: RunSpec, command: str, name: str, tags: Sequence[str], checkpoint: Path | None, prompt: Path | None
) -> WandbIdentity:
    """Choose the W&B run of a command.

    A resumed training and the evaluation of a checkpoint or prompt continue the run of its training. An evaluation with
    a display name is a run of its own, so that several tests of one prompt do not overwrite each other. So are
    predictions, which are linked to the prompt. The variables of W&B, such as `WANDB_RUN_GROUP`, replace the defaults
    of options.

    Args:
        run: The options of the run.
        command: The command.
        name: The default name.
        tags: The default tags.
        checkpoint: The checkpoint that is resumed or evaluated, if any.
        prompt: The prompt file that the command starts from, if any.
    """
    start = checkpoint or prompt
    trained = find_wandb_id(checkpoint, prompt)
    is_resumed = command == "fit" and checkpoint is not None
    is_evaluation = command in EVALUATIONS and run.display_name is None
    earlier = trained if is_resumed or is_evaluation else None
    identity = earlier or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    # an evaluation keeps the name, group, job type and tags of the training that it continues
    keeps = earlier is not None and command != "fit"
    return WandbIdentity(
        identity,
        run.display_name or (None if keeps else _default("WANDB_NAME", name)),
        run.group or (None if keeps else _default("WANDB_RUN_GROUP", run.experiment)),
        run.job_type or (None if keeps else _default("WANDB_JOB_TYPE", command)),
        run.tags if run.tags is not None else (None if keeps else _default("WANDB_TAGS", list(tags))),
        run.notes,
        continues=earlier is not None,
        sources=find_prompt_artifacts(start) if earlier is None and start is not None else (),
        earlier_folder=None if earlier is None else find_run_folder(start, earlier),
    )


def _default(variable: str, value: Any) -> Any:
    """Returns a default, or None if W&B reads the value from its variable."""
    return None if variable in os.environ else value


def identify_analysis(folder: Path, name: str, group: str) -> WandbIdentity:
    """Choose the W&B run of an analysis: the run of the test in a folder, or a new one if the test was not logged.

    Args:
        folder: The folder of the test.
        name: The name of a new run.
        group: The group of a new run.
    """
    earlier = _valid_id(read_record(folder).wandb_id)
    if earlier is not None:
        return WandbIdentity(earlier, continues=True, earlier_folder=folder)
    return WandbIdentity(secrets.token_hex(4), name, group, "analyze")


def find_wandb_id(checkpoint: Path | None, prompt: Path | None) -> str | None:
    """Return the id of the W&B run of the training that wrote a checkpoint or a prompt; None if it has none."""
    if checkpoint is not None:
        return _read_id(load_checkpoint(checkpoint).get(WANDB_RUN))
    if prompt is None:
        return None
    # the file has the id, also as a copy in a library; files of earlier versions have it in the record beside them
    return _read_id(read_prompt(prompt).wandb_run) or _valid_id(read_record(prompt.parent).wandb_id)


def find_prompt_artifacts(path: Path) -> list[str]:
    """Return the names of the W&B artifacts of the prompts in a file; none if their training was not logged to W&B.

    Args:
        path: A prompt file, or the checkpoint of a run, which has a prompt for each replica.
    """
    saved = read_prompt(path)
    wandb_id = _read_id(saved.wandb_run) or _valid_id(read_record(path.parent).wandb_id)
    if wandb_id is None:
        return []
    files = [replica_name(k) for k in range(len(replica_numbers(saved.tensors)))]
    return [artifact_name(wandb_id, file) for file in files or [_valid_id(saved.wandb_run.get("prompt")) or PROMPT]]


def find_run_folder(file: Path | None, wandb_id: str) -> Path | None:
    """Return the run folder of a checkpoint or prompt if it logged to a W&B run; None for a copy elsewhere."""
    folders = [] if file is None else [file.parent, file.parent.parent]
    return next((folder for folder in folders if read_record(folder).wandb_id == wandb_id), None)


def _read_id(saved: Any) -> str | None:
    return _valid_id(saved.get("id")) if isinstance(saved, Mapping) else None


def _valid_id(value: Any) -> str | None:
    """Returns an id that is part of a file name and an address; files can be forged."""
    return value if isinstance(value, str) and VALID_ID.fullmatch(value) else None


def default_tags(method: str, data: str, backbone: str) -> list[str]:
    """Return the tags of a run, shortened to the length that W&B accepts.

    >>> default_tags("PromptTuning", "ClassificationDataModule", "org/model")
    ['PromptTuning', 'ClassificationDataModule', 'model']
    """
    names = (method, data, Path(backbone).name)
    return [name[:LONGEST_TAG] for name in dict.fromkeys(names) if name]
