"""The settings of a run that its checkpoints store, to check that a resumed run is the same run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_softprompt.renamed_options import rename_settings
from lightning_softprompt.system.printable import shorten

log = logging.getLogger(__name__)
SETTINGS = "settings"  # key of a checkpoint
TYPES = {"state_dict": Mapping, "loops": Mapping, "callbacks": Mapping, "hyper_parameters": Mapping,
         "backbone": Mapping, "settings": Mapping, "optimizer_states": list, "lr_schedulers": list, "epoch": int,
         "global_step": int}  # fmt: skip
FIT_LOOP = ("state_dict", "epoch_loop.state_dict", "epoch_loop.batch_progress", "epoch_progress",
            "epoch_loop.automatic_optimization.optim_progress")  # fmt: skip
PROGRESS = ("epoch", "global_step", "state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers")
MAX_SHOWN = 100  # characters of a value in a message

Settings = Mapping[str, Any]  # plain values by name, such as data.template


def refuse_incomplete(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Refuses to resume from a checkpoint without what training needs to continue.

    Raises:
        ValueError: Naming what is missing.
    """
    wrong = [name for name, kind in TYPES.items() if name in checkpoint and not isinstance(checkpoint[name], kind)]
    if wrong:
        raise ValueError(f"{path} cannot be resumed: it was changed, and {', '.join(wrong)} are of another type")
    missing = [name for name in PROGRESS if name not in checkpoint]
    loop = checkpoint.get("loops", {}).get("fit_loop")
    if isinstance(loop, Mapping):
        missing += [f"loops.fit_loop.{name}" for name in FIT_LOOP if name not in loop]
    not_empty = (SETTINGS, "loops", "callbacks", "optimizer_states")
    missing += [name for name in not_empty if name in checkpoint and not checkpoint[name]]
    callbacks = checkpoint.get("callbacks")
    if isinstance(callbacks, Mapping) and callbacks and "RngState" not in callbacks:
        missing.append("callbacks.RngState")
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}, so training cannot be resumed from it exactly; start a new run from "
            f"its prompt with --init_from {path}"
        )


def refuse_contradicting_progress(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Refuses a checkpoint whose epoch or step is not that of its loops, by which training continues.

    Raises:
        ValueError: Naming what differs.
    """
    try:
        loop = checkpoint["loops"]["fit_loop"]
        steps = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
        counted = {"epoch": loop["epoch_progress"]["current"]["completed"], "global_step": steps["total"]["completed"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be resumed: it was changed, and its loops have no progress") from error
    for name, count in counted.items():
        if checkpoint[name] != count:
            raise ValueError(
                f"{path} cannot be resumed: it was changed, and its {name} is {checkpoint[name]}, while its loops have "
                f"counted {shorten(count, MAX_SHOWN)}"
            )


def refuse_changes(saved: Settings, current: Settings, accepted: Iterable[str], path: Path) -> None:
    """Refuses to resume with settings that differ from those of the checkpoint.

    Args:
        saved: Settings of the checkpoint.
        current: Settings of the command.
        accepted: Names whose changes are accepted; a name covers all names below it, as `data` covers `data.template`.
        path: The checkpoint, for messages.

    Raises:
        ValueError: Naming each difference that is not accepted.
    """
    changed = find_differences(rename_settings(saved), current)
    accepted_names = list(accepted)
    refused = [text for name, text in changed.items() if not any(covers(accepted, name) for accepted in accepted_names)]
    if refused:
        raise ValueError(
            f"{path} belongs to a run with other data or settings: {'; '.join(refused)}. Use the settings of its run "
            f"(--config config.yaml of its folder), or accept the changes with --run.accept_changes "
            f"{','.join(changed)}; the result then differs from that of an uninterrupted run"
        )
    for text in changed.values():
        log.warning("accepted: %s", text)


def find_differences(one: Settings, other: Settings) -> dict[str, str]:
    """Describes the settings that differ, by name. Settings that only one version of the package has are left out."""
    differences = {}
    for name in sorted(set(one) & set(other)):
        before, now = one[name], other[name]
        if to_json(before) != to_json(now):
            differences[name] = f"{name} was {shorten(before, MAX_SHOWN)} and is {shorten(now, MAX_SHOWN)}"
    return differences


def covers(name: str, setting: str) -> bool:
    """Returns whether a name is that of a setting or of a part that contains the setting."""
    return setting == name or setting.startswith(f"{name}.")


def to_json(value: Any) -> str:
    """Serializes a value; the text preserves the order of mappings and distinguishes 1 from 1.0."""
    return json.dumps(value, ensure_ascii=False)
