"""Prompts as W&B artifacts, so that its lineage graph shows which run started from which prompt."""

from __future__ import annotations

import logging
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wandb import Run

log = logging.getLogger(__name__)
PACKAGE_FOLDER = Path(__file__).resolve().parents[1]
ARTIFACT_TYPE = "soft-prompt"
PLUGIN_TYPE = "plug-in"
PROMPT = "prompt"  # name of the file of a single prompt, without its suffix
ALIASES = ("best", "latest")


def artifact_name(wandb_id: str, file: str = PROMPT) -> str:
    """Returns the name of the artifact of a prompt file: `prompt-<id of the W&B run>`, and the name of a replica.

    >>> artifact_name("4d2d697b"), artifact_name("4d2d697b", "replica_2")
    ('prompt-4d2d697b', 'prompt-4d2d697b-replica_2')
    """
    return f"prompt-{wandb_id}" if file == PROMPT else f"prompt-{wandb_id}-{file}"


def log_prompt(run: Run, path: Path, metadata: Mapping[str, Any]) -> None:
    """Log a prompt file as an artifact; a failure of W&B is a warning, because the file is in the run folder.

    Args:
        run: The W&B run of the training.
        path: The prompt file.
        metadata: Values that W&B shows for the artifact.
    """
    import wandb

    try:
        artifact = wandb.Artifact(artifact_name(run.id, path.stem), ARTIFACT_TYPE, metadata=dict(metadata))
        artifact.add_file(str(path), name="prompt.safetensors")
        run.log_artifact(artifact, aliases=list(ALIASES))
    except Exception as error:  # any failure of its process or the connection to it
        log.warning("W&B failed to store the prompt (%r); it is in %s", error, path)


def log_source(run: Run, paths: Iterable[Path]) -> None:
    """Log the source files of the user's classes as an artifact of type `plug-in`; a failure of W&B is a warning.

    Args:
        run: The W&B run.
        paths: The files; without any, there is no artifact.
    """
    import wandb

    files = sorted(set(paths))
    if not files:
        return
    try:
        artifact = wandb.Artifact(f"plugins-{run.id}", PLUGIN_TYPE)
        for number, path in enumerate(files):
            is_repeated = path.name in [other.name for other in files[:number]]
            artifact.add_file(str(path), name=f"{number}/{path.name}" if is_repeated else path.name)
        run.log_artifact(artifact)
    except Exception as error:  # any failure of its process or the connection to it
        log.warning("W&B failed to store the source files %s (%r)", ", ".join(map(str, files)), error)


def find_source(objects: Iterable[object]) -> list[Path]:
    """Returns the files that define the classes of objects, without those of installed packages and of this package."""
    installed = {*map(Path, sysconfig.get_paths().values()), PACKAGE_FOLDER}
    files = []
    for name in {type(value).__module__ for value in objects}:
        file: str | None = getattr(sys.modules.get(name), "__file__", None)
        path = Path(file or "").resolve()
        if path.suffix == ".py" and not any(folder in path.parents for folder in installed):
            files.append(path)
    return sorted(files)


def link_prompts(run: Run, prompts: Sequence[str]) -> None:
    """Link a run to the prompts that it starts from, artifacts of other runs.

    Offline, W&B cannot use artifacts: `use_artifact` raises an error. Online, it raises one if the project has no such
    artifact, for example because the training has not been uploaded. The name is in any case recorded in the config
    of the run, as `used_prompt`; several names are separated by commas.

    Args:
        run: The W&B run.
        prompts: Names of the artifacts of the prompts.
    """
    import wandb

    names = [f"{prompt}:{ALIASES[0]}" for prompt in prompts]
    if not names:
        return
    run.config.update({"used_prompt": ", ".join(names)}, allow_val_change=True)
    if run.offline:
        return
    for name in names:
        try:
            run.use_artifact(name, type=ARTIFACT_TYPE)
        except (wandb.Error, ValueError, TypeError) as error:
            log.info("W&B has no artifact %s (%s); its name is in the config of the run", name, error)
