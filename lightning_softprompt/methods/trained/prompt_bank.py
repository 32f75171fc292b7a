"""Several trained prompts; each row uses that of its task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.checkpoints.class_names import class_names, refuse_other_classes
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt
from lightning_softprompt.checkpoints.prompt_sources import report_prompt_source
from lightning_softprompt.checkpoints.restore import readout_tensors
from lightning_softprompt.checkpoints.roles import Roles
from lightning_softprompt.core.refusals import MissingTaskError
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.merge_rows import merge_prompts


class PromptBank(SoftPromptModule):
    """Saved prompts of any methods and lengths on one backbone: each row of a batch uses the prompt of its task.

    The results of a row do not depend on the other rows of the batch. Trained readouts are included. Checkpoints refer
    to the files of the prompts, which must stay in place.

    Paper: none
    Enters: same as each of the prompts
    Parameters: the parameters of all prompts

    Args:
        prompts: `prompt.safetensors` files or checkpoints of runs on this backbone, by task.
        common: Arguments of every method.

    Raises:
        ValueError: If there are no prompts, or the data has other tasks.
    """

    trained = True

    def __init__(self, prompts: Mapping[str, str] | None = None, **common: Any) -> None:
        super().__init__(**common)
        if not prompts:
            raise ValueError("PromptBank requires prompts, such as {sst2: runs/.../prompt.safetensors}")
        if self.tasks and set(self.tasks) != set(prompts):
            raise ValueError(f"prompts must name one for each of the tasks {list(self.tasks)}, got {sorted(prompts)}")
        self.paths = {name: Path(prompts[name]) for name in self.tasks or prompts}

    def build(self, backbone: Backbone) -> None:
        """Loads the methods in `prompts`, by task."""
        self.prompts = Roles()
        readout: dict[str, Tensor] = {}
        for name, path in self.paths.items():
            saved = self.prompts.load(name, path, backbone)
            report_prompt_source(path)
            self._check_classes(name, saved, path)
            for key, tensor in readout_tensors(saved).items():
                readout[f"of_tasks.{name}.{key}"] = tensor
            self.prompts[name].readout = None  # the bank's readout is used; it loads the trained tensors
        self.trained_readout = readout if self.tasks else {}

    def _check_classes(self, task: str, saved: SavedPrompt, path: Path) -> None:
        """Refuses a prompt whose readout was trained for other classes than those of its task."""
        here = (self.classes_by_task or {}).get(task)
        if here is not None and readout_tensors(saved):
            refuse_other_classes(class_names(saved.method), list(here.names), path, f"--data.tasks.{task}.labels")

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the prompt of each row's task."""
        if batch.task_ids is None and len(self.paths) > 1:
            raise MissingTaskError(f"rows have no task_ids to select one of the prompts {list(self.paths)}")
        methods = self.prompts.methods
        parts = [(rows, methods[task].prompt(task_batch)) for task, rows, task_batch in batch.by_task()]
        return parts[0][1] if len(parts) == 1 else merge_prompts(parts, batch)
