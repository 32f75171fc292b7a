"""The prompts that a server offers, by name."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.checkpoints.prompt_file import read_prompt
from lightning_softprompt.inference.prompt import Prompt, TaskView, load_prompt
from lightning_softprompt.serving.errors import RequestError, invalid

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True, eq=False)
class ServedPrompt:
    """A prompt under the name that requests use. A request keeps the prompt that it began with.

    Args:
        name: The name; that of one of several tasks is `FILE:TASK`.
        file: The name that the file was added with.
        prompt: The prompt.
        task: The task, if the prompt has several.
        num_bytes: Size of its tensors.
        created: Time in seconds.
    """

    name: str
    file: str
    prompt: Prompt
    task: str | None
    num_bytes: int
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def view(self) -> TaskView:
        """How its rows are written, and how classes are predicted."""
        return self.prompt.view(self.task)

    @property
    def scores_answers(self) -> bool:
        """Whether it is a reward model, which generates nothing."""
        readout = self.prompt.method.readout
        return readout is not None and readout.scores_answers

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a row must have."""
        return self.view.format.required_columns

    def describe(self) -> dict[str, Any]:
        """What `GET /v1/models` reports about it."""
        kind = "classification" if self.view.evaluation is not None else "text"
        details = {
            "method": type(self.prompt.method).__name__,
            "kind": kind,
            "columns": list(self.columns),
            "bytes": self.num_bytes,
            "backbone": self.prompt.backbone.spec.name,
        }
        owner = "lightning-softprompt"
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": owner, "softprompt": details}


class Registry:
    """Prompts by name on one backbone.

    Prompts are loaded by one thread, which also runs the backbone; other threads read.

    Args:
        backbone: The backbone of all prompts.
        max_prompts: Largest number of prompts.
    """

    def __init__(self, backbone: Backbone, max_prompts: int = 10_000) -> None:
        self.backbone, self.max_prompts = backbone, max_prompts
        self._prompts: dict[str, ServedPrompt] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def __contains__(self, name: object) -> bool:
        return name in self._prompts

    @property
    def prompts(self) -> Sequence[ServedPrompt]:
        """All prompts."""
        return list(self._prompts.values())

    @property
    def num_bytes(self) -> int:
        """Size of all prompts."""
        return sum(served.num_bytes for served in self.prompts)

    def get(self, name: str) -> ServedPrompt:
        """Returns a prompt.

        Raises:
            RequestError: If there is none of this name.
        """
        served = self._prompts.get(name)
        if served is None:
            raise RequestError(404, f"no prompt {name!r}; GET /v1/models lists the prompts", "model_not_found", "model")
        return served

    def add(self, name: str, path: Path, standalone: bool = False) -> list[ServedPrompt]:
        """Loads a prompt file. A prompt of the same name is replaced; running requests finish with the old one.

        Args:
            name: The name.
            path: The file, which is not shown to clients.
            standalone: Whether to refuse a prompt that needs further files, as a `PromptBank` does.

        Raises:
            RequestError: If the name or the file cannot be used.
        """
        if not NAME.fullmatch(name):
            raise invalid("name must consist of letters, digits, '_', '.' and '-', at most 100", "name")
        loaded = self._load(name, path, standalone)
        remaining = {key: served for key, served in self._prompts.items() if served.file != name}
        added = {served.name: served for served in loaded}
        if len(remaining) + len(added) > self.max_prompts:
            raise RequestError(409, f"the server holds at most {self.max_prompts} prompts", "too_many_prompts", "name")
        self._prompts = remaining | added  # one assignment: other threads see the old prompts or the new ones
        return loaded

    def remove(self, name: str) -> None:
        """Removes the prompts of a file; running requests finish.

        Raises:
            RequestError: If there is none of this name.
        """
        remaining = {key: served for key, served in self._prompts.items() if served.file != name}
        if len(remaining) == len(self._prompts):
            raise RequestError(404, f"no prompt {name!r}", "model_not_found", "name")
        self._prompts = remaining

    def _load(self, name: str, path: Path, standalone: bool) -> list[ServedPrompt]:
        try:
            saved = read_prompt(path)
        except (ValueError, OSError):
            raise invalid("the file is not a valid prompt file", "path", "invalid_prompt_file") from None
        here, there = self.backbone.fingerprint(), saved.backbone.get("fingerprint")
        try:
            prompt = load_prompt(path, self.backbone)
            if standalone and prompt.method.prompt_sources:
                raise ValueError("the prompt consists of several files; fold it first")
            tasks: Sequence[str | None] = prompt.tasks or (None,)
            num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in saved.tensors.values())
            served = []
            for task in tasks:
                full_name = name if task is None else f"{name}:{task}"
                served.append(ServedPrompt(full_name, name, prompt, task, num_bytes))
                served[-1].view.format.parsed  # noqa: B018 (a file without a template is refused here)
        except (ValueError, OSError) as error:
            if here != there:
                message = f"the prompt belongs to the backbone {str(there)[:80]}, the server runs {here}"
                raise RequestError(409, message, "other_backbone", "path") from error
            reason = str(error).replace(str(path), "the file")
            raise invalid(reason, "path", "invalid_prompt_file") from error
        return served
