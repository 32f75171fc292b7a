"""What a command takes from the checkpoint or prompt that it starts from, and checks that both agree."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lightning_softprompt.checkpoints.checkpoint_file import SEED, load_checkpoint
from lightning_softprompt.checkpoints.hyperparameters import to_plain
from lightning_softprompt.checkpoints.prompt_file import read_prompt
from lightning_softprompt.checkpoints.run_settings import (
    SETTINGS,
    refuse_changes,
    refuse_contradicting_progress,
    refuse_incomplete,
)
from lightning_softprompt.checkpoints.safe_loading.registry import resolve_class_paths
from lightning_softprompt.cli.run_config import config_beside, read_run_config
from lightning_softprompt.data.saved_classes import fill_classes, lacks_classes
from lightning_softprompt.runs.run_spec import RunSpec

log = logging.getLogger(__name__)
SettingsCheck = Callable[[Mapping[str, Any]], None]
CHECKED_BY_DATA = {"_instantiator", "classes", "classes_by_task", "evaluation", "backbone"}  # or by its fingerprint
TRAINING_ONLY = {
    "seed_everything", "optimizer", "scheduler", "objective", "penalty_weights", "readout", "lr", "lr_schedule",
    "warmup", "embedding_noise",
}  # fmt: skip
# arguments that checkpoints of version 0.2 do not have
IMPLIED = {"lr_schedule": "constant", "warmup": 0.0, "embedding_noise": 0.0}


def load_checked_checkpoint(path: Path, training: bool) -> dict[str, Any]:
    """Load a checkpoint.

    Raises:
        ValueError: If the file is not a checkpoint, or lacks what the command needs.
    """
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} is a prompt, not a checkpoint: it has no training state. Use --init_from {path}")
    checkpoint = load_checkpoint(path)
    if training:
        refuse_incomplete(checkpoint, path)
        refuse_contradicting_progress(checkpoint, path)
    return checkpoint


def evaluate_prompt_file(config: Namespace) -> None:
    """Evaluate a prompt file that is passed as a checkpoint: it contains all that an evaluation needs."""
    path = config.get("ckpt_path")
    if path and Path(path).suffix == ".safetensors" and not config.get("init_from"):
        config.init_from, config.ckpt_path = path, None


def settings_check(checkpoint: Mapping[str, Any], path: Path, run: RunSpec) -> SettingsCheck | None:
    """A function that refuses settings that differ from those of a checkpoint; None if the checkpoint has none."""
    if SETTINGS in checkpoint:
        return partial(refuse_changes, checkpoint[SETTINGS], accepted=run.accepted_changes, path=path)
    log.warning(
        "%s was written by an earlier version without digests of data and settings; changes since then cannot be "
        "detected", path,
    )  # fmt: skip
    return None


def take_saved_classes(config: Namespace) -> None:
    """Set the classes of a data module that names none to those of the checkpoint or prompt.

    No training rows are then read to infer them.

    Raises:
        ValueError: If the file cannot be read.
    """
    path = config.get("ckpt_path") or config.get("init_from")
    if path and lacks_classes(config.data, classes_option):
        fill_classes(config.data, read_prompt(Path(path)).method, classes_option)


def classes_option(class_path: str) -> str | None:
    """The argument of a data module that names its classes, if they can be inferred."""
    module, _, name = class_path.rpartition(".")  # parsing has imported it
    cls = getattr(sys.modules.get(module), name, None)
    return getattr(cls, "classes_option", None)


def refuse_contradiction(
    model: dict[str, Any], checkpoint: Mapping[str, Any], path: Path, training: bool, seed: int | None = None
) -> None:
    """Refuse a checkpoint whose method or arguments differ from those of the command.

    Args:
        model: Class path and arguments of the command.
        checkpoint: The checkpoint to resume or evaluate.
        path: Its file, for messages.
        training: Whether the command trains, so that optimizer and objective must agree, too.
        seed: The seed of the command.

    Raises:
        ValueError: Naming the differences.
    """
    saved = {
        "replicas": 1,
        **IMPLIED,
        **checkpoint.get("hyper_parameters", {}),
        "seed_everything": checkpoint.get(SEED, seed),
    }
    arguments = {"replicas": model.get("replicas", 1), **model.get("init_args", {})}
    current = {"_class_path": model["class_path"], **arguments, "seed_everything": seed}
    saved, current = resolve_class_paths(to_plain(saved)), resolve_class_paths(to_plain(current))
    skipped = CHECKED_BY_DATA if training else CHECKED_BY_DATA | TRAINING_ONLY
    names = sorted({*saved, *current} - skipped)
    differences = [
        f"{name.removeprefix('_')} was {saved.get(name)!r} and is {current.get(name)!r}"
        for name in names
        if saved.get(name) != current.get(name)
    ]
    if differences:
        raise ValueError(
            f"{path} does not match the command: {', '.join(differences)}. Use the options of its run (--config "
            f"config.yaml of its folder), or start a new run from its prompt with --init_from"
        )


def with_run_config(argv: Sequence[str]) -> list[str]:
    """Add the config of the checkpoint's run to the command, if the command names no config and no model."""
    words = [word for arg in argv for word in arg.split("=", 1)]
    if {"-c", "--config", "--model"} & set(words):
        return list(argv)
    for flag, value in pairwise(words):
        if flag not in ("--ckpt_path", "--init_from"):
            continue
        path = _last_checkpoint(words) if flag == "--ckpt_path" and value == "last" else value
        if path is None:
            continue
        if config := config_beside(Path(path)):
            return [argv[0], "--config", _read_settings(config, argv[0]), *argv[1:]]
        if not Path(path).exists():
            raise ValueError(f"{flag}: {path} does not exist")
    return list(argv)


def _last_checkpoint(words: Sequence[str]) -> str | None:
    """The checkpoint that `last` refers to, given the --run options of the command; None if there is none."""
    options = {flag: value for flag, value in pairwise(words) if flag.startswith("--run.")}
    arguments: dict[str, Any] = {}
    for name in ("folder", "experiment", "name"):
        if f"--run.{name}" in options:
            arguments[name] = options[f"--run.{name}"]
    checkpoint = RunSpec(**arguments).last_checkpoint()
    return None if checkpoint is None else str(checkpoint)


def _read_settings(path: Path, command: str) -> str:
    """Read the settings that a command takes from the config of a checkpoint's run.

    Raises:
        ValueError: If the config names classes that it may not name, and the command trains.
    """
    config = read_run_config(path)
    if config.left_out and command == "fit":
        raise ValueError(
            f"{path}, the config of the checkpoint's run, is not used: {'; '.join(config.left_out.values())}. To use "
            f"it anyway, pass it: --config {path}"
        )
    exception = f", except {' and '.join(config.left_out)}" if config.left_out else ""
    log.info("Using %s from %s%s", ", ".join(config.values), path, exception)
    return config.text
