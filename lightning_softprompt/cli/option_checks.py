"""Refuses options that a run cannot use, before anything is loaded or written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lightning_softprompt.backbones.insertion.positions import max_positions
from lightning_softprompt.backbones.requirements import require_of_copy, takes_keys_and_values
from lightning_softprompt.backbones.skeleton import Skeleton
from lightning_softprompt.callbacks.algorithms.consolidation import can_measure_untrained
from lightning_softprompt.cli.parsing.class_options import LINKED
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.runs.run_checks import refuse_callbacks, refuse_options
from lightning_softprompt.system.plain_yaml import read_yaml
from lightning_softprompt.training.monitors import (
    choose_monitor,
    refuse_monitor,
    refuse_monitors,
    refuse_unvalidated,
    validation_metrics,
)
from lightning_softprompt.training.replicas import Replicas, ReplicaSpec

TEMPLATE_OPTION = re.compile(r"--data\.(?:\w+\.)*\w*template")
LINKED_OPTION = re.compile(r"--(model|data)\.(?:init_args\.)?(\w+)")


def refuse_linked(argv: Sequence[str]) -> None:
    """Refuse options that are set by a link to another option.

    Raises:
        ValueError: Naming the option and the one to use instead.
    """
    for word in argv:
        match = LINKED_OPTION.match(word)
        if not match or match[2] not in LINKED[match[1]]:
            continue
        option = word.partition("=")[0]
        if match[2] == "evaluation":
            raise ValueError(
                f"{option} is not an option: the class of --data determines the metrics. --data.extra_metrics of "
                f"ClassificationDataModule adds metrics; other evaluations need a data module of your own"
            )
        source = "backbone" if match[2] == "backbone" else "data"
        raise ValueError(f"{option} is set by --{source}, which model and data share; set it there")


def unescape_templates(argv: Sequence[str]) -> list[str]:
    r"""Replace `\n` and `\t` in templates of the command line by a line break and a tab, which most shells do not.

    >>> unescape_templates(["--data.template", r"{soft}{text}\n{target}", r"--run.name=a\n"]) == [
    ...     "--data.template", "{soft}{text}\n{target}", r"--run.name=a\n"
    ... ]
    True
    """
    words = []
    is_template = False  # whether the previous word is an option that takes a template
    for word in argv:
        option, _, value = word.partition("=")
        names_template = TEMPLATE_OPTION.fullmatch(option) is not None
        if is_template or (names_template and value):
            word = word.replace("\\n", "\n").replace("\\t", "\t")
        is_template = names_template and not value
        words.append(word)
    return words


def refuse_unreadable_configs(argv: Sequence[str]) -> None:
    """Refuse a config file that cannot be read.

    Raises:
        ValueError: Naming the file.
    """
    for flag, value in pairwise(word for arg in argv for word in arg.split("=", 1)):
        may_be_path = flag in ("-c", "--config") and "\n" not in value and len(value) < 1000
        if may_be_path and Path(value).is_file() and not isinstance(read_yaml(Path(value)), Mapping):
            raise ValueError(f"{value} is not a config; a config is a mapping of options to values")


def check_options(command: str, config: Any, model: SoftPromptModule | Replicas, data: SoftPromptDataModule) -> None:
    """Refuse invalid options of Trainer, callbacks, optimizer and schedule before the run has a folder.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        config: Its options, with objects for classes.
        model: The method, or several of it.
        data: The data module.

    Raises:
        ValueError: Naming the option and the fix.
    """
    callbacks = as_list(config.trainer.callbacks)
    has_result = fits_readout(model.hparams) or any(map(can_measure_untrained, callbacks))
    can_skip_training = command == "fit" and has_result
    refuse_options(command, config.trainer.as_dict(), can_skip_training)
    refuse_callbacks(callbacks)
    if command != "fit":
        return
    metrics = validation_metrics(data.evaluation, model.replica_names)
    refuse_monitors(callbacks, metrics)
    plateau = model.scheduler_monitor()
    if config.trainer.limit_val_batches == 0:
        refuse_unvalidated(callbacks, plateau)
    if plateau is not None:
        refuse_monitor("--model.scheduler.monitor", plateau, metrics)
    if config.run.monitor is not None:
        monitor, _ = choose_monitor(config.run, data.evaluation)
        refuse_monitor("--run.monitor", monitor, metrics)


def fits_readout(arguments: Mapping[str, Any]) -> bool:
    """Whether the readout of a method is fitted before the first step, from the arguments of the method."""
    readout = arguments.get("readout") or {}
    return bool(readout.get("init_args", {}).get("fit_first"))


def check_backbone(model: SoftPromptModule, data: SoftPromptDataModule) -> None:
    """Refuse a backbone that the method or the evaluation cannot use.

    Raises:
        ValueError: Naming the method or the evaluation, and the reason.
    """
    refuse_long_prompt(model)
    model.check_backbone()
    evaluation = data.evaluation
    require_of_copy(evaluation.requires, type(evaluation).__name__, model.spec)


def refuse_long_prompt(model: SoftPromptModule) -> None:
    """Refuse soft tokens that fill the context window, before the weights of the backbone are loaded.

    Keys and values of a prefix are not counted as tokens of a row.

    Raises:
        ValueError: Naming the number of soft tokens and the window.
    """
    length = model.hparams.get("length")
    window = max_positions(Skeleton(model.spec).config)
    if not isinstance(length, int) or window is None or takes_keys_and_values in model.requires:
        return
    if length >= window:
        raise ValueError(
            f"--model.length is {length}, but {model.spec.name} has a context window of {window} tokens, including "
            f"soft tokens; use a smaller length"
        )


def replica_spec(value: Any) -> ReplicaSpec:
    """The spec of the replicas, from a number or a mapping."""
    if isinstance(value, Namespace):
        inits = None if value.inits is None else list(value.inits)
        return ReplicaSpec(**{**value.as_dict(), "inits": inits})
    return value if isinstance(value, ReplicaSpec) else ReplicaSpec(value)


def as_list(value: Any) -> list[Any]:
    """One object or several as a list; empty for None and switches."""
    if isinstance(value, list):
        return list(value)
    return [] if value in (None, False, True) else [value]
